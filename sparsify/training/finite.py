"""Numbers that are not finite: noticed without waiting for the device, and traced to their origin.

Shapes: B windows, T tokens.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.common.errors import SparsifyError
from sparsify.models.perplexity import NotFinite, PerplexityMeter, Score

ADVICE = (
    "give --model.dtype float32 or bfloat16 if the base is in float16, which ends at 65504; "
    "otherwise leave that layer dense with --model.exclude, or look at the base model"
)


class FiniteWatch:
    """Remembers on the device since which optimizer step the loss is not finite."""

    def __init__(self) -> None:
        self._since: Tensor | None = None

    def watch(self, loss: Tensor, trainer: Any) -> None:
        """Take note of a 0-d loss; look at the note where Lightning fetches metrics anyway."""
        step, every = trainer.global_step, trainer.log_every_n_steps
        if self._since is None:
            self._since = torch.full((), -1, device=loss.device)
        starts = ~loss.isfinite() & (self._since < 0)
        self._since = torch.where(starts, step, self._since)
        if every and (step + 1) % every == 0:
            self.check(trainer)

    def check(self, trainer: Any) -> None:
        """Stop the run on every rank if the loss of one was not finite.

        Raises:
            SparsifyError: it was not; the step is named.
        """
        since = -1 if self._since is None else int(self._since)
        if not trainer.strategy.reduce_boolean_decision(since >= 0, all=False):
            return
        when = f"since optimizer step {since}" if since >= 0 else "on another rank"
        raise SparsifyError(
            f"the loss is not finite {when}; checkpoints from before it are intact: resume from "
            "one with a lower learning rate (--model.optimizer.init_args.lr), or look at that "
            "step's data"
        )


def check_learned(module: nn.Module, trainer: Any) -> None:
    """Stop the run on every rank if something that it has learned is not finite on one: the last
    step's update is not in any loss.

    Raises:
        SparsifyError: it is not; the tensor and the step are named.
    """
    learned = {name: p for name, p in module.named_parameters() if p.requires_grad}
    odd = not_finite(learned)
    if not trainer.strategy.reduce_boolean_decision(odd is not None, all=False):
        return
    raise SparsifyError(
        f"after optimizer step {trainer.global_step}, {odd or 'what another rank learned'} is not "
        "finite; checkpoints from before it are intact: resume from one with a lower learning rate "
        "(--model.optimizer.init_args.lr)"
    )


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a number that is not finite; None if all are."""
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
        meter: has been shown the losses of ``module``.
        module: the LightningModule, to find where a number begins that is not finite.

    Raises:
        SparsifyError: a score is not finite; the text, the window and the layer are named. Or a
            text has no target.
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
    """Where the hard-masked model's first number begins that is not finite, in words.

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
