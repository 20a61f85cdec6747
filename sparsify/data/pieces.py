"""Cuts a long text into pieces to tokenise one by one, at places where no token changes."""

import logging
from collections.abc import Callable, Iterator

from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger("sparsify")

LONGEST = 2**22  # characters; a tokenizer needs some 200 bytes of memory for each
CONTEXT = 256  # characters on each side of a cut, by which it is judged whether tokens change
NEARBY = 8  # so many line ends, then so many spaces are tried first
TRIED = 4096  # so many other places are tried after them, in a second or two

Encode = Callable[[list[str]], list[list[int]]]


def pieces(text: str, encode: Encode, where: str) -> Iterator[str]:
    """Cuts a text into pieces of at most `LONGEST` characters.

    Args:
        text: one document.
        encode: returns the token ids of each text in a list.
        where: the document's name, for the warning.
    """
    start, warned = 0, False
    while len(text) - start > LONGEST:
        least, most = start + LONGEST // 2, start + LONGEST
        first: int | None = None
        for place in _places(text, least, most):
            first = place if first is None else first
            if _equal(text, place, encode):
                end = place
                break
        else:
            end = most if first is None else first
            if not warned:
                _warn(where, end)
                warned = True
        yield text[start:end]
        start = end
    yield text[start:]


def _equal(text: str, place: int, encode: Encode) -> bool:
    before, after = text[place - CONTEXT : place], text[place : place + CONTEXT]
    whole, left, right = encode([before + after, before, after])
    return whole == left + right


def _places(text: str, least: int, most: int) -> Iterator[int]:
    """Places to cut, best first: the last line ends, the last spaces, then any white space."""
    for space in ("\n", " "):
        end = most
        for _ in range(NEARBY):
            end = text.rfind(space, least, end)
            if end < 0:
                break
            # A newline stays with its line, and a space with the word after it.
            yield end + 1 if space == "\n" else end
    tried = 0
    for end in range(most - 1, least - 1, -1):
        if text[end].isspace():
            yield end
            yield end + 1
            tried += 2
            if tried >= TRIED:
                return


@rank_zero_only
def _warn(where: str, place: int) -> None:
    log.warning(
        "%s: the document is cut at character %d to save the tokenizer's memory, and no place "
        "nearby leaves its tokens as they were; split it yourself to choose the place",
        where,
        place,
    )
