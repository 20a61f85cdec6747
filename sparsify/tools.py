"""Runs the commands that need no Trainer: plain functions, whose docstrings are their help."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from jsonargparse import auto_cli

from sparsify.commands.compare import join_runs
from sparsify.commands.table import Tool
from sparsify.errors import SparsifyError

FLAGS = ("--shard", "--gradient_checkpointing", "--overwrite", "--dry_run")


def run(name: str, tool: Tool, words: list[str]) -> int:
    """Run a command.

    Args:
        name: of the command, such as ``mask show``.
        tool: where it is.
        words: what follows its name.

    Returns:
        Its exit status.

    Raises:
        SparsifyError: what the words say cannot be done.
    """
    # Flags as those of fit: what says nothing says true.
    following = [*words, "--"][1:]
    words = [
        f"{word}=true" if word in FLAGS and after.startswith("--") else word
        for word, after in zip(words, following, strict=True)
    ]
    if name == "compare":
        words = join_runs(words)
    function = find_function(tool)
    if tool.loads_models and not {"-h", "--help"} & {*words}:
        from sparsify.quiet import quiet

        quiet()
    try:
        return auto_cli(function, args=words, prog=f"sparsify {name}", as_positional=True) or 0
    except OSError as error:
        raise SparsifyError(f"{error.filename or 'a file'}: {error.strerror}") from error


def find_function(tool: Tool) -> Callable[..., Any]:
    """The function of a command; only now is its module imported."""
    module, _, function = tool.function.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), function)
    return found
