"""Plain values that somebody else wrote: which kind they are of, and how a message shows them."""

from collections.abc import Sequence
from typing import Any

TEXT, TABLE, LIST, FLAG = "text", "a table", "a list", "true or false"
COUNT, SECONDS = "a number, whole and not negative", "a number, not negative"
NUMBER, SHARE = "a number", "a number from 0 to 1"
# No run counts or lasts beyond the first; the squares of what is beyond the second overflow.
LARGEST, LARGEST_NUMBER = 2**53, 1e150
_SHOWN = 80


def is_of(kind: str, value: Any) -> bool:
    """Whether a value is of one of the kinds above; none is what is not finite."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    number = (whole or isinstance(value, float)) and abs(value) <= LARGEST_NUMBER
    return {
        TEXT: isinstance(value, str),
        TABLE: isinstance(value, dict),
        LIST: isinstance(value, list),
        FLAG: isinstance(value, bool),
        COUNT: whole and 0 <= value <= LARGEST,
        SECONDS: number and 0 <= value <= LARGEST,
        NUMBER: number,
        SHARE: number and 0 <= value <= 1,
    }[kind]


def short(value: Any) -> str:
    """A value as far as a message can show it."""
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except ValueError:  # Python does not print numbers of thousands of digits
        return f"{type(value).__name__} with a number of thousands of digits"
    return cut(text, _SHOWN)


def cut(text: str, length: int) -> str:
    """The beginning of a text that is longer."""
    return text if len(text) <= length else f"{text[:length]}..."


def first_few(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many there are besides."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
