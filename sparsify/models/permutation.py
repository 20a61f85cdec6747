"""Orders of a model's channels that change nothing of what it computes.

The rows of one layer and the columns of the next can be put in another order together, at no cost
when the model runs: docs/permute.md. Only the columns' order decides which weights share a
group of N:M.

Shapes: C channels of a part, O out, I in, E experts, K places of one channel in a Parameter.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from sparsify.common.errors import SparsifyError

Kind: TypeAlias = Literal["mlp", "heads", "residual"]


@dataclass(frozen=True, eq=False)
class Place:
    """Where a part's channels are in one Parameter.

    Attributes:
        parameter: its name among the model's Parameters.
        axis: which of its axes they are on.
        at_KC: their indices there; each of the K rows is moved by the same order.
        reads: whether they are the inputs of a layer.
        stacked: whether the first axis counts experts, each with channels of its own: then indices
            are those into experts and ``axis`` together, experts first.
    """

    parameter: str
    axis: int
    at_KC: Tensor
    reads: bool
    stacked: bool

    def sources(self, order_C: Tensor, length: int) -> Tensor:
        """For each of ``length`` indices, the one whose content comes there."""
        found = torch.arange(length)
        found[self.at_KC] = self.at_KC[:, order_C]
        return found


@dataclass(frozen=True, eq=False)
class Part:
    """Channels that can be put in another order together.

    Attributes:
        name: the module that holds them, such as ``model.layers.0.mlp``, or ``residual``.
        kind: ``mlp``, ``heads`` (values and outputs of attention) or ``residual``.
        size: how many channels.
        runs: into how many equal runs they are divided; a channel stays within its run. KV heads,
            or experts; otherwise 1.
        inputs: linear layers, and stacks of experts, whose inputs they are, by qualified name: the
            layers whose groups change. Layers that stay dense, as the output head, are among them.
        places: where they are in the model's Parameters.
    """

    name: str
    kind: Kind
    size: int
    runs: int
    inputs: tuple[str, ...]
    places: tuple[Place, ...]

    def columns(self, name: str, order_C: Tensor, inputs: int) -> Tensor:
        """The order of the columns of one of ``self.inputs``: new column i is old column [i].

        Args:
            name: the layer.
            order_C: the order of the channels: new channel i is old channel [i].
            inputs: how many inputs the layer has (I).

        Returns:
            ``[I]``; for a stack whose experts have channels of their own ``[E, I]``.
        """
        for place in self.places:
            if place.reads and place.parameter in (name, f"{name}.weight"):
                if not place.stacked:
                    return place.sources(order_C, inputs)
                return place.sources(order_C, self.runs * inputs).view(self.runs, inputs) % inputs
        raise SparsifyError(
            f"part {self.name!r} holds no inputs of {name!r}; give one of: {', '.join(self.inputs)}"
        )

    def check(self, order: Tensor) -> None:
        """Refuse what is no order of these channels.

        Raises:
            SparsifyError: it has another length, is no permutation, or leaves a run.
        """
        what = f"the order of {self.name!r}"
        if order.shape != (self.size,) or order.dtype not in (torch.int32, torch.int64):
            raise SparsifyError(
                f"{what} is {order.dtype} {list(order.shape)}; it must be {self.size} integers, "
                "one for each channel; find it for this model"
            )
        if not torch.equal(order.sort().values.cpu(), torch.arange(self.size, dtype=order.dtype)):
            raise SparsifyError(
                f"{what} names a channel twice or out of range; each of 0 to {self.size - 1} must "
                "stand in it once; use torch.randperm or argsort"
            )
        length = self.size // self.runs
        at = (order.cpu() // length != torch.arange(self.size) // length).nonzero()
        if len(at):
            raise SparsifyError(
                f"{what} takes channel {int(order[at[0]])} to place {int(at[0])}, in another run; "
                f"each of {self.runs} runs of {length} channels must keep its own; permute each "
                "run by itself"
            )


def inverse(orders: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The orders that undo these."""
    return {name: order.argsort() for name, order in orders.items()}


@torch.no_grad()
def permute(model: nn.Module, parts: Mapping[str, Part], orders: Mapping[str, Tensor]) -> None:
    """Put channels of a model in other orders, in place: new channel i is old channel ``order[i]``.

    Values are moved and not changed, so that :func:`inverse` gives the model back bit for bit.

    Args:
        model: the model; its Parameters stay the same objects.
        parts: its parts by name, as ``permutable`` finds them.
        orders: an order ``[C]`` by part.

    Raises:
        SparsifyError: a name is none of ``parts``, or an order is wrong; nothing was moved.
    """
    for name, order in orders.items():
        if name not in parts:
            raise SparsifyError(
                f"{name!r} is no part that can be permuted; the model's are: {', '.join(parts)}"
            )
        parts[name].check(order)
    parameters = dict(model.named_parameters())
    for name, order in orders.items():
        for place in parts[name].places:
            _move(parameters[place.parameter].data, place, order.cpu())


def _move(values: Tensor, place: Place, order_C: Tensor) -> None:
    """Move channels within a Parameter's values."""
    length = values.shape[place.axis]
    if not place.stacked:
        sources = place.sources(order_C, length)
        values.copy_(values.index_select(place.axis, sources.to(values.device)))
        return
    sources_EI = place.sources(order_C, len(values) * length).view(len(values), length) % length
    for matrix, sources in zip(values, sources_EI.to(values.device), strict=True):
        matrix.copy_(matrix.index_select(place.axis - 1, sources))
