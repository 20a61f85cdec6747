"""Reads YAML as people mean it: ``2:4`` is text, not the base-60 number 124 of YAML 1.1."""

import json
import re
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

MODE = "sparsify"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Loads YAML's safe types, less times and dates, and reads ``1e-3`` as a number."""


# jsonargparse's own rules for numbers, less numbers in base 60.
_INT = re.compile(r"^[-+]?(?:0b[0-1_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.[0-9_]+(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_TAG = "tag:yaml.org,2002:"
_REPLACED = [_TAG + kind for kind in ("int", "float", "timestamp")]
_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in _REPLACED]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))


def load(text: str) -> Any:
    """Parse YAML.

    Args:
        text: the content of a file, or one value of the command line.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    value = _jsonargparse_load(text)  # leaves texts that only look like mappings
    return value if isinstance(value, str) else yaml.load(text, Loader=_Loader)  # noqa: S506  # safe types alone


def dumps(value: Any) -> str:
    r"""A value of JSON's types as one line of ASCII that :func:`load` reads.

    JSON writes a character above U+FFFF as two escapes, which YAML refuses; ``\U`` is YAML's own.
    """
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(r"[^ -~]", lambda found: f"\\U{ord(found[0]):08x}", text)


_jsonargparse_load = get_loader("yaml")
# Under a name of its own, so that other parsers in this process keep their YAML.
set_loader(MODE, load, (yaml.YAMLError,))
