import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sparsify.common.errors import SparsifyError
from sparsify.data import Source, TextDataModule
from tests.data.conftest import HUB_PARTS, words, write_jsonl, write_parquet, write_rows
from tests.data.test_datamodule import Recorder, fit


def make(sources: dict[str, Source], tokenizer: Any, **settings: Any) -> TextDataModule:
    settings = {"block_size": 8, "batch_size": 2, "seed": 1} | settings
    return TextDataModule(train=sources, tokenizer=tokenizer, **settings)


@pytest.fixture
def blend(hub: str, tmp_path: Path) -> dict[str, Source]:
    """Two streams, of a data set and of a folder, and text in memory."""
    for part in range(3):
        write_jsonl(tmp_path / "web" / f"{part}.jsonl.gz", [words(20 * part, 3 + part)] * 5)
    write_parquet(tmp_path / "web" / "x.parquet", [{"text": words(150, 9)}] * 5)
    memory = write_jsonl(tmp_path / "memory.jsonl", [words(100, 43)])
    return {
        "hub": Source(hub, 2.0, config="en", streaming=True, shuffle_buffer=6),
        "web": Source(str(tmp_path / "web"), 1.0, streaming=True, shuffle_buffer=3),
        "memory": Source(memory, 1.0),
    }


def batches(loader: Any, count: int) -> list[list[list[int]]]:
    return [next(loader).tolist() for _ in range(count)]


def reference(parts: list[list[str]], seed: int, buffer: int, epochs: int) -> list[int]:
    """The ids of a stream, by hand: word w<i> is i + 2, the separator is 0."""
    texts: list[str] = []
    run = 0
    for epoch in range(epochs):
        order = range(len(parts))
        if buffer:
            order = np.random.default_rng([seed, 4, 0, epoch]).permutation(len(parts)).tolist()
        epoch_texts = [text for part in order for text in parts[part]]
        for start in range(0, len(epoch_texts), buffer or 10**9):
            chunk = epoch_texts[start : start + (buffer or 10**9)]
            if buffer:
                permuted = np.random.default_rng([seed, 5, 0, run]).permutation(len(chunk))
                chunk = [chunk[i] for i in permuted]
            texts += chunk
            run += 1
    stream = " <eos> ".join(texts).split()
    return [0 if word == "<eos>" else int(word[1:]) + 2 for word in stream]


@pytest.mark.parametrize("buffer", [0, 4, 1000])
def test_a_stream_is_its_documents_again_and_again(
    hub: str, tokenizer: PreTrainedTokenizerFast, buffer: int
) -> None:
    source = Source(hub, config="en", streaming=True, shuffle_buffer=buffer)
    ids = reference(HUB_PARTS, seed=1, buffer=buffer, epochs=12)
    loader = make({"hub": source}, tokenizer).train_dataloader()
    read = [token for batch in batches(loader, 50) for row in batch for token in row]
    assert read == ids[: 50 * 16]
    assert next(loader).dtype == torch.int64
    # Other seeds give other orders.
    other = batches(make({"hub": source}, tokenizer, seed=2).train_dataloader(), 50)
    assert (other == batches(make({"hub": source}, tokenizer).train_dataloader(), 50)) != bool(
        buffer
    )


def test_sources_are_chosen_by_seed_and_block_number(
    blend: dict[str, Source], tokenizer: PreTrainedTokenizerFast
) -> None:
    loader = make(blend, tokenizer).train_dataloader()
    chosen = [loader.source_of(block) for block in range(4000)]
    share = np.bincount(chosen) / 4000
    assert np.abs(share - [0.5, 0.25, 0.25]).max() < 0.03
    assert [loader.source_of(block) for block in (7, 3, 3999)] == [chosen[b] for b in (7, 3, 3999)]
    other = make(blend, tokenizer, seed=2).train_dataloader()
    assert [other.source_of(block) for block in range(99)] != chosen[:99]
    rows = [row for batch in batches(loader, 50) for row in batch]
    # A block in memory is a run of w100 to w142: no other source has one.
    memory = [list(range(102 + 8 * i, 110 + 8 * i)) for i in range(5)]
    assert [row in memory for row in rows] == [source == 2 for source in chosen[:100]]
    # Each once before any is read a second time.
    drawn = [memory.index(row) for row in rows if row in memory]
    assert len(drawn) > 15
    assert all(sorted(drawn[i : i + 5]) == list(range(5)) for i in range(0, len(drawn) - 4, 5))


@pytest.mark.parametrize("consumed", [0, 1, 2, 7, 13, 30, 41])
def test_a_saved_position_is_exact(
    blend: dict[str, Source], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, consumed: int
) -> None:
    data = make(blend, tokenizer)
    whole = batches(data.train_dataloader(), 60)
    loader = data.train_dataloader()
    batches(loader, consumed)
    torch.save(loader.state_dict(), tmp_path / "state")
    # Going on with the loader that was saved.
    assert batches(loader, 60 - consumed) == whole[consumed:]
    resumed = data.train_dataloader()
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert batches(resumed, 9) == whole[consumed : consumed + 9]
    # Resumed once more, and by a loader that has read something.
    again = data.train_dataloader()
    batches(again, 5)
    again.load_state_dict(resumed.state_dict())
    assert batches(iter(again), 51 - consumed) == whole[consumed + 9 :]


def test_every_position_of_one_data_set_is_exact(
    hub: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = Source(hub, config="en", streaming=True, shuffle_buffer=2)
    data = make({"hub": source}, tokenizer, batch_size=1)
    whole = batches(data.train_dataloader(), 40)
    loader = data.train_dataloader()
    for step in range(40):  # resumed after every batch
        state = loader.state_dict()
        loader = data.train_dataloader()
        loader.load_state_dict(state)
        assert next(loader).tolist() == whole[step]


def test_ranks_take_turns(blend: dict[str, Source], tokenizer: PreTrainedTokenizerFast) -> None:
    def of(rank: int, world: int) -> Any:
        data = make(blend, tokenizer)
        kwargs = {"rank": rank, "num_replicas": world}
        data.trainer = SimpleNamespace(strategy=SimpleNamespace(distributed_sampler_kwargs=kwargs))
        return data.train_dataloader()

    one = batches(of(0, 1), 40)
    ranks = [of(rank, 2) for rank in (0, 1)]
    for rank, loader in enumerate(ranks):
        assert batches(loader, 10) == one[rank:20:2]
    # The first rank's position holds for both.
    state = ranks[0].state_dict()
    for rank in (0, 1):
        loader = of(rank, 2)
        loader.load_state_dict(state)
        assert batches(loader, 10) == one[20 + rank :: 2]


@pytest.mark.parametrize(
    "other",
    [
        {"batch_size": 3},
        {"seed": 2},
        {"block_size": 16},
        {"sources": {"shuffle_buffer": 5}},
        {"sources": {"weight": 3.0}},
    ],
)
def test_a_position_in_other_data_is_refused(
    blend: dict[str, Source], tokenizer: PreTrainedTokenizerFast, other: dict[str, Any]
) -> None:
    state = make(blend, tokenizer).train_dataloader().state_dict()
    changed = dict(blend)
    settings = dict(other)
    for name, value in settings.pop("sources", {}).items():
        changed["hub"] = Source(**(vars(blend["hub"]) | {name: value}))
    loader = make(changed, tokenizer, **settings).train_dataloader()
    with pytest.raises(SparsifyError, match="data position is in .* must be the same to resume"):
        loader.load_state_dict(state)


def test_a_position_among_other_files_is_refused(
    blend: dict[str, Source], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    state = make(blend, tokenizer).train_dataloader().state_dict()
    write_jsonl(tmp_path / "web" / "3.jsonl", ["w1"])
    with pytest.raises(SparsifyError, match="'parts': 4.* and this run has .*'parts': 5"):
        make(blend, tokenizer).train_dataloader().load_state_dict(state)


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("step", [0, 4])
def test_a_resumed_run_reads_what_an_uninterrupted_one_reads(
    blend: dict[str, Source],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    limit: int | None,
    step: int,
) -> None:
    epoch, batch = (0, step) if limit is None else divmod(step, limit)
    settings: dict[str, Any] = {"epochs": -1, "max_steps": 9, "limit_train_batches": limit}
    path = tmp_path / "run.ckpt"
    whole = fit(Recorder(tokenizer, "batch", epoch, batch, path), make(blend, None), **settings)
    read = [rows for _, rows in whole.seen]
    assert read == batches(make(blend, tokenizer).train_dataloader(), 9)
    assert whole.saved_after == step + 1
    resumed = fit(Recorder(tokenizer), make(blend, None), resume=path, **settings)
    assert [rows for _, rows in resumed.seen] == read[step + 1 :]


def test_calibration_takes_the_first_blocks(
    blend: dict[str, Source], tokenizer: PreTrainedTokenizerFast
) -> None:
    data = make(blend, tokenizer)
    samples = data.calibration(8)
    assert samples.shape == (8, 8)
    assert samples.dtype == torch.int64
    rows = [tuple(row) for row in samples.tolist()]
    assert len(set(rows)) == 8
    firsts: list[list[int]] = []
    for number, (name, count) in enumerate({"hub": 4, "web": 2}.items()):
        stream = data._streaming().stream(name)
        firsts += [next(stream).tolist() for _ in range(count)]
        assert stream.epoch == 0
        assert list(blend)[number] == name
    assert {tuple(row) for row in firsts} <= set(rows)
    only = make({"hub": blend["hub"]}, tokenizer)
    assert len(only.calibration(3)) == 3
    with pytest.raises(SparsifyError, match="60 of 60 blocks from train source hub, which has "):
        only.calibration(60)


def test_describe_says_that_it_is_a_stream(
    blend: dict[str, Source], tokenizer: PreTrainedTokenizerFast
) -> None:
    sources = make(blend, tokenizer).describe("train")["sources"]
    assert list(sources) == ["hub", "web", "memory"]
    assert sources["web"] == {"file": "web", "streaming": True}
    assert sources["memory"]["blocks"] == 5


def test_errors(
    blend: dict[str, Source],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    unweighted = {name: Source(**(vars(s) | {"weight": None})) for name, s in blend.items()}
    with pytest.raises(SparsifyError, match="hub, web streams without end, .* every source a wei"):
        make(unweighted, tokenizer)
    with pytest.raises(SparsifyError, match="max_steps -1, .*: give --trainer.max_steps"):
        fit(Recorder(tokenizer), make(blend, tokenizer))
    data = make(blend, tokenizer, validation={"x": blend["memory"]})
    with pytest.raises(SparsifyError, match=r"val_check_interval 0\.5, a share of an epoch"):
        fit(Recorder(tokenizer), data, max_steps=2, val_check_interval=0.5)
    bad = write_rows(tmp_path / "bad.jsonl", [{"text": "w1"}, {"text": ""}, {"text": "w2"}])
    source = Source(bad, streaming=True)
    with pytest.raises(SparsifyError, match=r"bad\.jsonl:2: empty text"):
        next(make({"x": source}, tokenizer).train_dataloader())
    loader = make({"x": source}, tokenizer, bad_rows="skip").train_dataloader()
    with caplog.at_level(logging.WARNING, logger="sparsify"):
        batches(loader, 20)
    warned = [r.getMessage().partition(":")[0] for r in caplog.records if r.name == "sparsify"]
    assert warned == ["left out 1 bad rows", "left out 10 bad rows"]
    empty = Source(write_rows(tmp_path / "none.jsonl", [{"text": ""}]), streaming=True)
    with pytest.raises(SparsifyError, match="x: no document was found in it"):
        next(make({"x": empty}, tokenizer, bad_rows="skip").train_dataloader())
