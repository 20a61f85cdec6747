"""What a run refuses before it begins, because it would end in wrong numbers."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsify.common.errors import SparsifyError
from sparsify.masking.layer import MaskedConv1D, MaskedLinear
from sparsify.masking.strategy import SparsityStrategy
from sparsify.models.base import EMBEDDED


def check_precision(precision: str | None) -> None:
    """Refuse Lightning's true precisions, which convert what is learned too, and scaled losses,
    which scale gradients that not all strategies take.

    Args:
        precision: the Trainer's; None without one.
    """
    if precision not in (None, "32-true", "bf16-mixed"):
        raise SparsifyError(
            f"precision {precision}: what is learned stays in float32 and losses are not "
            "scaled; give --trainer.precision bf16-mixed, or --model.dtype bfloat16 for the "
            "base weights"
        )


def check_dtype(strategy: SparsityStrategy, dtype: torch.dtype) -> None:
    """Refuse to train weights of 16 bits: a step is often smaller than half of their last place,
    and is lost.
    """
    if strategy.weights in ("trained", "proxy") and dtype != torch.float32:
        raise SparsifyError(
            f"dtype {str(dtype).removeprefix('torch.')}: {type(strategy).__name__} trains "
            "weights and needs them in float32; give --model.dtype float32, and "
            "--trainer.precision bf16-mixed for the speed of bfloat16"
        )


def check_objects(model: object, tokenizer: object, strategy: object) -> None:
    """Refuse what is no model, tokenizer or strategy object, such as a class or a name."""
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
    """Refuse to train on no batch, which would end without a word, and to validate never; warn
    where no step is as large as was asked for.

    Args:
        trainer: Lightning's.
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
        model: its name or path.
        embedded: whether the text is the embedded one.
        verb: what would be done to the masks.
    """
    if model != EMBEDDED and embedded:
        raise SparsifyError(
            f"no text was named to {verb} the masks of {model!r} from, and the "
            "embedded text is made for the embedded model; give --data.train FILE"
        )


def check_shards(
    strategy: SparsityStrategy, layers: Mapping[str, MaskedLinear], ranks: int, parts: int
) -> None:
    """Refuse what cannot be sharded over ``ranks``, and layers split in ``parts`` too."""
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
    if strategy.weights != "trained":
        return
    for layer_name, layer in layers.items():
        if isinstance(layer, MaskedConv1D):  # FSDP2 shards the first dimension
            raise SparsifyError(
                f"{layer_name}: its weight is stored as [in, out], so that {ranks} ranks would "
                "each hold a part of every group, which a strategy that trains weights cannot "
                "take; run one process"
            )
