"""Counts the live bytes of tensors that hold no values.

A fake tensor has a type, a shape and a storage of so many bytes, and no memory behind it. Under a
:class:`Ledger` real code runs on fake tensors, and the ledger notes when every storage is made and
when it goes. What a tensor was for is known only later (that it became a gradient, say), so that
labels are read when all is over.

Bytes that an operation takes and gives back inside itself are not seen.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsify.common.errors import SparsifyError

TEMPORARY = "temporary"
_ATEN = torch.ops.aten


class Peak(NamedTuple):
    """Live bytes at one moment.

    Attributes:
        parts: bytes by label.
    """

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class _Event(NamedTuple):
    storage: int
    change: int  # bytes
    phase: str


class Ledger(TorchDispatchMode):
    """Runs what is inside on fake tensors of the CPU and keeps account of them.

    No value is known, so a check passes: ``all`` and ``equal`` read as true, any other truth value
    as false, an integer as zero and a real number as one, and nothing is found that is not zero.

    Attributes:
        phase: the name under which events are noted now.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = "start"
        self._events: list[_Event] = []
        self._labels: dict[int, str] = {}
        self._numbers: dict[int, int] = {}  # a live storage's, by its id
        self._sizes: dict[int, int] = {}
        # Some real tensors meet the fake ones: token ids, and tables that code keeps between runs.
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> "Ledger":
        self._fake.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._fake.__exit__(*error)
        if isinstance(error[1], DataDependentOutputException | DynamicOutputShapeException):
            raise SparsifyError(
                f"the memory of {self.phase} cannot be planned: {error[1].func} depends on the "
                "values of tensors, and a plan knows only their shapes"
            ) from error[1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _ATEN._local_scalar_dense.default:
            return _read(args[0])
        if func is _ATEN.equal.default:
            return True
        if func is _ATEN._grouped_mm.default:  # torch's own rule refuses float32, the CPU does not
            offsets = args[2] if len(args) > 2 else (kwargs or {}).get("offs")
            shape = _grouped_shape(args[0], args[1], offsets)
            func, args, kwargs = _ATEN.new_empty.default, (args[0], shape), {}
        if func is _ATEN.nonzero.default:
            return args[0].new_empty(0, args[0].ndim, dtype=torch.long)
        if func is _ATEN.is_set_to.default:
            return _storage_key(args[0]) == _storage_key(args[1])
        if func.overloadpacket in (_ATEN.index, _ATEN.index_put_) and _by_mask(args[1]):
            if func.overloadpacket is _ATEN.index_put_:
                return args[0]
            args = args[0], _nothing_found(args[1])
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is _ATEN.all:
            out.reads_true = True
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return out

    @contextmanager
    def aside(self) -> Iterator[list[_Event]]:
        """Note what is made and dropped inside apart from all else, and yield these events."""
        before, self._events = self._events, []
        try:
            yield self._events
        finally:
            self._events = before

    def _note(self, tensor: Tensor) -> int:
        """The number of the tensor's storage, which may be new."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._numbers:
            number = len(self._sizes)
            self._numbers[key] = number
            self._sizes[number] = storage.nbytes()
            self._events.append(_Event(number, storage.nbytes(), self.phase))
            weakref.finalize(storage, self._forget, key)
        return self._numbers[key]

    def _forget(self, key: int) -> None:
        number = self._numbers.pop(key)
        self._events.append(_Event(number, -self._sizes[number], self.phase))

    def label(self, label: str, tensors: Iterable[Tensor | None]) -> None:
        """Say what tensors are; the first label of a storage holds."""
        for tensor in tensors:
            if tensor is not None:
                self._labels.setdefault(self._note(tensor), label)

    def label_living(self, label: str) -> None:
        """Say what all tensors are that live now and have no label."""
        for number in self._numbers.values():
            self._labels.setdefault(number, label)

    def living(self) -> dict[str, int]:
        """The bytes that live now, by label."""
        live: Counter[str] = Counter()
        for number in self._numbers.values():
            live[self._labels.get(number, TEMPORARY)] += self._sizes[number]
        return dict(live)

    def peaks(self) -> dict[str, Peak]:
        """The moment of the most live bytes of every phase."""
        live: Counter[str] = Counter()
        found: dict[str, Peak] = {}
        total, most = 0, dict[str, int]()
        for storage, change, phase in self._events:
            live[self._labels.get(storage, TEMPORARY)] += change
            total += change
            if total > most.get(phase, -1):
                most[phase] = total
                found[phase] = Peak(dict(live))
        return found


def _read(tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return bool(getattr(tensor, "reads_true", False))
    return 1.0 if tensor.is_floating_point() else 0


def _grouped_shape(a: Tensor, b: Tensor, offsets: Tensor | None) -> list[int]:
    """Of the products of the groups of `a` and `b`; a 2-D one is divided by `offsets`."""
    groups = [len(offsets)] if offsets is not None and a.ndim == b.ndim == 2 else []
    groups = [len(a)] if a.ndim == b.ndim == 3 else groups
    return [*groups, a.shape[-2], b.shape[-1]]


def _by_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(i is not None and i.dtype == torch.bool for i in indices)


def _nothing_found(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices in the place of masks, by which nothing is taken."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            found.append(index)
        else:
            found += [index.new_empty(0, dtype=torch.long) for _ in range(index.ndim)]
    return found


def _storage_key(tensor: Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()
    return id(storage), tensor.storage_offset(), tensor.shape, tensor.stride()


def live_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    storages = {}
    for tensor in tensors:
        if tensor is not None:
            storage = tensor.untyped_storage()
            storages[cast(Any, storage)._cdata] = storage.nbytes()
    return sum(storages.values())
