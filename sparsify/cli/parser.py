"""The parser of the commands with a Trainer."""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, NoReturn

from lightning.pytorch import Callback
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.cli import LightningArgumentParser

from sparsify.common import yaml_text

# What was probably meant where a group of options is given a value that is no file of settings.
MEANT = {"model": "model.name_or_path", "data": "data.train", "model.strategy": "strategy"}


class Parser(LightningArgumentParser):
    """Keeps the path of a text or mask file a path; Lightning's parser would read settings from
    that file. Also reads ``pattern: 2:4`` in a config as text, not as a number.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"parser_mode": yaml_text.MODE})

    def add_lightning_class_args(
        self,
        lightning_class: Any,
        nested_key: str,
        subclass_mode: bool = False,
        required: bool = True,
    ) -> list[str]:
        if issubclass(lightning_class, Callback):
            self.callback_keys.append(nested_key)
        names: list[str] = self.add_class_arguments(
            lightning_class,
            nested_key,
            fail_untyped=False,
            instantiate=not issubclass(lightning_class, LightningTrainer),
        )
        return names

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with the message, and with a guess at what was meant."""
        super().error(message + self._guess(message), ex)

    def _guess(self, message: str) -> str:
        if unread := re.match(r'Parser key "([\w.]+)":\s+Unable to load config \'(.*)\'', message):
            group, value = unread.groups()
            meant = MEANT.get(group)
            guess = f"; did you mean --{meant} {value}?" if meant else ""
            return f"\n--{group} takes a file of settings{guess}"
        if not message.startswith("unrecognized arguments: "):
            return ""
        known = {option.removeprefix("--") for option in self._options()}
        for word in message.split():
            name = word.partition("=")[0].removeprefix("--")
            if word.startswith("--") and name not in known:
                ends = sorted(option for option in known if option.rpartition(".")[2] == name)
                if likely := ends or get_close_matches(name, known, n=1):
                    return f"; did you mean {' or '.join(f'--{option}' for option in likely)}?"
        return ""

    def _options(self) -> Iterator[str]:
        """The options of this parser and of its commands."""
        yield from self._option_string_actions
        for action in self._actions:
            if isinstance(action.choices, dict):
                for parser in action.choices.values():
                    yield from parser._option_string_actions
