"""Tables of settings, made from the strategies themselves; ``fill_pages.py`` writes them."""

import inspect
import re
from typing import Literal, get_args, get_origin, get_type_hints

from docstring_parser import parse

from sparsify.masking.registry import find_strategy
from sparsify.masking.schedule import Schedule
from sparsify.masking.strategy import SparsityStrategy

NONE = "It has no settings of its own.\n"
HEAD = """Each is given as `--model.strategy.NAME VALUE`.

| name | default | meaning |
|---|---|---|
"""


def settings_table(name: str) -> str:
    """A strategy's settings, their defaults and what their docstring says, as Markdown.

    Raises:
        SparsifyError: there is no strategy of this name.
        KeyError: its docstring leaves out a setting.
    """
    strategy = find_strategy(name)
    parameters = list(inspect.signature(strategy).parameters.values())
    if not parameters:
        return NONE
    meanings = {p.arg_name: p.description or "" for p in parse(strategy.__doc__ or "").params}
    choices = _choices(strategy)
    rows = [
        f"| `{p.name}` | {_default(p.default)} | "
        f"{_text(meanings[p.name])}{choices.get(p.name, '')} |"
        for p in parameters
    ]
    return HEAD + "\n".join(rows) + "\n"


def _choices(strategy: type[SparsityStrategy]) -> dict[str, str]:
    """What a setting can be, where its type lists it."""
    hints = get_type_hints(strategy.__init__)
    return {
        name: " One of " + ", ".join(f"`{choice}`" for choice in get_args(hint)) + "."
        for name, hint in hints.items()
        if get_origin(hint) is Literal
    }


def _default(value: object) -> str:
    if isinstance(value, Schedule):
        return f"`{value.start:g}` to `{value.end:g}`, {value.shape}"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "`null`" if value is None else f"`{value}`"


def _text(docstring: str) -> str:
    """A description as a cell: in one line, code and names marked as in Markdown."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"``\1``", " ".join(docstring.split()))
    text = re.sub(r"\bNone\b", "`null`", text).replace("``", "`").replace("|", "\\|")
    return text[:1].upper() + text[1:]
