import sys
from pathlib import Path

import pytest

from sparsify.common.errors import SparsifyError
from sparsify.data.documents import read_documents
from sparsify.data.sources import BadRows, Source, source_stem
from tests.data.conftest import write_jsonl, write_parquet


def read(path: Path | str, bad_rows: str = "error", **settings: object) -> list[object]:
    return list(read_documents(Source(str(path), **settings), bad_rows, BadRows()))


def test_rows_are_documents_over_row_groups(tmp_path: Path) -> None:
    rows = [{"n": i, "body": f"text {i}"} for i in range(7)]
    write_parquet(tmp_path / "a.parquet", rows)
    assert read(tmp_path / "a.parquet", text_key="body") == [f"text {i}" for i in range(7)]
    assert read(tmp_path / "a.parquet", text_key="body", documents=3) == [
        "text 0",
        "text 1",
        "text 2",
    ]


def test_a_folder_mixes_kinds_in_order(tmp_path: Path) -> None:
    write_parquet(tmp_path / "b.parquet", [{"text": "b"}])
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    write_parquet(tmp_path / "C.PARQUET", [{"text": "c"}])
    (tmp_path / "d.parquet.gz").write_bytes(b"not read")
    assert read(tmp_path) == ["c", "a", "b"]
    assert source_stem("data/corpus.parquet") == "corpus"


@pytest.mark.parametrize(
    ("value", "reason"),
    [(None, "value of 'text' is not a string"), (" \n", "empty text")],
)
def test_bad_rows(tmp_path: Path, value: str | None, reason: str) -> None:
    rows = [{"text": "one"}, {"text": "two"}, {"text": value}, {"text": "four"}]
    path = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(SparsifyError, match=rf"a\.parquet:3: {reason}; .*--data\.bad_rows skip"):
        read(path)
    report = BadRows()
    assert list(read_documents(Source(path), "skip", report)) == ["one", "two", "four"]
    assert report.counts == {reason: 1}
    assert report.first == f"{path}:3"


def test_a_column_that_is_no_text(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"text": 3}])
    with pytest.raises(SparsifyError, match=r":1: value of 'text' is not a string"):
        read(path)


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"body": "one", "n": 1}])
    rule = r"a\.parquet has no column 'text'; its columns are body, n: name .* text_key"
    with pytest.raises(SparsifyError, match=rule):
        read(path)
    (tmp_path / "b.parquet").write_bytes(b"no table")
    with pytest.raises(SparsifyError, match=r"b\.parquet cannot be read .* whole Parquet file"):
        read(tmp_path / "b.parquet")
    (tmp_path / "c.csv").write_text("")
    with pytest.raises(SparsifyError, match=r"is not a known kind of text; .* in \.parquet"):
        read(tmp_path / "c.csv")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    rule = (
        r"needs the package pyarrow, which is not installed: pip install 'sparsify-llm\[datasets\]'"
    )
    with pytest.raises(SparsifyError, match=rule):
        read(path, text_key="body")
