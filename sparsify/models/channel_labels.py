"""What is known of channels by their labels: which are the same, and which may change places.

A field is an array of labels; -1 stands for none.
"""

import torch
from torch import Tensor


class Labels:
    """What a trace learned of each label.

    Attributes:
        edges: pairs of arrays of labels; those at one index are the same channel.
        colours: a hash by label; channels that may change places have the same.
        pinned: by label, whether it must stay.
        read: by label, whether a layer sums over it: whether it is of the layer's inputs.
        mixed: by label, whether tokens are mixed by a product, as attention does.
        why: by label, the number in ``steps`` of the operation that last told it from others.
        steps: the names of operations.
    """

    def __init__(self, count: int) -> None:
        self.edges: list[tuple[Tensor, Tensor]] = []
        self.steps: list[str] = []
        self.colours = torch.zeros(count, dtype=torch.int64)
        self.pinned, self.read, self.mixed = torch.zeros(3, count, dtype=torch.bool)
        self.why = torch.full((count,), -1)

    def unite(self, a: Tensor, b: Tensor) -> Tensor:
        """The same channels under two labels; returns one for each element."""
        a, b = torch.broadcast_tensors(a, b)
        both = (a >= 0) & (b >= 0)
        self.edges.append((a[both], b[both]))
        either = torch.where(a >= 0, a, b)
        if not bool(both.all()):
            self.pin(torch.where(both, -1, either))
        return either

    def colour(self, field: Tensor, axes: list[int]) -> None:
        """Tell channels apart by where they are along axes."""
        at = torch.zeros((), dtype=torch.int64)
        for axis in axes:
            shape = [-1 if a == axis else 1 for a in range(field.ndim)]
            at = at * field.shape[axis] + torch.arange(field.shape[axis]).view(shape)
        key = at + (len(self.steps) << 32)
        key = (key ^ (key >> 15)) * -7046029254386353131
        key = (key ^ (key >> 29)) * -4658895280553007687
        seen = field >= 0
        self.colours.index_add_(0, field[seen], key.expand_as(field)[seen])
        if any(field.shape[a] > 1 for a in axes):
            self.why[field[seen]] = len(self.steps) - 1

    def pin(self, field: Tensor) -> None:
        labels = field[field >= 0]
        self.pinned[labels] = True
        self.why[labels] = len(self.steps) - 1

    def roots(self) -> Tensor:
        """By label, the least label of the same channel."""
        least = torch.arange(len(self.pinned))
        if not self.edges:
            return least
        a, b = (torch.cat(side) for side in zip(*self.edges, strict=True))
        while True:
            low = torch.minimum(least[a], least[b])
            new = least.scatter_reduce(0, least[a], low, "amin")
            new = new.scatter_reduce(0, least[b], low, "amin")
            new = new[new]
            if torch.equal(new, least):
                return least
            least = new
