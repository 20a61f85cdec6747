"""Counts the work of real code: operations of matrix products, and bytes that are moved.

A product of ``[A, B]`` and ``[B, C]`` is 2 A B C floating-point operations. Attention is counted as
its products over all T x T scores, and in backward as five of them, since fused kernels make the
scores again. A causal kernel may skip up to half of that.

Every operation is counted as reading all its inputs and writing all its outputs once, as eager
torch does at least. Arithmetic that is no product is not counted, a factorisation's included.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_ATEN = torch.ops.aten


@dataclass
class Work:
    """What was done.

    Attributes:
        flops: floating-point operations of matrix products, by the type of what is multiplied.
        moved: bytes that all operations read and write.
    """

    flops: Counter[str] = field(default_factory=Counter)
    moved: int = 0

    def times(self, count: float) -> "Work":
        """The same, so many times."""
        flops = {dtype: round(number * count) for dtype, number in self.flops.items()}
        return Work(Counter(flops), round(self.moved * count))

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.moved + other.moved)


class WorkCounter(TorchDispatchMode):
    """Counts what runs inside, by phase.

    Args:
        phase: names the phase of this moment.

    Attributes:
        found: the work of each phase.
    """

    def __init__(self, phase: Callable[[], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._phase = phase
        self._instead: str | None = None
        self.found: dict[str, Work] = {}

    @contextmanager
    def count_as(self, phase: str) -> Iterator[None]:
        """Count under another phase's name."""
        before, self._instead = self._instead, phase
        try:
            yield
        finally:
            self._instead = before

    @contextmanager
    def aside(self) -> Iterator[dict[str, Work]]:
        """Count what runs inside apart from all else, and yield it."""
        before, self.found = self.found, {}
        try:
            yield self.found
        finally:
            self.found = before

    def add(self, work: Work) -> None:
        """Count work as if it were done now."""
        phase = self._instead or self._phase()
        self.found[phase] = self.found.get(phase, Work()) + work

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        work = self.found.setdefault(self._instead or self._phase(), Work())
        if (count := _formula(func.overloadpacket)) is not None:
            work.flops[_type(args)] += count(*args, **kwargs, out_val=out)
        if not func.is_view and func.overloadpacket not in _NOTHING:
            work.moved += _moved(func, args, kwargs, out)
        return out


@cache
def _formula(packet: Any) -> Callable[..., int] | None:
    """Counts the operations of a product; None if it is none. In place it takes as many."""
    name = packet.__name__
    plain = getattr(_ATEN, name[:-1], packet) if name.endswith("_") else packet
    return _OWN.get(plain) or flop_registry.get(plain)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return _scores(query, key) * (query.shape[-1] + value.shape[-1])


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    return _scores(query, key) * (3 * query.shape[-1] + 2 * value.shape[-1])


def _scores(query: Tensor, key: Tensor) -> int:
    """Twice the number of scores, which is what one product with them takes a channel."""
    return 2 * query.shape[:-1].numel() * key.shape[-2]


def _grouped(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Groups of a 2-D operand share its rows, its columns or what is summed over."""
    groups = len(a) if a.ndim == b.ndim == 3 else 1
    return 2 * groups * a.shape[-2] * a.shape[-1] * b.shape[-1]


# Products of which torch knows no formula: attention as fake tensors of a CPU run it, and those of
# experts.
_OWN: dict[Any, Callable[..., int]] = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
if hasattr(_ATEN, "_grouped_mm"):
    _OWN[_ATEN._grouped_mm] = _grouped
_NOTHING = {  # they take memory, and leave it as it is
    _ATEN.empty,
    _ATEN.empty_like,
    _ATEN.empty_strided,
    _ATEN.new_empty,
    _ATEN.new_empty_strided,
    _ATEN._unsafe_view,
    _ATEN.set_,
}
_OVERWRITE = {_ATEN.copy_, _ATEN.fill_, _ATEN.zero_}


def _type(args: Any) -> str:
    first = next(value for value in args if isinstance(value, Tensor))
    return str(first.dtype).removeprefix("torch.")


def _moved(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    """Bytes of all that is read and written. What is changed in place is both, unless it is
    overwritten; if it is returned as well, that is not another writing.
    """
    schema = func._schema
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    overwrites = func.overloadpacket in _OVERWRITE
    read = written = 0
    for argument in schema.arguments:
        size = sum(map(_bytes, tree_leaves(given.get(argument.name))))
        writes = argument.alias_info is not None and argument.alias_info.is_write
        written += size if writes else 0
        read += 0 if writes and (overwrites or argument.kwarg_only) else size  # out=
    made = out if len(schema.returns) > 1 else (out,)
    for returned, value in zip(schema.returns, made, strict=False):
        if returned.alias_info is None:
            written += sum(map(_bytes, tree_leaves(value)))
    return read + written if written else 0  # else only its shape, say, was asked for


def _bytes(value: Any) -> int:
    """Of a tensor; of one that repeats its memory, that memory's."""
    if not isinstance(value, Tensor):
        return 0
    return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())
