"""Gives single layers another pattern than the rest of the model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from sparsify.common.errors import SparsifyError
from sparsify.masking.pattern import NMPattern

DENSE = "dense"


@dataclass(frozen=True)
class Overrides:
    """Other patterns for some layers.

    Attributes:
        patterns: by glob on qualified names, in the order in which they were given; None leaves a
            layer dense.
    """

    patterns: Mapping[str, NMPattern | None] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: Mapping[str, str] | None) -> "Overrides":
        """Read globs with ``'N:M'`` or ``'dense'``.

        Raises:
            SparsifyError: a pattern is neither.
        """
        return cls({glob: _parse(glob, text) for glob, text in (given or {}).items()})

    def glob(self, name: str) -> str | None:
        """The glob that decides about a layer: the last that matches its name."""
        return next((g for g in reversed(list(self.patterns)) if fnmatchcase(name, g)), None)

    def pattern(self, name: str, default: NMPattern) -> NMPattern | None:
        """The pattern of a layer; None if it stays dense."""
        glob = self.glob(name)
        return default if glob is None else self.patterns[glob]

    def unused(self, names: Iterable[str]) -> str | None:
        """The first glob that matches none of these names."""
        names = list(names)
        return next(
            (g for g in self.patterns if not any(fnmatchcase(name, g) for name in names)), None
        )

    def describe(self) -> dict[str, str]:
        """The overrides as the user gave them."""
        return {glob: str(pattern or DENSE) for glob, pattern in self.patterns.items()}


def _parse(glob: str, text: str) -> NMPattern | None:
    if text == DENSE:
        return None
    try:
        return NMPattern.parse(text)
    except SparsifyError as error:
        raise SparsifyError(f"overrides {glob!r}: {error}, or {DENSE!r}") from error
