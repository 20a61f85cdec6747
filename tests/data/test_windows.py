"""Every window begins as the tokenizer begins a text, and evaluation batches are bounded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify.common.errors import SparsifyError
from sparsify.data import Source, TextDataModule, windows
from sparsify.data.windows import fitting_windows, window_start
from sparsify.masking.registry import find_strategy
from sparsify.models.token_batch import TokenBatch, split_batch
from sparsify.training.module import SparseCausalLM
from tests.conftest import SIZES, quiet_trainer, word_tokenizer
from tests.data.conftest import write_jsonl, write_rows
from tests.data.tokenizers import FORMS, TEXT, like

T = 16


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A file of one document."""
    return write_jsonl(tmp_path / "text.jsonl", [TEXT])


def make(train: Any, tokenizer: Any, **settings: Any) -> TextDataModule:
    settings = {"block_size": T, "batch_size": 2, "seed": 1} | settings
    return TextDataModule(train=train, tokenizer=tokenizer, **settings)


def rows(batches: Any) -> list[list[int]]:
    return [row for batch in batches for row in split_batch(batch)[0].tolist()]


def cut(start: list[int], stream: list[int]) -> list[list[int]]:
    """The windows of a stream, by hand."""
    own = T - len(start)
    return [start + stream[at : at + own] for at in range(0, len(stream) - own + 1, own)]


@pytest.mark.parametrize("name", FORMS)
def test_windows_are_those_of_transformers(name: str, text: str) -> None:
    tokenizer, (before, *_) = like(name), FORMS[name]
    start = tokenizer.convert_tokens_to_ids(before)
    assert window_start(tokenizer) == start
    data = make(text, tokenizer, validation=text, test=text)
    stream = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    expected = cut(start, stream)
    assert len(expected) > 20
    assert expected[0] == tokenizer(TEXT, add_special_tokens=True)["input_ids"][:T]
    for loader in (*data.val_dataloader(), *data.test_dataloader()):
        assert rows(loader) == expected
    samples = data.calibration(8)
    assert samples.dtype == torch.int64
    for read in (rows(data.train_dataloader()), samples.tolist()):
        assert {tuple(row) for row in read} <= {tuple(row) for row in expected}
    # Text and tokenizer are the same with and without special tokens; the protocol is not.
    plain, found = make(text, tokenizer, bos=False).describe("train"), data.describe("train")
    assert found["sources"]["text"]["sha256"] == plain["sources"]["text"]["sha256"]
    assert found["sources"]["text"]["tokens"] == len(stream)
    assert found.get("bos", []) == before
    assert ("bos" in found) == bool(before)
    assert "bos" not in plain
    assert rows(make(None, tokenizer, bos=False, test=text).test_dataloader()[0]) == cut([], stream)


def test_a_second_special_token_is_never_predicted(text: str) -> None:
    data = make(text, like("glm"), test=text)
    for batch in (*data.test_dataloader()[0], *data.train_dataloader()):
        assert isinstance(batch, TokenBatch)
        assert batch.targets_BT.tolist() == [[False] * 2 + [True] * (T - 2)] * len(batch.tokens_BT)
    assert all(isinstance(b, torch.Tensor) for b in make(text, like("llama3")).train_dataloader())


@pytest.mark.parametrize("unk", ["<unk>", "<s>"])
def test_whole_words_and_an_unknown_one(unk: str) -> None:
    """The tokenizer knows no "a"; its first entries are special ones."""
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "unk_token": unk})
    assert window_start(tokenizer) == []
    tokenizer.backend_tokenizer.post_processor = like("llama2").backend_tokenizer.post_processor
    assert window_start(tokenizer) == [like("llama2").bos_token_id]


def test_the_option(text: str) -> None:
    llama, gpt2, qwen = like("llama2"), like("gpt2"), like("qwen")
    assert window_start(llama, True) == window_start(llama) == [llama.bos_token_id]
    assert window_start(llama, False) == window_start(gpt2) == []
    assert window_start(gpt2, True) == [gpt2.bos_token_id]
    assert make(text, gpt2, bos=True).describe("train")["bos"] == ["<|endoftext|>"]
    with pytest.raises(SparsifyError, match=r"bos is true, .* bos_token is None; .*leave --data"):
        make(text, qwen, bos=True).setup("fit")
    assert window_start(like("glm"), block_size=4) == like("glm").convert_tokens_to_ids(
        ["[gMASK]", "<sop>"]
    )
    rule = r"block_size is 3, and every window begins with \[gMASK\] <sop>; it must be at least 4"
    with pytest.raises(SparsifyError, match=rule):
        make(text, like("glm"), block_size=3).setup("fit")
    make(text, like("glm"), block_size=3, bos=False).setup("fit")


def test_a_tokenizer_that_changes_the_text_is_refused() -> None:
    class Changes:
        all_special_ids = (1,)

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [1, 5] if add_special_tokens else [4]}

    with pytest.raises(SparsifyError, match=r"ids of 'a' are \[4\], and .* \[1, 5\]; .*bos false"):
        window_start(Changes())  # type: ignore[arg-type]


def stream_of(path: str, tokenizer: Any, **settings: Any) -> Any:
    source = Source(path, streaming=True, shuffle_buffer=0)
    return make({"x": source}, tokenizer, **settings)


@pytest.mark.parametrize("name", ["llama3", "glm", "qwen"])
def test_a_stream_has_the_same_windows_and_resumes_exactly(
    name: str, tmp_path: Path, text: str
) -> None:
    tokenizer = like(name)
    documents = TEXT.split(". ")
    path = write_jsonl(tmp_path / "many.jsonl", documents)
    start, eos = window_start(tokenizer), tokenizer.eos_token_id
    ids = [[eos, *tokenizer(d, add_special_tokens=False)["input_ids"]] for d in documents]
    expected = cut(start, [token for d in ids * 3 for token in d][1:])
    data = stream_of(path, tokenizer)
    loader = data.train_dataloader()
    read = [row for _ in range(20) for row in rows([next(loader)])]
    assert read == expected[:40]
    state = loader.state_dict()
    again = data.train_dataloader()
    again.load_state_dict(state)
    assert rows([next(again)]) == expected[40:42]
    assert ("bos" in state["of"]) == bool(start)
    assert sorted(map(tuple, data.calibration(5).tolist())) == sorted(map(tuple, expected[:5]))
    if start:
        with pytest.raises(SparsifyError, match=r"'bos': .*must be the same to resume"):
            stream_of(path, tokenizer, bos=False).train_dataloader().load_state_dict(state)


def test_a_position_with_other_windows_is_refused(text: str) -> None:
    tokenizer = like("llama3")
    state = make(text, tokenizer).train_dataloader().state_dict()
    make(text, tokenizer).train_dataloader().load_state_dict(state)
    # As many blocks of 17 tokens with one in front as of 16 without: only the token differs.
    other = make(text, tokenizer, bos=False, block_size=T - 1)
    former = other.train_dataloader().state_dict()
    assert "bos" not in former["of"]  # as in checkpoints of earlier versions
    for saved, own in ((state, other), (former, make(text, tokenizer))):
        with pytest.raises(SparsifyError, match=r"'bos': \[0\].*must be the same to resume"):
            own.train_dataloader().load_state_dict(saved)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["gemma", "glm"])
def test_in_a_blend_with_instructions_it_is_context_only(
    name: str, streaming: bool, tmp_path: Path, text: str
) -> None:
    tokenizer = like(name)
    start = window_start(tokenizer)
    turns = [{"q": f"which cat {i}? ", "a": f"the {i}th cat."} for i in range(60)]
    keys: dict[str, Any] = {"prompt_key": "q", "response_key": "a", "streaming": streaming}
    chat = Source(write_rows(tmp_path / "chat.jsonl", turns), 1.0, **keys)
    data = make({"chat": chat, "plain": Source(text, 1.0)}, tokenizer, test={"chat": chat})
    loader = iter(data.train_dataloader())
    batches = [next(loader) for _ in range(10)]
    tokens, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert tokens[:, : len(start)].tolist() == [start] * 20
    assert not targets[:, : len(start)].any()
    plain = targets[:, len(start) :].all(1)
    assert 0 < int(plain.sum()) < 20
    samples = data.calibration(6)
    assert samples[:, : len(start)].tolist() == [start] * 6
    assert int(samples.min()) >= 0
    # The chat's windows: prompts are context, by a count of characters.
    (test,) = data.test_dataloader()
    encoded = tokenizer(
        [t["q"] + t["a"] for t in turns], add_special_tokens=False, return_offsets_mapping=True
    )
    stream = []
    for turn, ids, offsets in zip(
        turns, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        stream += [(tokenizer.eos_token_id, True)] * bool(stream)
        stream += [(i, end > len(turn["q"])) for i, (_, end) in zip(ids, offsets, strict=True)]
    expected = cut([(i, False) for i in start], stream)  # type: ignore[misc, arg-type]
    found = [
        list(zip(*row, strict=True))
        for b in test
        for row in zip(b.tokens_BT.tolist(), b.targets_BT.tolist(), strict=True)
    ]
    assert found == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_two_ranks_read_what_one_reads(streaming: bool, text: str) -> None:
    def of(rank: int, world: int) -> list[list[int]]:
        data = stream_of(text, like("llama2")) if streaming else make(text, like("llama2"))
        kwargs = {"rank": rank, "num_replicas": world}
        data.trainer = SimpleNamespace(strategy=SimpleNamespace(distributed_sampler_kwargs=kwargs))  # type: ignore[assignment]
        loader = iter(data.train_dataloader())
        return [row for _ in range(8 // world) for row in rows([next(loader)])]

    one, first, second = of(0, 1), of(0, 2), of(1, 2)
    assert first == [row for at in range(0, 16, 4) for row in one[at : at + 2]]
    assert second == [row for at in range(2, 16, 4) for row in one[at : at + 2]]
    assert {row[0] for row in one} == {like("llama2").bos_token_id}


def test_how_many_windows_fit() -> None:
    assert fitting_windows(256, 32_000) == 16
    assert fitting_windows(512, 262_144) == 2  # exactly 1 GiB
    assert fitting_windows(513, 262_144) == 1
    assert fitting_windows(8192, 262_144) == 1  # 8 GiB
    assert fitting_windows(2048, 128_256) == 1
    assert fitting_windows(512, 49_152) == 10


def test_smaller_batches_give_equal_figures(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound counts the model's 40,000 logits for each token, not the tokenizer's 120."""
    tokenizer = like("llama3")
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 40_000})).eval()
    sizes: list[int] = []
    losses = SparseCausalLM.window_losses

    def watched(self: SparseCausalLM, batch: Any, *more: Any) -> Any:
        sizes.append(len(batch))
        return losses(self, batch, *more)

    monkeypatch.setattr(SparseCausalLM, "window_losses", watched)

    def measured(**settings: Any) -> tuple[list[int], Any]:
        sizes.clear()
        dense = find_strategy("dense")()
        module = SparseCausalLM.from_model(model, tokenizer, dense)
        data = make(text, None, test=text, **settings)
        quiet_trainer(tmp_path).test(module, data, verbose=False)
        return list(sizes), module.scores

    default, expected = measured()
    assert max(default) == 16
    monkeypatch.setattr(windows, "EVAL_LOGITS", 3 * 4 * T * 40_000)
    small, found = measured()
    assert set(small[:-1]) == {3}
    assert sum(small) == sum(default)
    assert found["text"].loss == pytest.approx(expected["text"].loss, rel=1e-7)
    assert (found["text"].windows, found["text"].targets) == (
        expected["text"].windows,
        expected["text"].targets,
    )
    assert max(measured(eval_batch_size=7)[0]) == 7  # as it is given


def test_without_a_model_the_tokenizer_says_how_many_words(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = like("llama3")
    monkeypatch.setattr(windows, "EVAL_LOGITS", 5 * 4 * T * len(tokenizer))
    data = make(text, tokenizer, test=text)
    assert len(next(iter(data.test_dataloader()[0]))) == 5
