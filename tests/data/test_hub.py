import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from sparsify.common.errors import SparsifyError
from sparsify.data import Source, TextDataModule
from sparsify.data.documents import read_documents
from sparsify.data.sources import BadRows
from tests.data.conftest import HUB_PARTS, words, write_jsonl, write_rows

TEXTS = [text for part in HUB_PARTS for text in part]


def read(path: str, bad_rows: str = "error", **settings: object) -> list[object]:
    return list(read_documents(Source(path, **settings), bad_rows, BadRows()))


@pytest.fixture(params=["downloaded", "streaming"])
def streaming(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether sources stream; those that do not are as from the hub, not as local folders."""
    monkeypatch.setattr("sparsify.data.hub._is_folder", lambda name: False)
    return request.param == "streaming"


def test_documents_of_config_and_split(hub: str, streaming: bool) -> None:
    assert read(hub, config="en", streaming=streaming) == TEXTS
    assert read(hub, config="en", streaming=streaming, documents=5) == TEXTS[:5]
    assert read(hub, config="en", split="test", streaming=streaming) == [words(7, 30)]


def test_a_local_folder_is_read_as_it_is_now(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read("hf://corpus", config="en") == TEXTS
    for texts in (["one", "two"], ["three"]):
        write_jsonl(tmp_path / "corpus" / "de" / "train.jsonl", texts)
        assert read("hf://corpus", config="de") == texts
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    write_jsonl(tmp_path / "plain" / "train.jsonl", ["no", "README"])
    assert read("hf://plain") == ["no", "README"]


def test_a_slice_of_a_download(hub: str, streaming: bool) -> None:
    if streaming:
        with pytest.raises(SparsifyError, match=r"cannot be loaded \(Bad split"):
            read(hub, config="en", split="train[2:4]", streaming=True)
    else:
        assert read(hub, config="en", split="train[2:4]") == TEXTS[2:4]


def test_errors_list_what_there_is(hub: str, streaming: bool) -> None:
    def fails(rule: str, path: str = hub, **settings: object) -> None:
        with pytest.raises(SparsifyError, match=rule):
            read(path, streaming=streaming, **settings)

    fails("has no config 'fr'; its configs are en, de: name one by config", config="fr")
    fails("has no config None; its configs are en, de: name one by config")
    fails("has no split 'test'; its splits are train: name one", config="de", split="test")
    fails("has no column 'body'; its columns are text, url: ", config="en", text_key="body")
    fails("hf://no/such is not found or not reached .* correct the name", path="hf://no/such")
    fails("hf:///no/such is not found or not reached", path="hf:///no/such")
    folder = Path(hub.removeprefix("hf://")).parent / "broken"
    folder.mkdir()
    (folder / "train.jsonl").write_text("{")
    rule = (
        "read further than row 0 " if streaming else "loaded .* without code of the data set's own"
    )
    fails(f"broken cannot be {rule}", path=f"hf://{folder}")


def test_missing_package(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    rule = r"needs the package datasets, .* pip install 'sparsify-llm\[datasets\]'"
    with pytest.raises(SparsifyError, match=rule):
        read(hub, config="en")


def test_bad_rows_have_a_number(hub: str) -> None:
    rows = [{"text": "one"}, {"text": None}, {"text": ""}]
    write_rows(Path(hub.removeprefix("hf://")) / "de" / "train.jsonl", rows)
    with pytest.raises(SparsifyError, match="corpus:2: value of 'text' is not a string"):
        read(hub, config="de")
    assert read(hub, "skip", config="de", streaming=True) == ["one"]


def test_a_data_set_in_the_data_module(hub: str, tokenizer: PreTrainedTokenizerFast) -> None:
    source = Source(hub, config="en", streaming=True, documents=9)
    data = TextDataModule(
        train={"c4": source},
        validation={"c4": Source(hub, config="en", split="test", streaming=True)},
        block_size=8,
        batch_size=1,
        tokenizer=tokenizer,
    )
    stream = " <eos> ".join(TEXTS[:9]).split()
    ids = [0 if word == "<eos>" else int(word[1:]) + 2 for word in stream]
    blocks = [ids[i : i + 8] for i in range(0, len(ids) - 7, 8)]
    assert sorted(batch.tolist()[0] for batch in data.train_dataloader()) == sorted(blocks)
    described = data.describe("train")["sources"]["c4"]
    assert described["file"] == "hf://corpus"
    assert (described["config"], described["split"]) == ("en", "train")
    assert described["documents"] == 9
    assert [len(batch) for batch in data.val_dataloader()[0]] == [3]
    assert TextDataModule(train="hf://allenai/c4").sources["train"].keys() == {"c4"}


def test_joined_rows_are_one_document(hub: str, tmp_path: Path) -> None:
    rows = ["", " = Title = \n", "", " text \n"]
    folder = Path(hub.removeprefix("hf://"))
    write_jsonl(folder / "de" / "train.jsonl", rows)
    assert read(hub, config="de", joined=True) == ["\n\n".join(rows)]
    assert read(hub, config="de", joined=True, documents=2) == ["\n\n".join(rows[:2])]
    assert read(str(folder / "de" / "train.jsonl"), joined=True) == ["\n\n".join(rows)]
    write_rows(folder / "de" / "train.jsonl", [{"text": "a"}, {"text": None}])
    with pytest.raises(SparsifyError, match=":2: value of 'text' is not a string"):
        read(hub, config="de", joined=True)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"documents": 0}, "documents is 0; it must be at least 1: raise it"),
        ({"shuffle_buffer": -1}, "shuffle_buffer is -1; it must be at least 0"),
        ({"prompt_key": "q"}, "prompt_key 'q' and response_key None; .*: give both or neither"),
        ({"response_key": "a"}, "prompt_key None and response_key 'a'"),
        ({"prompt_key": "q", "response_key": "a", "messages_key": "m"}, ": remove one"),
        ({"joined": True, "streaming": True}, "joined and has a stream without end"),
        ({"joined": True, "messages_key": "m"}, "joined and has messages or responses"),
        ({"config": "en"}, "config 'en' and split 'train' and the path a.txt; files have neither"),
        ({"split": "test"}, "only a path that begins with hf://: correct the path"),
    ],
)
def test_settings_that_contradict(settings: dict[str, object], rule: str) -> None:
    with pytest.raises(SparsifyError, match=f"source x: .*{rule}"):
        TextDataModule(train={"x": Source("a.txt", **settings)})
