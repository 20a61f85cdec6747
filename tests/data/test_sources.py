import gzip
import json
import logging
from pathlib import Path

import pytest

from sparsify.common.errors import SparsifyError
from sparsify.data.documents import read_documents
from sparsify.data.sources import BadRows, Source, source_stem
from tests.data.conftest import write_jsonl


def read(path: Path | str, bad_rows: str = "error", key: str = "text") -> list[str]:
    return list(read_documents(Source(str(path), text_key=key), bad_rows, BadRows()))


def test_plain_text_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read(tmp_path / "a.txt") == ["one\n\ntwo\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "A.JSON.GZ"])
def test_json_lines_are_documents(tmp_path: Path, name: str) -> None:
    content = b'{"body": "one", "text": "x"}\n{"body": "two\\nlines"}\n'
    (tmp_path / name).write_bytes(
        gzip.compress(content) if name.lower().endswith("gz") else content
    )
    assert read(tmp_path / name, key="body") == ["one", "two\nlines"]


def test_folder_is_read_recursively_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.md").write_text("x")
    (tmp_path / "c.text.gz").write_bytes(gzip.compress(b"c"))
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "ignored.csv").write_text("1,2")
    (tmp_path / "ignored.gz").write_text("not read")
    assert read(tmp_path) == ["a", "x", "c"]


def test_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    assert read(tmp_path / "a.jsonl") == ["one"]


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\n  \n"])
def test_blank_last_line_is_no_row(tmp_path: Path, end: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}' + end)
    assert read(tmp_path / "a.jsonl") == ["one"]


BAD = {
    "{broken": "invalid JSON",
    "[" * 100_000: "invalid JSON",
    "[1]": "row is not an object",
    '{"other": "x"}': "no key 'text'",
    '{"text": 3}': "value of 'text' is not a string",
    '{"text": " \\n"}': "empty text",
    '{"text": "\\ud800"}': "text is not valid Unicode",
    "": "blank line",
}


@pytest.mark.parametrize(("row", "reason"), list(BAD.items()), ids=list(BAD.values()))
def test_bad_row_stops(tmp_path: Path, row: str, reason: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "one"}\n' + row + '\n{"text": "two"}\n')
    with pytest.raises(SparsifyError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: {reason}")
    assert "--data.bad_rows skip, which counts such rows and leaves them out" in message


def test_empty_text_file_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(SparsifyError, match=r"a\.txt:1: empty text"):
        read(tmp_path / "a.txt")
    assert read(tmp_path / "a.txt", "skip") == []


def test_skip_counts_and_reports_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "corpus.jsonl"
    good = json.dumps({"text": "good"})
    path.write_text("\n".join([good, *BAD, good, "[]", "{}", "[]", good]) + "\n")
    report = BadRows()
    assert list(read_documents(Source(str(path)), "skip", report)) == ["good"] * 3
    assert report.counts == {
        "invalid JSON": 2,
        "row is not an object": 3,
        "no key 'text'": 2,
        "value of 'text' is not a string": 1,
        "empty text": 1,
        "text is not valid Unicode": 1,
        "blank line": 1,
    }
    with caplog.at_level(logging.WARNING, logger="sparsify"):
        report.warn()
        BadRows().warn()
    (record,) = caplog.records
    assert record.getMessage() == (
        "left out 11 bad rows: 3 row is not an object, 2 invalid JSON, 2 no key 'text', 1 value of "
        "'text' is not a string, 1 empty text, 1 text is not valid Unicode, 1 blank line; first at "
        f"{path}:2"
    )


def test_unreadable_paths(tmp_path: Path) -> None:
    with pytest.raises(SparsifyError, match=r"none\.txt does not exist; .* correct the path"):
        read(tmp_path / "none.txt")
    with pytest.raises(SparsifyError, match=r"has no text file; .* \.jsonl .* name another folder"):
        read(tmp_path)
    (tmp_path / "a.csv").write_text("1")
    with pytest.raises(SparsifyError, match=r"a\.csv is not a known kind of text; .*convert it"):
        read(tmp_path / "a.csv")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(SparsifyError, match=r"latin\.txt is not UTF-8 \(.* 0xe9\); .* convert"):
        read(tmp_path / "latin.txt")
    whole = Path(write_jsonl(tmp_path / "a.jsonl.gz", ["text " * 99])).read_bytes()
    corrupt = whole[:10] + b"\xff" + whole[11:]  # no such kind of deflate block
    for content in (b"not gzip", whole[:-12], corrupt):
        (tmp_path / "bad.jsonl.gz").write_bytes(content)
        with pytest.raises(SparsifyError, match=r"bad\.jsonl\.gz cannot be read .* a whole gzip"):
            read(tmp_path / "bad.jsonl.gz")


def test_permission_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # a test as root may read every file
    with pytest.raises(SparsifyError, match=r"a\.txt cannot be read \(.*Permission denied\)"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("path", "stem"),
    [("d/corpus.jsonl.gz", "corpus"), ("a.b.txt", "a.b"), ("d/wiki", "wiki"), ("d/wiki/", "wiki")],
)
def test_source_stem(path: str, stem: str) -> None:
    assert source_stem(path) == stem
