"""Removes secrets from settings before they are written to files."""

import re
from argparse import Namespace  # which jsonargparse's is derived from
from itertools import pairwise
from typing import Any

REDACTED = "(redacted)"

# A key is secret if one of its words is in the first list, or if it has a word of the second list
# before "key" or of the third before "token". Words end at any character but letters and digits,
# and before a capital. "token" alone is secret too; in longer names the word before it decides, as
# most of them are a tokenizer's ("eos_token").
# fmt: off
_WORDS = frozenset((
    "password", "passwd", "passphrase", "pwd", "secret", "secrets", "credential", "credentials",
    "authorization", "bearer", "cookie", "apikey", "apitoken", "authtoken", "accesstoken",
))
# What kind of key or token it is: the word before.
_KEYS = frozenset((
    "api", "access", "private", "secret", "account", "encryption", "signing", "service",
))
_TOKENS = frozenset((
    "api", "access", "auth", "hf", "hub", "huggingface", "refresh", "session", "wandb", "github",
    "gitlab", "neptune", "comet", "mlflow", "user", "login", "security", "client", "personal",
    "read", "write",
))
# fmt: on
_USER = re.compile(r"(?<=://)[^/\s@]+@")


def is_secret(key: str) -> bool:
    """Whether the name of a setting says that its value is a secret."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", key)
    words = re.findall(r"[a-z0-9]+", spaced.lower())
    pairs = list(pairwise(words))
    return (
        bool(_WORDS & set(words))
        or words in (["token"], ["auth"])
        or any(second == "key" and first in _KEYS for first, second in pairs)
        or any(second == "token" and first in _TOKENS for first, second in pairs)
    )


def redacted(value: Any) -> Any:
    """A copy of settings in which :data:`REDACTED` stands for every secret.

    Secrets are the values of keys that :func:`is_secret` picks, at any depth, and the user and
    password in a URL. None and booleans (``use_api_key: true``) stay.
    """
    if isinstance(value, Namespace):
        return type(value)(**{key: _entry(key, part) for key, part in vars(value).items()})
    if isinstance(value, dict):
        return {key: _entry(key, part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([redacted(part) for part in value])
    if isinstance(value, str):
        return _USER.sub(f"{REDACTED}@", value)
    return value


def _entry(key: Any, value: Any) -> Any:
    if isinstance(key, str) and is_secret(key):
        return _hidden(value)
    return redacted(value)


def _hidden(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _hidden(part) for key, part in value.items()}
    if isinstance(value, Namespace):
        return type(value)(**{key: _hidden(part) for key, part in vars(value).items()})
    if isinstance(value, list | tuple):
        return type(value)([_hidden(part) for part in value])
    if value is None or isinstance(value, bool):
        return value
    return REDACTED


def holds_redacted(value: Any, where: str = "") -> str | None:
    """The keys, joined by dots, that lead to the first redacted value, or None."""
    if isinstance(value, Namespace):
        value = vars(value)
    parts: Any = ()
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    elif isinstance(value, str) and REDACTED in value:
        return where
    places = (holds_redacted(part, f"{where}.{key}" if where else str(key)) for key, part in parts)
    return next((place for place in places if place is not None), None)
