"""Finds strategies by short name or import path, and callbacks: both are entry points."""

import difflib
import importlib
import os
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from sparsify.common.errors import SparsifyError
from sparsify.masking.strategy import SparsityStrategy

STRATEGIES = "sparsify.strategies"
CALLBACKS = "sparsify.callbacks"

# At each event our callbacks run in this order, then those of other packages by name; Lightning
# moves those that save checkpoints to the end. Callbacks whose state a checkpoint holds run before
# the one that saves it: otherwise their saved state would be a step behind. For the same reason
# callbacks that add to the result run before the one that writes it.
CALLBACK_ORDER = ("annealing", "history", "masks", "speed", "output", "wandb", "stop", "checkpoint")


def plugins(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group by lower-case name: callbacks in the order in which they run,
    others sorted by name.
    """
    found = sorted(_installed(group), key=lambda point: point.name)
    if group == CALLBACKS:
        places = {name: place for place, name in enumerate(CALLBACK_ORDER)}
        found.sort(key=lambda point: places.get(point.name.lower(), len(places)))
    return {point.name.lower(): point for point in found}


@cache
def _installed(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group; finding them reads the metadata of every package there is."""
    return tuple(entry_points(group=group))


def own_plugins(group: str) -> dict[str, str]:
    """The import paths of this package's own entry points in a group, by lower-case name."""
    package = __name__.partition(".")[0]
    return {
        name: point.value.replace(":", ".")
        for name, point in plugins(group).items()
        if point.value.startswith(f"{package}.")
    }


def find_strategy(name: str) -> type[SparsityStrategy]:
    """Find a strategy class by its short name, in any case, or by its import path.

    Raises:
        SparsifyError: nothing has this name, it cannot be imported, or it is no strategy.
    """
    known = plugins(STRATEGIES)
    if name.lower() in known:
        found: Any = known[name.lower()].load()
    elif "." in name:
        found = _import(name)
    else:
        close = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise SparsifyError(
            f"there is no strategy {name!r}; {hint}There are {', '.join(known)}; your own is named "
            "by its import path, for instance my_package.MyStrategy"
        )
    if not (isinstance(found, type) and issubclass(found, SparsityStrategy)):
        raise SparsifyError(
            f"{name!r} is not a strategy: it must be a subclass of sparsify.SparsityStrategy"
        )
    return found


def import_path(cls: type[SparsityStrategy]) -> str:
    """The path by which ``--strategy`` can name a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def strategy_name(cls: type[SparsityStrategy]) -> str:
    """The short name of a strategy class; its class name if it is no entry point."""
    return short_name(import_path(cls))


def short_name(path: str) -> str:
    """The short name of the strategy class at this import path, or else its class name."""
    known = ((name, point.value.replace(":", ".")) for name, point in plugins(STRATEGIES).items())
    return next((name for name, value in known if value == path), path.rpartition(".")[2])


def allow_current_folder() -> None:
    """Make modules in the current folder importable, for classes that the user names. The folder
    is searched last, so that no file in it hides an installed module.
    """
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)


def _import(path: str) -> Any:
    allow_current_folder()
    module, _, attribute = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SparsifyError(
            f"{path!r} cannot be imported ({error}); its module must be installed or lie in the "
            "current folder or PYTHONPATH"
        ) from error


def make_strategy(name: str, **options: Any) -> SparsityStrategy:
    """Build a strategy from its name; errors as :func:`find_strategy`."""
    return find_strategy(name)(**options)
