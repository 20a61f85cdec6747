"""The command line: finds the command, and imports only what that command needs.

PyTorch, Lightning and Transformers take ten seconds to import. General help, the version and a
mistyped command need none of them.
"""

import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from sparsify.cli.commands.output import reader_may_leave
from sparsify.cli.table import TOOLS, TRAINER_COMMANDS, Group, Tool
from sparsify.common.errors import SparsifyError
from sparsify.common.shown_logs import shown_logs
from sparsify.common.signals import asked, stoppable
from sparsify.common.version import version

ABOUT = "Learn, evaluate and export N:M sparse masks for Hugging Face language models."
HELP = ("-h", "--help")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. Raises ``SystemExit`` with the status, except after a successful run
    with a Trainer.

    Exit status 1: a verified folder has faults, or a plan does not fit. 2, with one message: the
    user can correct the input. 130 after Ctrl-C, and 143 after SIGTERM or SIGUSR1, unless
    everything was done by then.

    Args:
        args: the words after ``sparsify``; None takes those of the process.
    """
    words = sys.argv[1:] if args is None else list(args)
    with stoppable(), shown_logs():
        try:
            status = _run(words)
        except SparsifyError as error:
            if asked() is not None:
                raise  # this rank waited for one that was stopped
            from sparsify.common.printable import printable

            print(printable(f"error: {error}"), file=sys.stderr)
            status = 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            status = 130
    if status is not None:
        sys.exit(status)


def _run(words: list[str]) -> int | None:
    first, rest = (words[0], words[1:]) if words else ("", [])
    # Other options may come before their command: sparsify --config FILE fit.
    if first in TRAINER_COMMANDS or (first.startswith("-") and first not in (*HELP, "--version")):
        from sparsify.cli import trainer_cli as cli

        cli.run(words)
        return None
    with reader_may_leave():
        if first == "--version":
            print(f"sparsify {version()}")
            return 0
        return _run_tool("", first, rest, {**TRAINER_COMMANDS, **TOOLS})
    return 0  # the reader has closed the pipe, having seen enough


def _run_tool(
    before: str, word: str, rest: list[str], commands: Mapping[str, str | Tool | Group]
) -> int:
    """Run the command that a word names.

    Args:
        before: the command that the word follows, such as ``mask``; empty for the first word.
        word: the word; empty if there is none.
        rest: the words that follow it.
        commands: the commands to choose from.
    """
    name = f"{before} {word}".strip()
    match commands.get(word):
        case Tool() as tool:
            from sparsify.cli import dispatch as tools

            return tools.run(name, tool, rest)
        case Group() as group:
            following, rest = (rest[0], rest[1:]) if rest else ("", [])
            return _run_tool(name, following, rest, group.tools)
    if word in HELP:
        print(_help(before, commands))
        return 0
    if not word:
        print(_help(before, commands), file=sys.stderr)
        return 2
    close = get_close_matches(word, commands, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise SparsifyError(
        f"there is no command {name!r}; {hint}There are {', '.join(commands)}: see "
        f"{' '.join(filter(None, ('sparsify', before, '--help')))}"
    )


def _help(group: str, commands: Mapping[str, str | Tool | Group]) -> str:
    """The help: the commands of a group, or all commands, each with its line."""
    name = f"sparsify {group}".strip()
    about = ABOUT
    if isinstance(of := TOOLS.get(group), Group):
        about = of.about
    indent = 4 + max(map(len, commands)) + 2
    width = max(shutil.get_terminal_size().columns - 2, indent + 20)
    lines = [f"usage: {name} COMMAND ...", "", about, "", "commands:"]
    for command, entry in commands.items():
        text = entry if isinstance(entry, str) else entry.about
        first = f"    {command}".ljust(indent)
        lines += textwrap.wrap(text, width, initial_indent=first, subsequent_indent=" " * indent)
    lines += ["", f"{name} COMMAND --help says what a command takes."]
    if not group:
        lines.append("sparsify --version says which version this is.")
    return "\n".join(lines)
