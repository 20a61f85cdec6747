import copy
import gzip
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparsify.common.errors import SparsifyError
from sparsify.data import Source, TextDataModule
from tests.data.conftest import words, write_jsonl


@pytest.fixture
def corpora(tmp_path: Path) -> dict[str, str]:
    """Two files of 12 and 5 blocks of 8 tokens, with 3 and 0 tokens left over."""
    return {
        "big": write_jsonl(tmp_path / "big.jsonl", [words(0, 49), words(60, 49)]),
        "small": write_jsonl(tmp_path / "small.jsonl.gz", [words(120, 40)]),
    }


def make(corpora: Any, tokenizer: Any, **settings: Any) -> TextDataModule:
    settings = {"block_size": 8, "batch_size": 2, "seed": 1} | settings
    return TextDataModule(train=corpora, tokenizer=tokenizer, **settings)


def rows(batches: Any) -> list[list[int]]:
    return [row for batch in batches for row in batch.tolist()]


def test_training_reads_every_block_once(
    corpora: dict[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    data = make(corpora, tokenizer, batch_size=1)
    big = [i + 2 for i in range(49)] + [0] + [60 + i + 2 for i in range(49)]
    stream = big[:96] + [120 + i + 2 for i in range(40)]
    blocks = [stream[i : i + 8] for i in range(0, len(stream), 8)]
    batches = list(data.train_dataloader())
    assert all(b.shape == (1, 8) and b.dtype == torch.int64 for b in batches)
    assert sorted(rows(batches)) == sorted(blocks)
    assert rows(batches) != blocks
    assert data.describe("train")["sources"]["big"] == {
        "file": "big.jsonl",
        "documents": 2,
        "tokens": 99,
        "blocks": 12,
        "dropped": 3,
        "sha256": data._packed["train"]["big"].sha256,
    }
    assert data.describe("train")["block_size"] == 8
    assert data.describe("validation") == {"block_size": 8, "sources": {}}


def test_weights_set_the_shares(
    corpora: dict[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    sources = {"big": Source(corpora["big"], 1.0), "small": Source(corpora["small"], 3.0)}
    data = make(sources, tokenizer, batch_size=1)
    small = [row for row in rows(data.train_dataloader()) if row[0] >= 122]
    assert len(small) == 13  # 17 * 3/4 = 12.75
    with pytest.raises(SparsifyError, match="train sources small have no weight"):
        make(sources | {"small": corpora["small"]}, tokenizer)


def test_ranks_take_turns(
    corpora: dict[str, str], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(rank: int, world: int) -> list[list[list[int]]]:
        data = make(corpora, tokenizer)
        kwargs = {"rank": rank, "num_replicas": world}
        data.trainer = SimpleNamespace(strategy=SimpleNamespace(distributed_sampler_kwargs=kwargs))
        return [batch.tolist() for batch in data.train_dataloader()]

    one, first, second = of(0, 1), of(0, 2), of(1, 2)
    assert one[0::2] == first
    assert one[1::2] == second
    with pytest.raises(SparsifyError, match="17 blocks are less than one batch of 2 on each of 9"):
        of(0, 9)


def test_evaluation_reads_all_blocks_in_order(
    corpora: dict[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    data = make(
        corpora["big"], tokenizer, validation=corpora, test=[corpora["small"]], eval_batch_size=5
    )
    assert data.validation_names == ["big", "small"]
    assert data.test_names == ["small"]
    loaders = data.val_dataloader()
    assert [[b.shape[0] for b in loader] for loader in loaders] == [[5, 5, 2], [5]]
    assert all(b.dtype == torch.int64 for loader in loaders for b in loader)
    assert rows(loaders[1]) == [[122 + 8 * b + i for i in range(8)] for b in range(5)]
    (loader,) = data.test_dataloader()
    assert rows(loader) == rows(loaders[1])


def test_setup_packs_what_the_stage_needs(
    corpora: dict[str, str],
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = make(corpora["big"], tokenizer, validation=corpora["small"], test=corpora["small"])
    caplog.set_level(logging.INFO, logger="sparsify")
    data.setup("validate")
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["small"]
    caplog.clear()
    data.setup("fit")
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["big"]
    caplog.clear()
    data.train_dataloader()
    data.setup("fit")
    assert not caplog.records
    data.setup("test")
    assert len(caplog.records) == 1


def test_bad_rows_are_reported_once(
    tmp_path: Path,
    corpora: dict[str, str],
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("a", "b"):
        text = json.dumps({"text": words(0, 20)})
        (tmp_path / f"{name}.jsonl").write_text(f"{text}\nnot json\n")
    train, validation = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    with pytest.raises(SparsifyError, match=r"a\.jsonl:2: invalid JSON"):
        make(train, tokenizer).setup("fit")
    data = make(train, tokenizer, validation=validation, bad_rows="skip")
    data.setup("fit")
    (record,) = caplog.records
    assert record.getMessage() == f"left out 2 bad rows: 2 invalid JSON; first at {train}:2"


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("given", ["a/overall.txt", {"overall": "a.txt"}])
def test_no_text_has_the_name_of_the_overall_score(split: str, given: Any) -> None:
    path = given if isinstance(given, str) else given["overall"]
    with pytest.raises(SparsifyError, match=rf"{split}: .* 'overall', .* as in {{mine: {path}}}"):
        TextDataModule(train="b.txt", **{split: given})
    assert list(TextDataModule(train=given).sources["train"]) == ["overall"]


def test_names(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    paths = ["x/a.txt", "y/a.jsonl.gz", "y/b.md", "x/a.txt", "folder/"]
    data = make(paths, tokenizer)
    assert list(data.sources["train"]) == ["x/a", "y/a", "b", "x/a-2", "folder"]
    assert [s.path for s in data.sources["train"].values()] == paths


def test_embedded_text(tokenizer: PreTrainedTokenizerFast, corpora: dict[str, str]) -> None:
    data = TextDataModule(tokenizer=tokenizer)
    assert data.validation_names == data.test_names == ["shakespeare", "bible", "python"]
    for sources in data.sources.values():
        for source in sources.values():
            with gzip.open(source.path) as lines:
                assert json.loads(next(iter(lines)))["text"].strip()
    data.setup("test")
    assert [len(b) > 0 for b in data.test_dataloader()] == [True] * 3
    own = TextDataModule(validation=corpora["big"], tokenizer=tokenizer)
    assert list(own.sources["train"]) == ["shakespeare", "bible", "python"]
    assert own.validation_names == ["big"]
    absent = TextDataModule(train=corpora["big"], tokenizer=tokenizer)
    assert absent.val_dataloader() == absent.test_dataloader() == []


@pytest.mark.parametrize("weights", [(None, None), (1.0, 3.0)])
def test_calibration(
    corpora: dict[str, str],
    tokenizer: PreTrainedTokenizerFast,
    weights: tuple[float | None, float | None],
) -> None:
    sources = {n: Source(p, w) for (n, p), w in zip(corpora.items(), weights, strict=True)}
    data = make(sources, tokenizer)
    samples = data.calibration(6)
    assert samples.shape == (6, 8)
    assert samples.dtype == torch.int64
    assert len({tuple(row) for row in samples.tolist()}) == 6
    # 6 * 12/17 = 4.2 and 6 * 5/17 = 1.8; or 6 * 1/4 = 1.5 and 6 * 3/4 = 4.5 (the first rounds up)
    assert int((samples[:, 0] >= 122).sum()) == (2 if weights[0] is None else 4)
    assert torch.equal(samples, data.calibration(6, seed=0))
    assert not torch.equal(samples, data.calibration(6, seed=1))


def test_calibration_errors(corpora: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> None:
    data = make(corpora, tokenizer)
    every = data.calibration(17).tolist()
    assert sorted(every) == sorted(rows(make(corpora, tokenizer, batch_size=1).train_dataloader()))
    with pytest.raises(SparsifyError, match="asks for 13 of 18 blocks from .* big, which has 12;"):
        data.calibration(18)
    with pytest.raises(SparsifyError, match="samples is 0; it must be at least 1"):
        data.calibration(0)


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("block_size", 1, 2), ("batch_size", 0, 1), ("eval_batch_size", 0, 1), ("seed", -1, 0)],
)
def test_numbers_out_of_range(name: str, value: int, least: int) -> None:
    with pytest.raises(SparsifyError, match=f"{name} is {value}; it must be at least {least}"):
        TextDataModule(**{name: value})


def test_other_errors(corpora: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SparsifyError, match="tokenizer is None and there is no trainer"):
        make(corpora, None).setup("fit")
    with pytest.raises(SparsifyError, match="17 blocks are less than one batch of 18 on each of 1"):
        make(corpora, tokenizer, batch_size=18).train_dataloader()
    with pytest.raises(SparsifyError, match=r"train is \[\]; a split that is given must have"):
        make([], tokenizer)
    data = make(corpora, tokenizer)
    connector = SimpleNamespace(use_distributed_sampler=True)
    data.trainer = SimpleNamespace(world_size=2, _accelerator_connector=connector)
    with pytest.raises(SparsifyError, match="use_distributed_sampler=False"):
        data.setup("fit")


def parse(*arguments: str) -> TextDataModule:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TextDataModule, "data")
    return parser.instantiate(parser.parse_args(list(arguments))).data


def test_command_line_forms(tmp_path: Path) -> None:
    a, b = Source("a.txt"), Source("b.jsonl")
    assert parse().sources["train"].keys() == {"shakespeare", "bible", "python"}
    assert parse("--data.train", "a.txt").sources["train"] == {"a": a}
    assert parse("--data.train", "[a.txt, b.jsonl]").sources["train"] == {"a": a, "b": b}
    assert parse("--data.train", "{x: a.txt, y: b.jsonl}").sources["train"] == {"x": a, "y": b}
    (tmp_path / "c.yaml").write_text(
        "data:\n  train:\n    x: {path: a.txt, weight: 2}\n"
        "    y: {path: b.jsonl, weight: 0.5, text_key: body}\n"
        "  validation: {v: a.txt, w: {path: b.jsonl}}\n"
    )
    data = parse("--config", str(tmp_path / "c.yaml"))
    assert data.sources["train"] == {
        "x": Source("a.txt", 2.0),
        "y": Source("b.jsonl", 0.5, "body"),
    }
    assert data.weights == [2.0, 0.5]
    assert data.sources["validation"] == {"v": a, "w": b}
    assert data.sources["test"] == {}


@pytest.mark.parametrize("consumed", [0, 1, 5, 8])
@pytest.mark.parametrize("weights", [None, (1.0, 3.0)])
def test_saved_position(
    corpora: dict[str, str],
    tokenizer: PreTrainedTokenizerFast,
    consumed: int,
    weights: tuple[float, float] | None,
) -> None:
    sources = {
        name: Source(path, weight)
        for (name, path), weight in zip(corpora.items(), weights or (None, None), strict=True)
    }
    data = make(sources, tokenizer)

    def epoch_of(loader: Any, epoch: int) -> list[list[list[int]]]:
        loader.batch_sampler.sampler.set_epoch(epoch)
        return [batch.tolist() for batch in loader]

    whole = data.train_dataloader()
    epochs = [epoch_of(whole, e) for e in range(4)]
    assert len(epochs[0]) == 8
    first = data.train_dataloader()
    first.batch_sampler.sampler.set_epoch(1)
    iterator = iter(first)
    assert [next(iterator).tolist() for _ in range(consumed)] == epochs[1][:consumed]
    state = first.state_dict()
    # Going on with the loader that was saved.
    assert [batch.tolist() for batch in iterator] == epochs[1][consumed:]
    # A new loader, which is told nothing, or told the epoch before or after the iterator is made.
    for order in ("nothing", "before", "after"):
        loader = data.train_dataloader()
        loader.load_state_dict(state)
        if order == "before":
            loader.batch_sampler.sampler.set_epoch(1)
        resumed = iter(loader)
        if order == "after":
            loader.batch_sampler.sampler.set_epoch(1)
        assert [batch.tolist() for batch in resumed] == epochs[1][consumed:]
        assert epoch_of(loader, 2) == epochs[2]
        assert epoch_of(loader, 3) == epochs[3]


def test_loaders_leave_the_global_generator_alone(
    corpora: dict[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    data = make(corpora, tokenizer, validation=corpora)
    before = torch.get_rng_state()
    list(data.train_dataloader())
    list(data.val_dataloader()[0])
    assert torch.equal(before, torch.get_rng_state())


class Recorder(LightningModule):
    """Records batches; saves a checkpoint at one point of the run.

    Args:
        tokenizer: For the data module.
        hook: Name of the hook that saves.
        epoch: Epoch of the save.
        step: Batch of the save, for the hook at the end of a batch.
        path: Of the checkpoint; None saves nothing.
    """

    def __init__(
        self, tokenizer: Any, hook: str = "", epoch: int = 1, step: int = 0, path: Any = None
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.save_at = (hook, epoch, step)
        self.path = path
        self.seen: list[tuple[int, list[list[int]]]] = []
        self.saved_after: int | None = None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch.tolist()))
        return self.weight * batch.float().mean()

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-9)

    def save(self, hook: str, step: int = 0) -> None:
        if self.path is not None and self.save_at == (hook, self.current_epoch, step):
            self.trainer.save_checkpoint(self.path)
            self.saved_after = len(self.seen)

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        self.save("batch", batch_idx)

    def on_validation_end(self) -> None:
        self.save("validation")

    def on_train_epoch_end(self) -> None:
        self.save("epoch")


def fit(
    module: Recorder, data: TextDataModule, epochs: int = 3, resume: Any = None, **settings: Any
) -> Recorder:
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=False)
    return module


@pytest.mark.parametrize("with_validation", [False, True])
@pytest.mark.parametrize(
    ("hook", "step"),
    [("batch", 0), ("batch", 4), ("batch", 6), ("batch", 7), ("epoch", 0), ("validation", 0)],
)
def test_resumed_training_reads_what_an_uninterrupted_run_reads(
    corpora: dict[str, str],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hook: str,
    step: int,
    with_validation: bool,
) -> None:
    # As on a machine with many cores, where Lightning would ask for worker processes.
    connector = "lightning.pytorch.trainer.connectors.data_connector"
    monkeypatch.setattr(f"{connector}.suggested_max_num_workers", lambda _: 16)
    if hook == "validation" and not with_validation:
        pytest.skip("no validation to save after")

    def data() -> TextDataModule:  # takes the module's tokenizer
        return make(corpora, None, validation=corpora if with_validation else None)

    path = tmp_path / "run.ckpt"
    whole = fit(Recorder(tokenizer, hook, 1, step, path), data())
    assert [epoch for epoch, _ in whole.seen] == [0] * 8 + [1] * 8 + [2] * 8
    assert whole.saved_after == (8 + step + 1 if hook == "batch" else 16)
    loader = make(corpora, tokenizer).train_dataloader()
    expected = []
    for epoch in range(3):
        loader.batch_sampler.sampler.set_epoch(epoch)
        expected += [(epoch, batch.tolist()) for batch in loader]
    assert whole.seen == expected
    resumed = fit(Recorder(tokenizer), data(), resume=path)
    assert resumed.seen == whole.seen[whole.saved_after :]


@pytest.mark.parametrize("other", [{"batch_size": 3}, {"seed": 2}, {"block_size": 16}])
def test_resume_with_other_data_is_an_error(
    corpora: dict[str, str],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    other: dict[str, int],
) -> None:
    path = tmp_path / "run.ckpt"
    fit(Recorder(tokenizer, "batch", 0, 2, path), make(corpora, tokenizer), epochs=1)
    rule = "data position is in .*'batch_size': 2.* and this run has .* must be the same to resume"
    with pytest.raises(SparsifyError, match=rule):
        fit(Recorder(tokenizer), make(corpora, tokenizer, **other), resume=path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_iterator_finished", float("inf")),
        ("_iterator_finished", None),
        ("_num_yielded", 1.5),
        ("_num_yielded", True),
        ("_sampler_iter_yielded", -1),
        ("batch", "x"),
        ("epoch", None),
    ],
)
def test_a_position_that_is_none_is_refused(
    key: str, value: object, corpora: dict[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    loader = make(corpora, tokenizer).train_dataloader()
    next(iter(loader))
    state = loader.state_dict()
    make(corpora, tokenizer).train_dataloader().load_state_dict(copy.deepcopy(state))
    part = state["position"]
    part = part if key in part else part["_sampler_iter_state"]
    part[key] = value
    with pytest.raises(SparsifyError, match=f"place in the data.*{key} is "):
        make(corpora, tokenizer).train_dataloader().load_state_dict(state)
