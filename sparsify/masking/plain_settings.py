"""Settings of a strategy, in a form that the record of a run can hold."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn


def plain(value: Any) -> Any:
    """A setting in a form that JSON can hold, the same in every process. Tuples and sets become
    lists, keys become text, an object becomes its class and, if it is a dataclass, its fields.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value)
    kind = value if isinstance(value, type) or hasattr(value, "__qualname__") else type(value)
    path = f"{kind.__module__}.{kind.__qualname__}"
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": path} | {
            field.name: plain(getattr(value, field.name)) for field in fields(value)
        }
    return path


def argument_names(kind: type) -> set[str]:
    """The names of all ``__init__`` arguments of a class and its base classes."""
    makers = (vars(one).get("__init__") for one in kind.__mro__ if issubclass(one, nn.Module))
    return {name for make in makers if make is not None for name in signature(make).parameters}


def is_plain(value: object) -> bool:
    parts = value if isinstance(value, list) else [value]
    return all(isinstance(part, bool | int | float | str) for part in parts)
