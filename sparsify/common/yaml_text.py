"""YAML as people mean it: ``2:4`` is a text, where YAML 1.1 reads the sexagesimal number 124."""

import re
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

MODE = "sparsify"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """YAML's safe types, without times of day and dates, and with ``1e-3`` as a number."""


# jsonargparse's own rules for numbers, less those of base sixty.
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
    """What a text of YAML says.

    Args:
        text: a file's, or one value of the command line.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    value = _jsonargparse_load(text)  # which knows texts that only look like mappings
    return value if isinstance(value, str) else yaml.load(text, Loader=_Loader)  # noqa: S506  # safe types alone


_jsonargparse_load = get_loader("yaml")
# A mode of its own: other parsers of this process keep theirs.
set_loader(MODE, load, (yaml.YAMLError,))
