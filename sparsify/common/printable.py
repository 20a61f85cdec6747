"""Prints text from files so that a terminal shows its control characters and never obeys them."""

import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# The characters of category Cf that change the direction of text. The others join letters.
DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
LAYOUT = frozenset("\n\t")


def _obeyed(char: str) -> bool:
    if char in LAYOUT:
        return False
    category = unicodedata.category(char)
    # Cs are halves of surrogate pairs, which cannot even be encoded.
    return category in ("Cc", "Cs", "Zl", "Zp") or char in DIRECTIONS


def is_printable(text: str) -> bool:
    """Whether a terminal shows every character of the text and obeys none."""
    return not any(map(_obeyed, text))


def printable(text: str) -> str:
    r"""The text with control characters written out, as ``\x1b``; newlines and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(ascii(char)[1:-1] if _obeyed(char) else char for char in text)


class SafeConsole(Console):
    """A console that adds styles itself, but takes none from the text that it prints."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as the base class does, which by itself removes only some escape sequences."""
        super().print(*(printable(o) if isinstance(o, str) else o for o in objects), **options)

    def on_broken_pipe(self) -> None:
        """Leave it to the command line, which ends quietly; the base class would exit with 1."""
        raise BrokenPipeError
