"""Packages that import their public names only when somebody asks for them (PEP 562).

PyTorch, Lightning and Transformers take ten seconds to import, and commands that need none of them
should not wait for that.
"""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def lazy(
    package: str, where: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the ``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: its name.
        where: the module of every public name. The package's own modules need no entry.
    """

    def get(name: str) -> Any:
        module = f"{package}.{name}"
        if name in where:
            value = getattr(import_module(where[name]), name)
        elif not name.startswith("_") and find_spec(module) is not None:
            value = import_module(module)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)  # so that Python does not ask again
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *where})

    return get, names
