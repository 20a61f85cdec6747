"""``sparsify compare``: finished runs beside each other."""

from pathlib import Path

from sparsify.cli.commands.output import Format, say, say_json, say_written
from sparsify.common.errors import SparsifyError
from sparsify.common.yaml_text import dumps


def compare_runs(
    runs: list[Path],
    html: Path | None = None,
    format: Format = "table",
    title: str = "Sparse models compared",
    plan: str | None = None,
) -> None:
    """Compare finished runs: a table, what can be said of them, and a report to look at.

    Runs that differ only in seeds are one row. Results of different protocols or base models are
    refused.

    Args:
        runs: run folders, their result.json, or folders that hold several, one after the other.
        html: write a report with figures into this file, which needs nothing besides itself.
        format: table or json.
        title: the report's heading.
        plan: a model's name, or a folder with its config.json: the report says what the rows that
            learn would cost on it, computed from their checkpoints as sparsify plan does.
    """
    from rich.console import Console

    from sparsify.results.compare import compare

    if html is not None and html.suffix.lower() not in (".html", ".htm"):
        raise SparsifyError(f"--html {html}: a report replaces this file; name one that ends .html")
    if html is not None and html.is_symlink():
        raise SparsifyError(
            f"--html {html}: it is a link, and what it points to would be replaced; name a file"
        )
    if plan is not None and html is None:
        raise SparsifyError(f"--plan {plan}: plans are shown in the report; give --html FILE too")
    found = compare(runs)
    if format == "json":
        say_json(found.to_dict())
    else:
        say(found.table(Console().width))
        for line in found.sentences():
            say(line)
    if html is not None:
        try:
            from sparsify.results.compare.report import render
        except ImportError as error:
            raise SparsifyError(
                f"--html needs a package that is not installed ({error}): "
                "pip install 'sparsify-llm[plot]'"
            ) from error
        planned = None
        if plan is not None:
            from sparsify.cli.commands.compare_plan import plan_rows

            planned = plan_rows(found.rows, plan)
        html.write_text(render(found, title, planned), encoding="utf-8")
        if format != "json":
            say_written(html)


def join_runs(words: list[str]) -> list[str]:
    """Runs as the one list that the parser takes: ``a b --html c`` is ``["a", "b"] --html c``."""
    runs, others = [], []
    rest = iter(words)
    for word in rest:
        if not word.startswith("-"):
            runs.append(word)
            continue
        others.append(word)
        if "=" not in word and word not in ("-h", "--help"):
            others += [value for value in (next(rest, None),) if value is not None]
    return [*([dumps(runs)] if runs else []), *others]
