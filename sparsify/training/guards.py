"""What a run refuses before it begins, because it would end in wrong numbers."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsify.common.errors import SparsifyError
from sparsify.masking.layer import MaskedLinear
from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.strategy import SparsityStrategy
from sparsify.models.base import EMBEDDED
from sparsify.models.perplexity import NotFinite, PerplexityMeter, Score

ADVICE = (
    "give --model.dtype float32 or bfloat16 if the base is in float16, which ends at 65504; "
    "otherwise leave that layer dense with --model.exclude, or look at the base model"
)


def check_precision(precision: str | None) -> None:
    """Refuse two kinds of precision. Lightning's true ones also convert the tensors that learn;
    those that scale losses scale gradients too, which not all strategies support.

    Args:
        precision: the Trainer's precision; None without a Trainer.
    """
    if precision not in (None, "32-true", "bf16-mixed"):
        raise SparsifyError(
            f"precision {precision}: what is learned stays in the type of its maskers and losses "
            "are not scaled; give --trainer.precision bf16-mixed, or --model.dtype bfloat16 for "
            "the base weights"
        )


def check_dtype(masked: MaskedModel) -> None:
    """Refuse to train 16-bit weights, unless their maskers declare that they learn in such a type.
    An update is often smaller than half of a weight's last place; rounding then loses it.
    """
    strategy, dtype = masked.strategy, masked.base.model.dtype
    if not strategy.effect.trains_weights:
        return
    if any(dtype not in (torch.float32, masker.learned_dtype) for masker in masked.maskers):
        raise SparsifyError(
            f"dtype {str(dtype).removeprefix('torch.')}: {type(strategy).__name__} trains "
            "weights and needs them in float32; give --model.dtype float32, and "
            "--trainer.precision bf16-mixed for the speed of bfloat16"
        )


def check_objects(model: object, tokenizer: object, strategy: object) -> None:
    """Refuse arguments that are no model, tokenizer or strategy object, such as a class or name."""
    for word, value, wanted, example in (
        ("model", model, PreTrainedModel, "AutoModelForCausalLM.from_pretrained(NAME)"),
        ("tokenizer", tokenizer, PreTrainedTokenizerBase, "AutoTokenizer.from_pretrained(NAME)"),
        ("strategy", strategy, SparsityStrategy, "'NAME', or an object such as NAME()"),
    ):
        if not isinstance(value, wanted):
            raise SparsifyError(
                f"{word} is {str(value)[:80]!r}; it must be an object of {wanted.__name__}, not "
                f"its class or something else: give {example}"
            )


def check_limits(trainer: Any, epoch_batches: Callable[[], int]) -> None:
    """Refuse to train on no batch (Lightning would end without a message) or never to validate.
    Warn if every optimizer step has fewer micro-batches than the user asked for.

    Args:
        trainer: Lightning's Trainer.
        epoch_batches: counts the batches of an epoch on this rank.
    """
    if trainer.limit_train_batches == 0:
        raise SparsifyError(
            "limit_train_batches 0 leaves no batch to train on; give a whole number from 1, or a "
            "share of the batches above 0, as --trainer.limit_train_batches"
        )
    every = trainer.val_check_interval
    if isinstance(every, int) and trainer.check_val_every_n_epoch and trainer.enable_validation:
        batches = epoch_batches()
        if every > batches:
            raise SparsifyError(
                f"val_check_interval {every} is more than the {batches} batches of an epoch; give "
                f"at most {batches}, or --trainer.check_val_every_n_epoch null to count over epochs"
            )
    accumulated = trainer.accumulate_grad_batches
    if accumulated == 1 or getattr(trainer.datamodule, "endless", True):
        return
    if accumulated > (batches := epoch_batches()):
        rank_zero_warn(
            f"accumulate_grad_batches is {accumulated}, and an epoch has {batches} batches: "
            f"Lightning ends a step with its epoch, so that each is of {batches}; add text, or "
            "lower --trainer.accumulate_grad_batches"
        )


def check_text(model: str, embedded: bool, verb: str) -> None:
    """Refuse the embedded text for another model than the embedded one.

    Args:
        model: the model's name or path.
        embedded: whether the text is the embedded one.
        verb: what would be done to the masks, for the message.
    """
    if model != EMBEDDED and embedded:
        raise SparsifyError(
            f"no text was named to {verb} the masks of {model!r} from, and the "
            "embedded text is made for the embedded model; give --data.train FILE"
        )


def check_shards(
    strategy: SparsityStrategy, layers: Mapping[str, MaskedLinear], ranks: int, parts: int
) -> None:
    """Refuse a strategy or layer that cannot be sharded over ``ranks``, or split in ``parts``."""
    name = type(strategy).__name__
    if parts > 1:
        raise SparsifyError(
            f"tensor_parallel_size={parts}: layers are sharded by rows over data-parallel "
            "ranks, not split for tensor parallelism; give --trainer.strategy fsdp"
        )
    if any(p.requires_grad for p in strategy.parameters()):
        raise SparsifyError(
            f"{name} learns Parameters of its own, outside the model, whose gradients sharded "
            "ranks do not exchange; keep them in its maskers, or give --trainer.strategy ddp"
        )
    for layer_name, layer in layers.items():
        if layer.experts is not None and layer.experts % ranks:
            raise SparsifyError(
                f"{layer_name}: {layer.experts} experts do not divide into {ranks} ranks, which "
                "hold whole experts each; give a number of devices that divides them"
            )
    if not strategy.effect.trains_base:
        return
    for layer_name, layer in layers.items():
        if layer.transposed:  # FSDP2 shards the first dimension
            raise SparsifyError(
                f"{layer_name}: its weight is stored as [in, out], so that {ranks} ranks would "
                "each hold a part of every group, which a strategy that trains weights cannot "
                "take; run one process"
            )


RATES = "--model.optimizer.init_args.lr, or of a strategy's own optimizer --model.strategy.lr"


class FiniteWatch:
    """Remembers, on the device, the optimizer step since which the loss is not finite."""

    def __init__(self) -> None:
        self._since: Tensor | None = None

    def watch(self, loss: Tensor, trainer: Any) -> None:
        """Record a 0-d loss; read the record only when Lightning fetches metrics anyway."""
        step, every = trainer.global_step, trainer.log_every_n_steps
        if self._since is None:
            self._since = torch.full((), -1, device=loss.device)
        starts = ~loss.isfinite() & (self._since < 0)
        self._since = torch.where(starts, step, self._since)
        if every and (step + 1) % every == 0:
            self.check(trainer)

    def check(self, trainer: Any) -> None:
        """Stop the run on every rank if the loss of any rank was not finite.

        Raises:
            SparsifyError: it was not; the message names the step.
        """
        since = -1 if self._since is None else int(self._since)
        if not trainer.strategy.reduce_boolean_decision(since >= 0, all=False):
            return
        when = f"since optimizer step {since}" if since >= 0 else "on another rank"
        raise SparsifyError(
            f"the loss is not finite {when}; checkpoints from before it are intact: resume from "
            f"one with a lower learning rate ({RATES}), or look at that step's data"
        )


def check_learned(module: nn.Module, trainer: Any) -> None:
    """Stop the run on every rank if a learned tensor of any rank is not finite. The losses do not
    show this for the last step, whose update no forward pass has used.

    Raises:
        SparsifyError: one is not; the message names the tensor and the step.
    """
    learned = {name: p for name, p in module.named_parameters() if p.requires_grad}
    odd = not_finite(learned)
    if not trainer.strategy.reduce_boolean_decision(odd is not None, all=False):
        return
    raise SparsifyError(
        f"after optimizer step {trainer.global_step}, {odd or 'what another rank learned'} is not "
        "finite; checkpoints from before it are intact: resume from one with a lower learning rate "
        f"({RATES})"
    )


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is not finite; None if all are finite."""
    local = {name: getattr(t, "to_local", lambda t=t: t)() for name, t in tensors.items()}
    flags = [t.isfinite().all() for t in local.values() if t.is_floating_point()]
    names = [name for name, t in local.items() if t.is_floating_point()]
    if not flags:
        return None
    device = flags[0].device
    odd = torch.stack([flag.to(device) for flag in flags]).logical_not().tolist()
    return next((name for name, bad in zip(names, odd, strict=True) if bad), None)


def finite_scores(meter: PerplexityMeter, module: Any) -> dict[str, Score]:
    """The meter's scores.

    Args:
        meter: holds the losses of ``module``.
        module: the LightningModule, to find the layer where a value first is not finite.

    Raises:
        SparsifyError: a score is not finite; the message names the text, the window and the layer.
            Or a text has no target.
    """
    try:
        return meter.scores()
    except NotFinite as error:
        if error.tokens_T is None:
            raise
        where = origin(module, error.tokens_T)
        raise SparsifyError(f"{error}: {where}; {ADVICE}") from error


@torch.no_grad()
def origin(module: Any, tokens_T: Tensor) -> str:
    """Says in words where in the hard-masked model a value first is not finite.

    Every rank of a sharded run must call this with the same tokens.

    Args:
        module: the LightningModule.
        tokens_T: token ids of one window.
    """
    model = module.lm
    if (name := not_finite(dict(model.named_parameters()))) is not None:
        return f"the tensor {name} holds some"
    found: list[str] = []

    def look(name: str, inputs: Any, output: Any) -> None:
        if not found and all(map(_finite, _tensors(inputs))):
            found.extend(name for t in _tensors(output) if not _finite(t))

    with ExitStack() as stack:
        for name, part in model.named_modules():
            if name:
                hook = part.register_forward_hook(lambda _, i, o, name=name: look(name, i, o))
                stack.callback(hook.remove)
        with module.measuring():
            model(input_ids=tokens_T[None].to(module.device), use_cache=False)
    if not found:
        return "every layer's output is finite, and the loss of these is not"
    return f"it begins in the output of {found[0]}, whose input is finite"


def _tensors(value: Any) -> list[Tensor]:
    parts = value if isinstance(value, tuple | list) else (value,)
    return [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
