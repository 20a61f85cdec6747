"""An optimizer for as many numbers as a model has weights: one buffer, and no gradients.

Other optimizers wait for the gradients of all layers, hold two more tensors for each, and then make
a step. This one takes the gradient of a tensor as soon as backward has found it, adds it to the
tensor's momentum, and drops it. Micro-batches of one step add to the same momentum, so that they
take no memory either.

Who owns what: the Parameter is its owner's, the momentum is the optimizer's state. Backward changes
the momentum only, ``step`` the Parameter. Replicas (DDP) average gradients after backward; there
they are kept until ``step``. Sharded ranks (FSDP2) have averaged a gradient before it is taken.

Shapes: O rows of a tensor, E elements of a row, K random sums of a row.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
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
SUMS = 16  # random sums of a row's gradients whose squares tell the gradients' size
FLOOR = 0.01  # a row's second moment counts as at least this share of the mean of all rows
TINY = torch.finfo(torch.float32).tiny  # what divides by zero divides by this
# The hooks of the newest optimizer of each Parameter; an older one must not take its gradients.
_HOOKS: Any = WeakTensorKeyDictionary()


class InPlaceMomentum(Optimizer):
    """Adam (Kingma and Ba, 2015, arXiv 1412.6980), with one second moment for each row.

    With both averages corrected for their start at zero, as Adam's are::

        v = momentum v + (1 - momentum) gradient
        s = decay s + (1 - decay) mean(gradient**2)      one number a row
        x = x - lr v / sqrt(s)

    So the first step is ``lr``, as a root mean square over a row, whatever the size of its
    gradients: to clip them would change nothing. Later steps are as large as the steps' gradients
    agree: ``lr`` if they are equal, a quarter of it if they are noise and the momentum is 0.9.
    In a row, numbers with large gradients move first; under Adam all move by about one size. Rows
    with next to no gradients move less: s is taken as at least 0.01 of its mean over all rows.

    Micro-batches of a step cannot be squared one by one, and their sum is not held. So 16 sums of
    each row are, with signs that are drawn anew for every step: the square of such a sum is on
    average the sum of the squares (Achlioptas, 2003, doi 10.1016/S0022-0000(03)00025-4).

    Parameters in bfloat16, and their momentum, are rounded up or down at random, by chances that
    keep the mean: a step, or the gradient of one micro-batch of many, is often smaller than half of
    such a number's last place, and would be lost in rounding to the nearest.

    Args:
        params: Parameters whose first dimension is O, or groups of them.
        lr: the learning rate, in the Parameters' unit.
        momentum: the share of v that is left after a step.
        decay: the share of s that is left after a step.
        seed: of the random rounding and of the signs.

    Raises:
        SparsifyError: a setting is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        momentum: float = 0.9,
        decay: float = 0.99,
        seed: int = 0,
    ) -> None:
        if not lr >= 0 or not 0 <= momentum < 1 or not 0 <= decay < 1:
            raise SparsifyError(
                f"lr={lr}, momentum={momentum}, decay={decay}; the rate must not be negative, "
                "momentum and decay lie in [0, 1): 0.9 and 0.99 are usual"
            )
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})
        self._seed = seed
        # The random sums [O, K] of the coming step's gradients, of those that have got some; fp32.
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._signs: dict[tuple[int, int, torch.device], Tensor] = {}
        self._taken: dict[nn.Parameter, int] = {}  # how many gradients these sums hold
        self._numbers = {parameter: n for n, parameter in enumerate(self._parameters())}
        for parameter in self._parameters():
            momentum_like = torch.zeros_like(parameter, requires_grad=False)
            square = torch.zeros(len(parameter), dtype=torch.float32, device=parameter.device)
            self.state[parameter] = {"step": 0, "momentum": momentum_like, "square": square}
            if handle := _HOOKS.pop(parameter, None):
                handle.remove()
            if isinstance(parameter, DTensor) or processes() == 1:
                _HOOKS[parameter] = parameter.register_post_accumulate_grad_hook(_take(self))

    @torch.no_grad()
    def take(self, parameter: Any) -> None:
        """Add a gradient, if there is one, to the momentum, and drop it."""
        if parameter.grad is None:
            return
        gradient = _rows(parameter.grad)
        sums = gradient.float() @ self._signs_for(parameter, gradient)
        if first := parameter not in self._sums:
            self._sums[parameter], self._taken[parameter] = sums, 0
        else:
            self._sums[parameter] += sums
        self._add(parameter, gradient, self._group_of(parameter)["momentum"] if first else 1.0)
        self._taken[parameter] += 1
        parameter.grad = None

    def _add(self, parameter: nn.Parameter, gradient: Tensor, left: float) -> None:
        """Add a gradient to the momentum, of which a share is left."""
        state, row0 = self.state[parameter], first_row(parameter)
        momentum = _rows(state["momentum"])
        if momentum.dtype != torch.bfloat16:
            momentum.mul_(left).add_(gradient)
            return
        key = noise.fold("momentum", self._seed, state["step"], self._numbers[parameter])
        count = self._taken[parameter]
        for rows in _pieces(momentum):
            moved = momentum[rows].float().mul_(left).add_(gradient[rows])
            momentum[rows] = noise.dither_to_bfloat16(moved, key, count, row0 + rows.start)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take one step; the closure runs the micro-batches."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for parameter in self._parameters():
            self.take(parameter)
        moving = [p for p in self._parameters() if p in self._sums]
        squares = _mean_squares({p: self._sums[p] for p in moving})
        for of_step in (self._sums, self._signs, self._taken):
            of_step.clear()
        for parameter, square in zip(moving, squares, strict=True):
            self._move(parameter, self._rate(parameter, square))
        return loss

    def _signs_for(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        """1 and -1 at random, ``[E, K]``; the same for all gradients of a step."""
        step, columns = self.state[parameter]["step"], gradient.shape[1]
        place = (step, columns, gradient.device)
        if place not in self._signs:
            key = noise.fold("signs", self._seed, step)
            uniform = noise.uniform(key, columns, SUMS, device=gradient.device)
            self._signs[place] = uniform.sub_(0.5).sign_()
        return self._signs[place]

    def _rate(self, parameter: nn.Parameter, square: Tensor) -> Tensor:
        """Count a step and its mean squares; by what to multiply the momentum, fp32 ``[O]``."""
        state, group = self.state[parameter], self._group_of(parameter)
        state["step"] += 1
        # In place of v the sum v / (1 - momentum) is held, to which gradients add as they are.
        share = (1 - group["momentum"]) / (1 - group["momentum"] ** state["step"])
        state["square"].lerp_(square, 1 - group["decay"])
        found = state["square"] / (1 - group["decay"] ** state["step"])
        found = found.clamp(min=FLOOR * found.mean()).sqrt_().clamp_(min=TINY)
        return group["lr"] * share / found

    def _move(self, parameter: nn.Parameter, rate: Tensor) -> None:
        """Subtract the momentum times a rate a row."""
        state, row0 = self.state[parameter], first_row(parameter)
        values, momentum = _rows(parameter), _rows(state["momentum"])
        rate = rate[row0 : row0 + len(values), None]
        if values.dtype != torch.bfloat16:
            values.addcmul_(momentum, rate.to(values.dtype), value=-1)
            return
        key = noise.fold("rounding", self._seed, state["step"], self._numbers[parameter])
        for rows in _pieces(values):
            moved = values[rows].float().addcmul_(momentum[rows], rate[rows], value=-1)
            values[rows] = noise.round_to_bfloat16(moved, key, row0 + rows.start)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _group_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        return next(g for g in self.param_groups if any(p is parameter for p in g["params"]))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of every optimizer; but mean squares keep their type, not that of the Parameter."""
        super().load_state_dict(state_dict)
        for number, parameter in enumerate(self._parameters()):
            held = state_dict["state"][number]["square"]  # one for all rows in older checkpoints
            rows = held.to(parameter.device, torch.float32).expand(len(parameter))
            self.state[parameter]["square"] = rows.clone()


def _rows(tensor: Tensor) -> Tensor:
    """The rows ``[O, E]`` that this process holds."""
    own = local_rows(tensor)
    return own.view(len(own), math.prod(own.shape[1:]))


def _pieces(rows_OE: Tensor) -> Iterator[slice]:
    """Some rows at a time, so that copies in fp32 stay small; none of an empty tensor."""
    count = max(1, AT_ONCE // max(1, rows_OE.shape[1]))
    for start in range(0, len(rows_OE) if rows_OE.numel() else 0, count):
        yield slice(start, start + count)


def _mean_squares(sums: dict[nn.Parameter, Tensor]) -> list[Tensor]:
    """The mean squares of each row's gradients, fp32 ``[O]``, of whole tensors: all ranks' rows."""
    found = []
    for parameter, own in sums.items():
        squares, row0 = own.new_zeros(len(parameter)), first_row(parameter)
        squares[row0 : row0 + len(own)] = own.square().mean(1) * len(parameter) / parameter.numel()
        found.append(squares)
    if sums and isinstance(first := next(iter(sums)), DTensor):
        together = torch.cat(found)
        dist.all_reduce(together, group=first.device_mesh.get_group())
        found = list(together.split([len(squares) for squares in found]))
    return found


def _take(optimizer: InPlaceMomentum) -> Callable[[Tensor], None]:
    """The hook of a Parameter; it does nothing once the optimizer is gone."""
    owner = weakref.ref(optimizer)

    def take(parameter: Tensor) -> None:
        if (alive := owner()) is not None:
            alive.take(parameter)

    return take
