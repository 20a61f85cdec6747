"""The orders of a model's channels as files hold them: which model they are for, and which one
they make of it.

In an export they stand in ``sparsity_permutation.json``, as lists of numbers. They are no
safetensors file, as some servers read every such file in a folder as weights.

Shapes: C channels of a part.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsify.common.errors import SparsifyError
from sparsify.common.files import read_json
from sparsify.common.replace import whole_file
from sparsify.common.seal import content_hash
from sparsify.models.layer_names import family
from sparsify.models.permutable import permutable
from sparsify.models.permutation import inverse, permute

FILE = "sparsity_permutation.json"
SCHEMA = "sparsify.permutation/1"


@dataclass(frozen=True, eq=False)
class Permutation:
    """Orders of channels, and the hashes of the models before and after.

    Attributes:
        orders: int64 ``[C]`` by part: new channel i is old channel [i].
        base_hash: hash of the Parameters of the model that they are for.
        permuted_hash: hash of those of the model that they make.
    """

    orders: Mapping[str, Tensor]
    base_hash: str
    permuted_hash: str

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the orders; the same for a model in any type."""
        return content_hash({name: order.tolist() for name, order in self.orders.items()})

    def describe(self) -> dict[str, Any]:
        """What records say: the parts, with ``*`` for numbers, and the digest."""
        return {"parts": sorted({family(name) for name in self.orders}), "sha256": self.digest}

    def to_dict(self) -> dict[str, Any]:
        """The content in JSON values."""
        return {
            "schema": SCHEMA,
            "base": self.base_hash,
            "permuted": self.permuted_hash,
            "orders": {name: order.tolist() for name, order in self.orders.items()},
        }

    @classmethod
    def from_dict(cls, content: Any, source: object) -> "Permutation":
        """Read what :meth:`to_dict` made.

        Args:
            content: JSON values, which somebody may have edited.
            source: where they come from, for messages.

        Raises:
            SparsifyError: they are no orders.
        """
        try:
            if content["schema"] != SCHEMA:
                raise ValueError(f"its schema is {content['schema']!r} and must be {SCHEMA!r}")
            orders = {str(name): _order(name, o) for name, o in content["orders"].items()}
            return cls(orders, str(content["base"]), str(content["permuted"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise SparsifyError(
                f"{source}: no readable orders of channels ({reason}); export the model again"
            ) from error

    def check_base(self, base_hash: str, source: str) -> None:
        """Refuse orders that were made for another model.

        Args:
            base_hash: the hash of this one, before its channels are permuted.
            source: where the orders come from, for the message.
        """
        if base_hash != self.base_hash:
            raise SparsifyError(
                f"{source}: its orders of channels are for a base model with hash "
                f"{self.base_hash[:12]}, and this one's is {base_hash[:12]}; load the model that "
                "they were made for, in the type that it had then"
            )

    def write(self, folder: Path) -> None:
        """Write the file of an exported folder."""
        with whole_file(folder / FILE) as file:
            file.write(json.dumps(self.to_dict(), separators=(",", ":")).encode())

    def apply(self, model: PreTrainedModel) -> None:
        """Put the model's channels into these orders, in place; errors as of ``permute``."""
        _permute(model, self.orders)

    def undo(self, model: PreTrainedModel) -> None:
        """Put the channels of a model in these orders back, in place, bit for bit."""
        _permute(model, inverse(self.orders))


def _permute(model: PreTrainedModel, orders: Mapping[str, Tensor]) -> None:
    parts, reasons = permutable(model)
    for name in orders:
        if name not in parts:
            why = f": {reasons[name]}" if name in reasons else ""
            raise SparsifyError(
                f"the channels of {name!r} cannot be permuted in this {type(model).__name__}{why}; "
                "give the model that the orders were made for"
            )
    permute(model, parts, orders)


def _order(name: object, numbers: Any) -> Tensor:
    whole = isinstance(numbers, list) and all(type(number) is int for number in numbers)
    if not whole or sorted(numbers) != list(range(len(numbers))):
        raise ValueError(f"{name!r} is no list that holds each number from 0 on once")
    return torch.tensor(numbers, dtype=torch.int64)


def read_permutation(path: Path) -> Permutation:
    """Read the orders of an exported folder, or of their file.

    Raises:
        SparsifyError: there is no such file, or it is damaged.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise SparsifyError(
            f"{file}: there is no such file; an export has one if its run had --model.permute"
        )
    return Permutation.from_dict(read_json(file), file)


def permutation_of(folder: Path) -> Permutation | None:
    """The orders of an exported folder; None if it was made without."""
    return read_permutation(folder) if (folder / FILE).is_file() else None


def check_same_order(
    one: Permutation | None, other: Permutation | None, first: str, second: str
) -> None:
    """Refuse masks of models whose channels are in different orders.

    Args:
        one: the orders of the first.
        other: those of the second; None for none.
        first: the name of the first in the message.
        second: of the second.

    Raises:
        SparsifyError: they differ.
    """
    digests = ["none" if p is None else p.digest[:12] for p in (one, other)]
    if digests[0] != digests[1]:
        raise SparsifyError(
            f"{first} has channels in the order {digests[0]}, and {second} {digests[1]}; masks are "
            "of one order: give --model.permute the export whose orders both shall have, or masks "
            "that were made without"
        )
