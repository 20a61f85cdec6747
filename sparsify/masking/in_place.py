"""An optimizer for as many numbers as a model has weights: one buffer, and no gradients.

Other optimizers wait for the gradients of all layers, hold two more tensors for each, and then make
a step. This one takes the gradient of a tensor as soon as backward has found it, adds it to the
tensor's momentum, and drops it. Micro-batches of one step add to the same momentum, so that they
take no memory either.

Who owns what: the Parameter is its owner's, the momentum is the optimizer's state. Backward changes
the momentum only, ``step`` the Parameter. Replicas (DDP) average gradients after backward; there
they are kept until ``step``. Sharded ranks (FSDP2) have averaged a gradient before it is taken.

Shapes: O rows of a tensor, E elements of a row.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from sparsify.common.errors import SparsifyError
from sparsify.common.ranks import processes
from sparsify.masking import noise
from sparsify.masking.layer import local_rows
from sparsify.masking.sharded_rows import first_row

# Round this many numbers at once: some 200 MB of temporary tensors.
AT_ONCE = 1 << 24
# The hooks of the newest optimizer of each Parameter; an older one must not take its gradients.
_HOOKS: Any = WeakTensorKeyDictionary()


class InPlaceMomentum(Optimizer):
    """Moves each tensor along its momentum v, divided by the root mean square of v over the tensor:
    ``v = momentum v + gradient``, then ``x = x - lr v / rms(v)``.

    So ``lr`` is how far the numbers of a tensor move in a step, as a root mean square, whatever the
    size of its gradients; to clip them would change nothing. Numbers with large gradients move
    first, unlike under Adam, which gives all of them steps of about one size.

    Parameters in bfloat16 are rounded up or down at random, by chances that keep the mean: a step
    is often smaller than half of such a number's last place, and would be lost in rounding to the
    nearest.

    Args:
        params: Parameters of one dimension or more, or groups of them.
        lr: the learning rate, in the Parameters' unit.
        momentum: the share of v that is left after a step.
        seed: of the random rounding.

    Raises:
        SparsifyError: a setting is out of range.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.01, momentum: float = 0.9, seed: int = 0
    ) -> None:
        if not lr >= 0 or not 0 <= momentum < 1:
            raise SparsifyError(
                f"lr={lr}, momentum={momentum}; the rate must not be negative, and the momentum "
                "lies in [0, 1): 0.9 is usual"
            )
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self._seed = seed
        self._begun: set[nn.Parameter] = set()  # those whose momentum is that of the coming step
        for parameter in self._parameters():
            start = torch.zeros_like(parameter, requires_grad=False)
            self.state[parameter] = {"step": 0, "momentum": start}
            if handle := _HOOKS.pop(parameter, None):
                handle.remove()
            if isinstance(parameter, DTensor) or processes() == 1:
                _HOOKS[parameter] = parameter.register_post_accumulate_grad_hook(_take(self))

    @torch.no_grad()
    def take(self, parameter: Any) -> None:
        """Add a gradient, if there is one, to the momentum, and drop it."""
        if parameter.grad is None:
            return
        momentum = local_rows(self.state[parameter]["momentum"])
        if parameter not in self._begun:
            self._begun.add(parameter)
            momentum.mul_(self._group_of(parameter)["momentum"])
        momentum.add_(local_rows(parameter.grad))
        parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take one step; the closure runs the micro-batches."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for parameter in self._parameters():
            self.take(parameter)
        begun = {n: p for n, p in enumerate(self._parameters()) if p in self._begun}
        self._begun.clear()
        sizes = self._sizes(list(begun.values()))
        for (number, parameter), size in zip(begun.items(), sizes, strict=True):
            self._move(parameter, self._group_of(parameter)["lr"] / size, number)
        return loss

    def _sizes(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """The root mean square of each momentum, over all ranks' rows; 0-d fp32, never zero."""
        norms = [
            torch.linalg.vector_norm(local_rows(self.state[p]["momentum"]), dtype=torch.float64)
            for p in parameters
        ]
        squares = torch.stack(norms).square() if norms else torch.zeros(0)
        if norms and isinstance(first := parameters[0], DTensor):
            dist.all_reduce(squares, group=first.device_mesh.get_group())
        tiny = torch.finfo(torch.float32).tiny
        means = (s / p.numel() for s, p in zip(squares.unbind(), parameters, strict=True))
        return [mean.sqrt().clamp(min=tiny).float() for mean in means]

    def _move(self, parameter: nn.Parameter, rate: Tensor, number: int) -> None:
        """Subtract the momentum times a rate, 0-d; ``number`` tells Parameters apart."""
        state = self.state[parameter]
        values, momentum = local_rows(parameter), local_rows(state["momentum"])
        if values.dtype != torch.bfloat16:
            values.addcmul_(momentum, rate.to(values.dtype), value=-1)
        elif values.numel():
            row0 = first_row(parameter)
            key = noise.fold("rounding", self._seed, state["step"], number)
            values, momentum = (x.view(len(x), -1) for x in (values, momentum))
            count = max(1, AT_ONCE // values.shape[1])
            for start in range(0, len(values), count):
                rows = slice(start, start + count)
                moved = values[rows].float().addcmul_(momentum[rows], rate, value=-1)
                values[rows] = noise.round_to_bfloat16(moved, key, row0 + start)
        state["step"] += 1

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _group_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        return next(g for g in self.param_groups if any(p is parameter for p in g["params"]))


def _take(optimizer: InPlaceMomentum) -> Callable[[Tensor], None]:
    """The hook of a Parameter; it does nothing once the optimizer is gone."""
    owner = weakref.ref(optimizer)

    def take(parameter: Tensor) -> None:
        if (alive := owner()) is not None:
            alive.take(parameter)

    return take
