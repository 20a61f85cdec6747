"""Follows the channels of every Parameter through one run of a model.

Each index of each axis of each Parameter has a label, and each tensor that the model computes has
fields: labels of its elements, in its own shape, with size 1 where they do not vary. Views,
slices and concatenations are done to the fields as to the tensor. Where two labels meet in one
sum or product they are the same channel. Where an operation tells channels apart (another head of
a batched product, another value of a constant), they get another colour. An operation that is not
known pins its channels.

Shapes of a product: N batch, m and n outer, k inner.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sparsify.models.channel_labels import Labels

# What a tensor is to the trace: its shape, and its fields.
Traced: TypeAlias = tuple[Sequence[int], list[Tensor]]

_SAME = {"alias", "detach", "clone", "_to_copy", "lift_fresh", "contiguous"}
_JOINS = {"cat", "stack"}
_MOVES = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand"),
    *("slice", "select", "split", "split_with_sizes", "unbind", "repeat", "unfold", "flip"),
    *("index", "index_select", "gather", "constant_pad_nd", "reshape"),
}
_FILLS = {"zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "scalar_tensor"}
_FILLS |= {"zeros_like", "ones_like", "full_like"}
_EMPTY = {"empty", "new_empty", "empty_like"}
# The number of the argument that names the axes.
_REDUCES = {"mean": 1, "sum": 1, "var": 1, "std": 1, "amax": 1, "linalg_vector_norm": 2}
_ALONG = {"_softmax": 1, "_safe_softmax": 1, "_log_softmax": 1}
_NORMS = {"native_layer_norm", "_fused_rms_norm"}


_MOST = 4  # fields of a tensor


class ChannelTrace(TorchDispatchMode):
    """Follows a model's channels while it is active.

    Attributes:
        axes: (name of the Parameter, axis, first label, number of labels), in order.
        labels: what was learned of them.
        used: the ``id`` of each tensor that was an argument.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.axes: list[tuple[str, int, int, int]] = []
        self.used: set[int] = set()
        # The tensors are kept, so that no other gets their id.
        self._fields: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self._filled: dict[int, Tensor] = {}
        count = 0
        for name, parameter in model.named_parameters():
            fields = []
            for axis, size in enumerate(parameter.shape):
                self.axes.append((name, axis, count, size))
                shape = [size if a == axis else 1 for a in range(parameter.ndim)]
                if size > 1:
                    fields.append(torch.arange(count, count + size).view(shape))
                count += size
            self._fields[id(parameter)] = (parameter, fields)
        self.labels = Labels(count)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.used |= {id(t) for t in tensors}
        name = func._schema.name.removeprefix("aten::")
        self.labels.steps.append(name)
        if name.endswith("_"):
            for written in (args[0], args[0]._base):
                self._filled.pop(id(written), None)
        if name in _FILLS or (name in _SAME | _MOVES and id(args[0]) in self._filled):
            self._filled |= {id(t): t for t in tree_leaves(out)}
        elif name not in _EMPTY and any(id(t) in self._fields for t in tensors):
            self._follow(func, name, args, kwargs, tensors, out)
        return out

    def pin(self, tensor: Tensor) -> None:
        """Keep all channels of a tensor where they are."""
        for field in self._traced(tensor)[1]:
            self.labels.pin(field)

    def _traced(self, tensor: Tensor | None) -> Traced:
        if tensor is None or id(tensor) in self._filled:
            return (), []
        return tensor.shape, self._fields.get(id(tensor), (tensor, []))[1]

    def _set(self, tensor: Tensor, fields: list[Tensor]) -> None:
        kept: list[Tensor] = []
        for field in map(_compact, fields):
            if field.numel() > 1 and len(kept) < _MOST:
                kept.append(field)
            else:  # one channel by itself, or one of too many
                self.labels.pin(field)
        self._filled.pop(id(tensor), None)
        self._fields.pop(id(tensor), None)
        if kept:
            self._fields[id(tensor)] = (tensor, kept)

    def _follow(
        self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], out: Any
    ) -> None:
        first = self._traced(args[0]) if isinstance(args[0], Tensor) else ((), [])
        # A view that is written to would have to tell the tensor that it is a view of.
        if name.endswith("_") and args[0]._is_view():
            for tensor in tensors:
                self.pin(tensor)
        elif name in _SAME:
            self._set(out, first[1])
        elif name in _MOVES | _JOINS:
            self._move(func, name, args, kwargs, tensors, out)
        elif name == "embedding":
            wide = [f[0] for f in first[1] if f.shape[1] > 1]
            self._set(out, [f.view(*[1] * (out.ndim - 1), -1) for f in wide])
        elif name == "copy_":
            self._set(out, self._join([self._traced(args[1])], out.ndim))
        elif name in ("mm", "bmm", "_grouped_mm"):
            self._set(out, self._product(first, self._traced(args[1]), out.ndim))
        elif name in ("addmm", "baddbmm"):
            product = self._product(self._traced(args[1]), self._traced(args[2]), out.ndim)
            self._set(out, self._join([first, (out.shape, product)], out.ndim))
        elif name.startswith("_scaled_dot_product"):
            q, k, v = map(self._traced, args[:3])
            self._attend(q, k, v, out[0])
        elif name in _NORMS:
            axes = [a - len(args[1]) for a in range(len(args[1]))]
            self._reduce(first, axes)
            operands = [self._traced(t) for t in args[:5] if isinstance(t, Tensor)]
            self._set(out[0], self._join(operands, args[0].ndim))
        elif name in _ALONG:
            self._reduce(first, [args[_ALONG[name]]])
            self._set(out, first[1])
        elif name in _REDUCES and (axes := kwargs.get("dim", (*args, *[None] * 3)[_REDUCES[name]])):
            axes = [axes] if isinstance(axes, int) else axes
            kept = self._reduce(first, axes)
            if out.ndim < args[0].ndim:
                kept = [f.squeeze(tuple(axes)) for f in kept]
            self._set(out, kept)
        elif name in ("cumsum", "cumprod") and not any(f.shape[args[1]] > 1 for f in first[1]):
            self._set(out, first[1])
        elif name in ("index_add", "index_add_"):
            shape, fields = self._traced(args[3])
            merged = [1 if a == args[1] % len(shape) else s for a, s in enumerate(shape)]
            for field in fields:
                if field.shape[args[1]] > 1:
                    self.labels.pin(field)
            self._set(out, self._join([first, (merged, fields)], out.ndim))
        elif torch.Tag.pointwise in func.tags and isinstance(out, Tensor):
            self._set(out, self._join([self._traced(t) for t in tensors], out.ndim))
        else:
            for tensor in tensors:
                self.pin(tensor)

    def _move(
        self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], out: Any
    ) -> None:
        """Do to the fields what is done to the tensor."""
        if name in ("view", "_unsafe_view"):  # the fields have other strides
            func = torch.ops.aten.reshape.default
        if name == "constant_pad_nd":
            args = (args[0], args[1], -1)
        outs = [out] if isinstance(out, Tensor) else list(out)
        results: list[list[Tensor]] = [[] for _ in outs]
        for number in range(max(len(self._traced(t)[1]) for t in tensors)):

            def shadow(value: Any, number: int = number) -> Any:
                if not isinstance(value, Tensor):
                    return value
                shape, fields = self._traced(value)
                if number < len(fields):
                    return fields[number].expand(shape)
                return torch.full((), -1).expand(value.shape) if name in _JOINS else value.cpu()

            moved = func(*tree_map(shadow, args), **kwargs)
            for result, field in zip(results, tree_leaves(moved), strict=True):
                result.append(field)
        for tensor, result in zip(outs, results, strict=True):
            self._set(tensor, result)

    def _join(self, operands: list[Traced], ndim: int) -> list[Tensor]:
        """The fields of an element-wise result."""
        aligned = [
            ([*[1] * (ndim - len(s)), *s], [f.view(*[1] * (ndim - f.ndim), *f.shape) for f in fs])
            for s, fs in operands
        ]
        result: list[Tensor] = []
        for _, fields in aligned:
            for field in fields:
                for i, other in enumerate(result):
                    shared = [a for a in range(ndim) if field.shape[a] > 1 < other.shape[a]]
                    if shared and shared[-1] == max(_last(field), _last(other)):
                        result[i] = self.labels.unite(other, field)
                        break
                    if shared:  # one value for many channels, as a gate of a head
                        short, long = sorted((field, other), key=_last)
                        self.labels.pin(short)
                        self.labels.colour(long, shared)
                        result[i] = long
                        break
                else:
                    result.append(field)
        for shape, fields in aligned:
            for field in result:
                axes = [
                    a
                    for a in range(ndim)
                    if shape[a] > 1 and field.shape[a] > 1 and all(f.shape[a] == 1 for f in fields)
                ]
                if axes:  # values that are no channels vary along them
                    self.labels.colour(field, axes)
        return result

    def _product(self, a: Traced, b: Traced, ndim: int) -> list[Tensor]:
        """The fields of a matrix product ``[N, m, k] @ [N, k, n]``; either may lack N."""
        left, right = ([f if f.ndim == 3 else f[None] for f in t[1]] for t in (a, b))
        inner = [[f for f in left if f.shape[2] > 1], [f for f in right if f.shape[1] > 1]]
        outer = [f for f in left if f.shape[2] == 1] + [f for f in right if f.shape[1] == 1]
        if a[0] and a[0][-1] > 1 and not inner[0] and not inner[1]:
            for field in outer:
                self.labels.mixed[field[field >= 0]] = True
        for fields, own in zip(inner, (left, right), strict=True):
            for field in fields:
                if len(own) > 1:
                    self.labels.read[field[field >= 0]] = True
        for f, g in zip(*inner, strict=False):
            if f.shape[1] > 1 or g.shape[2] > 1:
                self.labels.pin(f)
                self.labels.pin(g)
            self.labels.unite(f[:, 0], g[:, :, 0])
        for f in (*inner[0][len(inner[1]) :], *inner[1][len(inner[0]) :]):
            self.labels.pin(f)  # the other matrix tells them apart
        for f in (*inner[0], *inner[1], *outer):
            if f.shape[0] > 1:
                self.labels.colour(f, [0])
        return [f if ndim == 3 else f[0] for f in outer]

    def _attend(self, q: Traced, k: Traced, v: Traced, out: Tensor) -> None:
        """Scaled dot product attention; one window, ``[1, heads, tokens, channels]``."""
        groups = q[0][1] // k[0][1]
        (qs, ks, vs) = ([f[0] for f in t[1]] for t in (q, k, v))
        ks, vs = (
            [f.repeat_interleave(groups, 0) if f.shape[0] > 1 else f for f in fs] for fs in (ks, vs)
        )
        for field in self._product((q[0], qs), (k[0], [f.mT for f in ks]), 3):
            self.labels.pin(field)
        tokens = (k[0][1], q[0][2], k[0][2])
        self._set(out, [f[None] for f in self._product((tokens, []), (v[0], vs), 3)])

    def _reduce(self, traced: Traced, axes: Sequence[int]) -> list[Tensor]:
        """Sum over axes; returns the fields that the result keeps."""
        kept: list[Tensor] = []
        ndim = len(traced[0])
        summed = {a % ndim for a in axes}
        for field in traced[1]:
            if any(field.shape[a] > 1 for a in summed):
                self.labels.colour(field, [a for a in range(ndim) if a not in summed])
            else:
                kept.append(field)
        return kept


def _compact(field: Tensor) -> Tensor:
    """A field with size 1 where it does not vary."""
    for axis in range(field.ndim):
        if field.shape[axis] > 1 and field.stride(axis) == 0:
            field = field.narrow(axis, 0, 1)
    for axis in range(field.ndim):
        first = field.narrow(axis, 0, min(1, field.shape[axis]))
        if field.shape[axis] > 1 and bool((field == first).all()):
            field = first
    return field


def _last(field: Tensor) -> int:
    """The last axis along which a field varies."""
    return max(a for a, size in enumerate(field.shape) if size > 1)
