"""How a model calls its decoder blocks: the arguments, without what the block before returned."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Output:
    """Stands in a call for a tensor that the block before returned.

    Attributes:
        index: which of its tensors, in the order of :func:`tensors_of`.
    """

    index: int


class Call(NamedTuple):
    """The arguments of one call of a block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def map(self, change: Callable[[Any], Any]) -> "Call":
        """The call with every part changed, as :func:`mapped` does."""
        kwargs = {name: mapped(value, change) for name, value in self.kwargs.items()}
        return Call(mapped(self.args, change), kwargs)

    def parts(self) -> list[Any]:
        """What :meth:`map` changes, in its order."""
        found: list[Any] = []
        self.map(found.append)
        return found


class NotReplayable(Exception):
    """The blocks cannot run one by one as they do in the model; the message says why."""


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Change a value, or all parts of a tuple. Other containers are parts: a block may write into
    them, so that they must stay the same objects.
    """
    if type(value) is tuple:
        return tuple(mapped(part, change) for part in value)
    return change(value)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a value or a tuple, in order."""
    parts: list[Any] = []
    mapped(value, parts.append)
    return [part for part in parts if isinstance(part, Tensor)]
