"""The Python interface: one call on a model object."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from sparsify.calibration.permuting import NONE
from sparsify.common.console import Progress
from sparsify.common.errors import SparsifyError
from sparsify.common.quiet import quiet
from sparsify.common.ranks import rank_zero, together
from sparsify.common.signals import Interrupted
from sparsify.data import TextDataModule
from sparsify.export.folder import export, mask_lineage
from sparsify.export.mask_file.file import write_masks
from sparsify.masking.layer import layer_patterns, masked_layers, put_back
from sparsify.masking.registry import CALLBACKS, make_strategy, plugins
from sparsify.masking.strategy import SparsityStrategy
from sparsify.models.load_checks import check_model
from sparsify.models.multimodal import tokenizer_of
from sparsify.models.perplexity import Score
from sparsify.training.guards import check_objects
from sparsify.training.module import SparseCausalLM
from sparsify.training.trainer import Trainer

CALLBACK_NAMES = ("annealing", "masks", "speed")
# Of SparseCausalLM, but for what the model object and the strategy say.
OPTIONS = signature(SparseCausalLM).parameters.keys() - {"strategy", "name_or_path"}


@dataclass(repr=False)
class Sparsified:
    """A model with its masks.

    Attributes:
        model: the model that was given; its layers are masked, so that it computes what the
            exported model will.
        module: the LightningModule around it.
        trainer: the Trainer that ran.
    """

    model: PreTrainedModel
    module: SparseCausalLM
    trainer: Trainer
    _given: "_Given"
    _folded: bool = False

    def __repr__(self) -> str:
        strategy, pattern = type(self.module.strategy).__name__, str(self.module.selection.pattern)
        pattern += " with overrides" if self.module.selection.overrides.patterns else ""
        return f"Sparsified({strategy} {pattern}, {self.module.steps} steps)"

    def masks(self) -> dict[str, torch.Tensor]:
        """The hard masks by layer name: bool ``[O, I]``, True = kept."""
        self._check_masked()
        return self.module.masked.hard_masks()

    def test(self) -> dict[str, Score]:
        """Measure the test texts under the hard masks: the score of each, and ``overall``.

        Raises:
            SparsifyError: the data has no test text.
        """
        data = cast(Any, self.trainer).datamodule
        if not data.test_names:
            raise SparsifyError("the data has no test text; give TextDataModule(test=FILE)")
        with quiet():
            self.trainer.test(self.module, datamodule=data, verbose=False)
        return self.module.scores

    def export(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write the sparse model, its tokenizer, masks and manifest as a Hugging Face folder."""
        self._check_masked()
        module = self.module
        windows_BT, measuring = module.test_windows(), module.measuring
        export(module.masked, Path(folder), {}, overwrite, windows_BT, measuring)

    def save_masks(self, path: str | Path) -> None:
        """Write the masks alone: a file that ``prior`` takes."""
        masked, masks = self.module.masked, self.masks()
        patterns, lineage = layer_patterns(self.model), mask_lineage(masked)
        with together():
            if rank_zero():
                orders = masked.base.permutation
                digest = masked.base.hash
                write_masks(Path(path), masks, patterns, digest, lineage, permutation=orders)

    def fold(self) -> PreTrainedModel:
        """Multiply the masks into the weights and restore the plain layers, in place; the dense
        weights are gone then, and so are the masks. Parameters require gradients as they did before
        the run.
        """
        self.module.masked.fold()
        self._given.put_back()
        self._folded = True
        return self.model

    def _check_masked(self) -> None:
        if self._folded:
            raise SparsifyError(
                "the model was folded, so that its masks are gone; call masks(), save_masks() and "
                "export() before fold()"
            )


def sparsify(
    model: PreTrainedModel,
    strategy: SparsityStrategy | str,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    steps: int = 2000,
    trainer: Mapping[str, Any] | None = None,
    **options: Any,
) -> Sparsified:
    """Make the linear layers of a model object N:M sparse.

    Args:
        model: a causal LM; its layers are replaced in place by masked ones over the same
            Parameters.
        strategy: a strategy, of which a copy runs, or its name.
        data: text to learn from: a file, a folder, several, a `datasets.Dataset`, or what else
            `TextDataModule` takes as ``train``; or a data module.
        tokenizer: the model's tokenizer; of a vision-language model, its processor, which is
            exported too.
        steps: optimizer steps, for a strategy that learns.
        trainer: more arguments for Lightning's Trainer; its callbacks come after our own, and in
            the place of those of the same class.
        options: more arguments for :class:`SparseCausalLM`: pattern, include, exclude, overrides,
            optimizer, seed, ...

    If it fails, or is interrupted by Ctrl-C, the model has its plain layers and the weights that it
    came with, and can be given again. Nothing is written, and the process's signals, warnings,
    loggers and progress bars are as they were.

    Raises:
        SparsifyError: the input cannot be used.
        KeyboardInterrupt: on Ctrl-C.
    """
    if unknown := options.keys() - OPTIONS:
        raise SparsifyError(
            f"sparsify() has no option {', '.join(sorted(unknown))}; its options are "
            f"{', '.join(sorted(OPTIONS))}. Settings of a strategy are given to its class, as in "
            "sparsify(model, MyStrategy(setting=0.1), ...)"
        )
    # A copy: a strategy may keep state, and its seed is the run's.
    strategy = make_strategy(strategy) if isinstance(strategy, str) else copy.deepcopy(strategy)
    if not isinstance(data, TextDataModule):
        data = TextDataModule(train=data)
    data = copy.copy(data)  # the caller's stays without our tokenizer and Trainer
    data.tokenizer = tokenizer_of(tokenizer)
    check_model(model)
    check_objects(model, data.tokenizer, strategy)
    changes = strategy.effect.changes_base or options.get("permute", NONE) != NONE
    given = _Given(model)
    with quiet(), _restored_on_failure(model, given, changes):
        module, runner = _run(model, strategy, data, tokenizer, steps, trainer or {}, options)
    return Sparsified(model, module, runner, given)


def _run(
    model: PreTrainedModel,
    strategy: SparsityStrategy,
    data: TextDataModule,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    steps: int,
    trainer: Mapping[str, Any],
    options: Mapping[str, Any],
) -> tuple[SparseCausalLM, Trainer]:
    module = SparseCausalLM.from_model(model, tokenizer, strategy, **options)
    callbacks = [plugins(CALLBACKS)[name].load()() for name in CALLBACK_NAMES]
    if trainer.get("enable_progress_bar", True):
        callbacks.append(Progress())
    settings: dict[str, Any] = {
        "max_steps": steps,
        "max_epochs": -1,
        "enable_model_summary": False,
        "gradient_clip_val": 1.0,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": False,
    }
    given = trainer.get("callbacks") or []
    given = [given] if isinstance(given, Callback) else list(given)
    callbacks = [c for c in callbacks if type(c) not in map(type, given)] + given
    runner = Trainer(**settings | dict(trainer) | {"callbacks": callbacks})
    try:
        runner.fit(module, datamodule=data)
    except Interrupted:
        raise KeyboardInterrupt from None
    return module, runner


class _Given:
    """Knows which of a model's Parameters are learned, which of its parts recompute activations,
    and what is in training mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # Transformers keeps in this attribute whether a part of a model is recomputed in backward.
        self._flags = [
            (module, name, getattr(module, name))
            for module in model.modules()
            for name in ("training", "gradient_checkpointing")
            if hasattr(module, name)
        ]
        self._learned = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def put_back(self) -> None:
        for module, flag, value in self._flags:
            setattr(module, flag, value)
        for parameter, requires_grad in self._learned:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None


@contextmanager
def _restored_on_failure(model: PreTrainedModel, given: _Given, weights: bool) -> Iterator[None]:
    """If the block fails, put back the model's layers, and how it was given.

    Args:
        model: the model.
        given: of this model.
        weights: put back the values of weights too, which takes a copy of them.
    """
    if masked_layers(model):
        yield  # it is refused, and stays as an earlier run left it
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    values = [(p, p.detach().clone()) for p in model.parameters()] if weights else []
    try:
        yield
    except BaseException:
        put_back(model, modules)
        given.put_back()
        for parameter, kept in values:
            parameter.data = kept
        raise
