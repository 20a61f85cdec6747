"""Gets a run's base model: loads it by name, or borrows an object and gives it back unchanged."""

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from sparsify.models.base import BaseModel, Dtype, check_base, load_base, load_tokenizer
from sparsify.models.load_checks import correct_tie
from sparsify.models.multimodal import processor_files, tokenizer_of


class Origin:
    """Loads the base model, or takes an object, which it keeps in evaluation mode during the run.

    Args:
        name_or_path: as :func:`~sparsify.models.base.load_model` takes it; for an object only its
            name in messages and records.
        dtype: the type in which weights are loaded; an object keeps its own.
    """

    def __init__(self, name_or_path: str, dtype: Dtype) -> None:
        self._name_or_path, self._dtype = name_or_path, dtype
        self._model: PreTrainedModel | None = None
        self._modes: Modes | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._processor: ProcessorMixin | None = None

    def give(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | ProcessorMixin
    ) -> None:
        """Use these objects instead of loading a model and a tokenizer."""
        self._model, self._tokenizer = model, tokenizer_of(tokenizer)
        self._processor = tokenizer if isinstance(tokenizer, ProcessorMixin) else None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to the model."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._name_or_path)
        return self._tokenizer

    def base(self) -> BaseModel:
        """The model, checked.

        Raises:
            SparsifyError: it cannot be loaded or cannot be masked.
        """
        if self._model is None:
            base = load_base(self._name_or_path, self._dtype)
        else:
            model, self._model = self._model, None
            self._modes = Modes(model)
            self._modes.enter()  # dropout would give other statistics, and so other masks
            correct_tie(model)
            base = check_base(model, self._name_or_path, model.dtype)
            source = model.config._name_or_path
            base.processor = self._processor or processor_files(model.config, source)
        base.own_tokenizer = self._tokenizer
        return base

    def enter_modes(self, model: PreTrainedModel, recomputes: bool) -> None:
        """Put a model that was given as an object into the modes of a run again.

        Args:
            model: the model.
            recomputes: whether its blocks recompute their activations, which they only do in
                training mode.
        """
        if self._modes is None:
            return
        self._modes.enter()
        for part in model.modules() if recomputes else ():
            if isinstance(part, GradientCheckpointingLayer):
                part.training = True

    def restore_modes(self) -> None:
        """Put the modules of a model that was given as an object back into their former modes."""
        if self._modes is not None:
            self._modes.leave()


class Modes:
    """Remembers which modules of a model are in training mode, before a run and after it.

    Args:
        model: in the modes to restore later.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._given = _modes(model)
        self._of_run: dict[str, bool] | None = None

    def enter(self) -> None:
        """Set evaluation mode, in which dropout is off. At a second run set the modes of the first,
        in which blocks that recompute activations may be in training mode.
        """
        if self._of_run is None:
            self._model.eval()
        else:
            _set(self._model, self._of_run)

    def leave(self) -> None:
        """Restore the modes from before the run; modules that were added since keep theirs."""
        self._of_run = _modes(self._model)
        _set(self._model, self._given)


def _modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def _set(model: nn.Module, modes: dict[str, bool]) -> None:
    for name, module in model.named_modules():
        module.training = modes.get(name, module.training)
