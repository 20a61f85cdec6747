"""``sparsify card`` and ``sparsify push``."""

from pathlib import Path
from typing import Any

from sparsify.cli.commands.output import say, say_written
from sparsify.common.errors import SparsifyError


def write(folder: Path, dense: Path | None = None, output: Path | None = None) -> None:
    """Write the model card of an exported folder anew: README.md, with all that was measured since.

    Beside the manifest it reads what lies beside the export: result.json, if the manifest has no
    scores, and downstream.json of sparsify eval. A card that somebody edited stays as it is.

    Args:
        folder: what sparsify export or fit wrote, or a run's folder.
        dense: a run of the dense model under the same protocol, for a column of its own.
        output: another file than README.md in the folder.
    """
    from sparsify.export.card import CARD, make_card, write_card
    from sparsify.export.manifest import read_manifest, sound_manifest
    from sparsify.results.downstream import find_export

    export = find_export(folder)
    sound_manifest(export)
    content = read_manifest(export)
    try:
        record = _record(export, content)
        scores = None if dense is None else _dense_scores(export, record, dense)
        text = make_card(export, record, scores, _tasks(export))
    except (AttributeError, KeyError, TypeError) as error:
        raise SparsifyError(
            f"{export}: the records of this export are damaged ({error}); export the model again"
        ) from error
    place = export / CARD if output is None else output
    write_card(place, text)
    say_written(place)


def push(
    folder: Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> None:
    """Verify an exported folder, and upload its files to the Hugging Face Hub.

    Args:
        folder: what sparsify export or fit wrote, or a run's folder.
        repo_id: the repository, OWNER/NAME; it is created if it is not there.
        private: whether a repository that is created is private; the account's default if it is not
            given.
        revision: the branch, if it is not the main one.
        create_pr: open a pull request instead.
    """
    from sparsify.export.hub import push_to_hub
    from sparsify.results.downstream import find_export
    from sparsify.serving.verify import verify

    export = find_export(folder)
    report = verify(export)
    if not report.ok:
        say(report.table())
        raise SparsifyError(f"{export}: nothing was published; export the model again")
    where = push_to_hub(export, repo_id, private=private, revision=revision, create_pr=create_pr)
    say(f"published as {where}")


def _record(export: Path, content: dict[str, Any]) -> dict[str, Any]:
    """What was measured: the manifest's, or else that of the result beside the export, if it is of
    the same base and strategy. Of a merged model nothing was measured that is recorded there.
    """
    from sparsify.common.files import read_json
    from sparsify.results.result import check

    beside = export.resolve().parent / "result.json"
    if content.get("scores") or content.get("merged") or not beside.is_file():
        return content
    result: Any = read_json(beside)
    check(result)
    same = result["protocol"]["base"]["hash"] == content["base"]["hash"]
    return result if same and result["run"]["strategy"] == content["strategy"] else content


def _dense_scores(export: Path, record: dict[str, Any], dense: Path) -> dict[str, Any]:
    from sparsify.results.compare.loading import Run, load_runs
    from sparsify.results.compare.protocol import check_protocol

    if not record.get("scores"):
        raise SparsifyError(
            f"--dense {dense}: {export} has no scores to stand beside; leave it out"
        )
    runs, _ = load_runs([dense])
    if len(runs) != 1 or runs[0].record["pattern"] != "dense":
        raise SparsifyError(
            f"--dense {dense}: it must be one run of the dense model; make it with "
            "'sparsify test --strategy dense' on the same text"
        )
    check_protocol([Run(export, record, None), runs[0]])
    scores: dict[str, Any] = runs[0].result["scores"]
    return scores


def _tasks(export: Path) -> dict[str, Any] | None:
    """The report of ``sparsify eval`` beside the export, if it is of this very export: another
    may have the same masks over other weights.
    """
    from sparsify.cli.commands.evaluate import report_path
    from sparsify.common.file_hashes import hash_file
    from sparsify.common.files import read_json
    from sparsify.export.manifest import MANIFEST
    from sparsify.results.downstream.report import DOWNSTREAM_SCHEMA

    path = report_path(export)
    if not path.is_file():
        return None
    report: Any = read_json(path)
    if not isinstance(report, dict) or report.get("schema") != DOWNSTREAM_SCHEMA:
        return None
    same = report["protocol"]["manifest"] == hash_file(export / MANIFEST)
    return report if same else None
