"""Marks functions whose work depends on the shapes of their arguments alone, not on the values.

A plan runs real code on tensors without values, where each operation costs as much as any other.
Most of them would be in loops over rows, columns or pieces; a plan runs a marked function once for
each shape, and replays what it took.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")
Replay = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_replay: Replay | None = None


def by_shape(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function without a graph that takes tensors and plain values, changes none of them,
    and returns new tensors.
    """

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        if _replay is None:
            return function(*args, **options)
        return cast(R, _replay(function, args, options))

    return call


@contextmanager
def replaying(replay: Replay) -> Iterator[None]:
    """Within this context ``replay(function, arguments, options)`` takes the place of every call of
    a marked function from outside of such functions.
    """
    global _replay
    before, _replay = _replay, replay
    try:
        yield
    finally:
        _replay = before
