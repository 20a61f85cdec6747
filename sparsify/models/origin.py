"""Where a run's base model comes from: a name, or an object that goes back as it came."""

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from sparsify.models.base import BaseModel, Dtype, check_base, load_base, load_tokenizer
from sparsify.models.load_checks import correct_tie


class Origin:
    """Gives the base model, and keeps an object that was given in evaluation mode.

    Args:
        name_or_path: as :func:`~sparsify.models.base.load_model` takes it; of an object the name
            for messages and records.
        dtype: the type of the weights, where they are loaded.
    """

    def __init__(self, name_or_path: str, dtype: Dtype) -> None:
        self._name_or_path, self._dtype = name_or_path, dtype
        self._model: PreTrainedModel | None = None
        self._modes: Modes | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def give(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take these objects in place of loading any."""
        self._model, self._tokenizer = model, tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to the model."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._name_or_path)
        return self._tokenizer

    def base(self) -> BaseModel:
        """The checked model.

        Raises:
            SparsifyError: it cannot be loaded, or not be masked.
        """
        if self._model is None:
            base = load_base(self._name_or_path, self._dtype)
        else:
            model, self._model = self._model, None
            self._modes = Modes(model)
            self._modes.enter()  # dropout would give other statistics, and so other masks
            correct_tie(model)
            base = check_base(model, self._name_or_path, model.dtype)
        base.own_tokenizer = self._tokenizer
        return base

    def enter_modes(self, model: PreTrainedModel, recomputes: bool) -> None:
        """Have a given model in the modes of a run again.

        Args:
            model: the model.
            recomputes: whether its blocks recompute their activations, which they do in training
                mode alone.
        """
        if self._modes is None:
            return
        self._modes.enter()
        for part in model.modules() if recomputes else ():
            if isinstance(part, GradientCheckpointingLayer):
                part.training = True

    def restore_modes(self) -> None:
        """Have the modules of a given model in training or evaluation mode as they came."""
        if self._modes is not None:
            self._modes.leave()


class Modes:
    """Which modules of a model are in training mode: as it came, and as a run left it.

    Args:
        model: in the mode to which it shall be restored.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._given = _modes(model)
        self._of_run: dict[str, bool] | None = None

    def enter(self) -> None:
        """Evaluation mode, in which dropout is off; at a second run the modes of the first, whose
        blocks may be in training mode so that their activations are recomputed.
        """
        if self._of_run is None:
            self._model.eval()
        else:
            _set(self._model, self._of_run)

    def leave(self) -> None:
        """The modes in which the model came; modules that have come since stay as they are."""
        self._of_run = _modes(self._model)
        _set(self._model, self._given)


def _modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def _set(model: nn.Module, modes: dict[str, bool]) -> None:
    for name, module in model.named_modules():
        module.training = modes.get(name, module.training)
