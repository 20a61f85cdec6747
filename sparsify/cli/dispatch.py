"""Runs the commands that need no Trainer: plain functions, whose docstrings are their help."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

from jsonargparse import auto_cli, set_parsing_settings

from sparsify.cli.commands.compare import join_runs
from sparsify.cli.table import Tool
from sparsify.common import yaml_text
from sparsify.common.errors import SparsifyError

FLAGS = ("--overwrite", "--dry_run", "--partial", "--private", "--create_pr")


def run(name: str, tool: Tool, words: list[str]) -> int:
    """Run a command.

    Args:
        name: the command's name, such as ``mask show``.
        tool: the command, with the place of its function.
        words: the words that follow its name.

    Returns:
        The command's exit status.

    Raises:
        SparsifyError: the command cannot do what the words ask for.
    """
    # Instantiate no class where an option accepts any value.
    set_parsing_settings(instantiate_subclass_spec_in_any=False)
    # Flags work as for fit: a flag without a value means true.
    following = [*words, "--"][1:]
    words = [
        f"{word}=true" if word in FLAGS and after.startswith("--") else word
        for word, after in zip(words, following, strict=True)
    ]
    if name == "compare":
        words = join_runs(words)
    function = find_function(tool)
    try:
        with _quiet(tool, words):
            if tool.reads_words:
                return int(function(words))
            return (
                auto_cli(
                    function,
                    words,
                    as_positional=True,
                    prog=f"sparsify {name}",
                    parser_mode=yaml_text.MODE,
                )
                or 0
            )
    except BrokenPipeError:  # the reader of our output left
        raise
    except OSError as error:
        raise SparsifyError(f"{error.filename or 'a file'}: {error.strerror}") from error


def _quiet(tool: Tool, words: list[str]) -> AbstractContextManager[None]:
    if not tool.loads_models or {"-h", "--help"} & {*words}:
        return nullcontext()
    from sparsify.common.quiet import quiet

    return quiet()


def find_function(tool: Tool) -> Callable[..., Any]:
    """Import a command's module, and return its function."""
    module, _, function = tool.function.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), function)
    return found
