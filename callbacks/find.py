"""Finds a callback among a trainer's."""

from typing import Any, TypeVar

from lightning.pytorch import Callback

C = TypeVar("C", bound=Callback)


def find(trainer: Any, kind: type[C]) -> C:
    """The trainer's callback of a class, or a new one of that class if it has none."""
    return next((c for c in trainer.callbacks if isinstance(c, kind)), None) or kind()
