"""What a budget is asked for, as the command line says it."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sparsify.common.errors import SparsifyError
from sparsify.masking.overrides import DENSE
from sparsify.masking.pattern import NMPattern

Pattern = NMPattern | None
"""None leaves a layer dense."""

Unit = Literal["layer", "module", "block"]
PATTERNS = (DENSE, "6:8", "2:4", "1:4")
SIZES = {"": 1, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
LIMITS = ("max_perplexity_ratio", "kept", "bytes", "milliseconds")


@dataclass(frozen=True)
class Goal:
    """A limit, and what may be chosen to meet it.

    Attributes:
        patterns: those that a unit may have, densest first.
        name: which of :data:`LIMITS` is given.
        limit: its value; of a size in bytes.
        unit: what gets one pattern.
        windows: of validation text, in which one unit's change is measured; whole choices are
            measured in up to four times as many.
        rounds: how often changes are measured again around the best choice so far.
        tokens: of a layer's input, at which its times are compared.
    """

    patterns: tuple[Pattern, ...]
    name: str
    limit: float
    unit: Unit = "layer"
    windows: int = 32
    rounds: int = 1
    tokens: int = 1

    @classmethod
    def parse(
        cls,
        patterns: Sequence[str],
        limits: dict[str, float | str | None],
        unit: Unit,
        windows: int,
        rounds: int,
        tokens: int,
    ) -> "Goal":
        """Read the options of the command.

        Raises:
            SparsifyError: there is not exactly one limit; or a value is out of its range.
        """
        found = sorted(
            {_pattern(text) for text in patterns}, key=lambda p: p.density if p else 1, reverse=True
        )
        if len(found) < 2:
            raise SparsifyError(
                f"patterns {' '.join(patterns)}: there is nothing to choose between; give two or "
                f"more, such as --patterns {' '.join(PATTERNS)}"
            )
        given = {name: value for name, value in limits.items() if value is not None}
        if len(given) != 1:
            raise SparsifyError(
                f"{' and '.join(f'--{name}' for name in given) or 'no budget'} given; give exactly "
                f"one of {', '.join(f'--{name}' for name in LIMITS)}"
            )
        ((name, value),) = given.items()
        limit = _size(value) if name == "bytes" else float(value)
        least = 1.0 if name == "max_perplexity_ratio" else 0.0
        if not least < limit < math.inf or (name == "kept" and limit > 1):
            raise SparsifyError(
                f"{name}={value}; it must be above {least:g}"
                + (" and at most 1, a share" if name == "kept" else "")
                + f": give for instance --{name} {1.1 if least else 0.5}"
            )
        for word, number, lowest in (
            ("windows", windows, 2),
            ("rounds", rounds, 0),
            ("tokens", tokens, 1),
        ):
            if number < lowest:
                raise SparsifyError(f"{word}={number}; give --{word} {lowest} or more")
        return cls(tuple(found), name, limit, unit, windows, rounds, tokens)


def _pattern(text: str) -> Pattern:
    if text == DENSE:
        return None
    try:
        return NMPattern.parse(text)
    except SparsifyError as error:
        raise SparsifyError(f"patterns: {error}, or {DENSE!r}") from error


def _size(value: float | str) -> float:
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([A-Za-z]*)\s*", str(value))
    try:
        if match is not None and match[2] in SIZES:
            return float(match[1]) * SIZES[match[2]]
    except ValueError:
        pass
    raise SparsifyError(
        f"bytes={value}: expected a number and a unit of {', '.join(filter(None, SIZES))}: give "
        "for instance --bytes 12MiB"
    )
