import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from sparsify import Draw
from sparsify.common.errors import SparsifyError
from sparsify.data import Source, TextDataModule
from sparsify.data.documents import Instruction, read_documents
from sparsify.data.packing import pack, to_batch
from sparsify.data.sources import BadRows
from sparsify.models.perplexity import PerplexityMeter, mean_loss, token_losses
from sparsify.models.token_batch import TokenBatch, split_batch
from sparsify.strategies.dense import Dense
from sparsify.training.step import BatchRun
from tests.conftest import masked_model, tiny_llama
from tests.data.conftest import words, write_jsonl, write_parquet, write_rows
from tests.data.tokenizers import like

# A turn is "w190 <user> text w191": each part is one word of the tokenizer.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "w190 {{ 'w181' if m.role == 'assistant' else 'w180' }} {{ m.content }} w191\n{% endfor %}"
    "{% if add_generation_prompt %}w190 w181 {% endif %}"
)


def read(path: str, tokenizer: Any = None, bad_rows: str = "error", **settings: Any) -> list[Any]:
    return list(read_documents(Source(path, **settings), bad_rows, BadRows(), tokenizer))


def learned(documents: list[Instruction]) -> list[list[str]]:
    return [[d.text[start:end] for start, end in d.learned] for d in documents]


def turns(*said: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in said]}


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def ids(marked: str) -> list[int]:
    """Ids by hand; ``-w3`` is context only: the complement of its id."""
    out = []
    for word in marked.split():
        bare = word.removeprefix("-")
        value = 0 if bare == "eos" else int(bare[1:]) + 2
        out.append(~value if word.startswith("-") else value)
    return out


def test_prompt_and_response(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"q": "w1 w2 ", "a": "w3"}, {"q": "", "a": "w4 w5"}, {"q": "w6 ", "a": "w7"}]
    keys = {"prompt_key": "q", "response_key": "a"}
    expected = [
        Instruction("w1 w2 w3", ((6, 8),)),
        Instruction("w4 w5", ((0, 5),)),
        Instruction("w6 w7", ((3, 5),)),
    ]
    assert read(write_rows(tmp_path / "a.jsonl", rows), **keys) == expected
    assert read(write_parquet(tmp_path / "a.parquet", rows), **keys) == expected
    packed = pack(expected, tokenizer, 3, "x")
    # The end of text after a response is learned.
    assert packed.blocks.flatten().tolist() == ids("-w1 -w2 w3 eos w4 w5 eos -w6 w7")
    batch = to_batch(packed.blocks, masked=True)
    assert isinstance(batch, TokenBatch)
    assert batch.tokens_BT.flatten().tolist() == ids("w1 w2 w3 eos w4 w5 eos w6 w7")
    assert batch.targets_BT.flatten().tolist() == [v >= 0 for v in packed.blocks.flatten()]
    assert batch.tokens_BT.dtype == torch.int64
    assert batch.targets_BT.dtype == torch.bool


def test_the_token_across_the_border_is_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    packed = pack([Instruction("w1 w23 w4", ((5, 9),))], tokenizer, 3, "x")
    assert packed.blocks.tolist() == [ids("-w1 w23 w4")]


@pytest.mark.parametrize("name", ["gpt2", "llama3", "gemma"])
def test_spaces_at_the_ends_of_a_response_are_learned(name: str) -> None:
    tokenizer = like(name)
    if name == "gpt2":
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    before = str(tokenizer.backend_tokenizer.post_processor)
    prompt, response = "the cat  ", " sat on mat   "
    whole = tokenizer(prompt + response, add_special_tokens=False)["input_ids"]
    context = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    document = Instruction(prompt + response, ((len(prompt), len(prompt + response)),))
    ids = pack([document, "the"], tokenizer, 2, "x").blocks.flatten().tolist()
    expected = [~i if n < context else i for n, i in enumerate([*whole, tokenizer.eos_token_id])]
    assert ids[: len(expected)] == expected
    assert str(tokenizer.backend_tokenizer.post_processor) == before


def test_messages(tmp_path: Path, chat: PreTrainedTokenizerFast) -> None:
    rows = [
        turns(("user", "w1"), ("assistant", "w2 w3"), ("user", "w4"), ("assistant", "w5")),
        turns(("system", "w6"), ("user", "w7"), ("assistant", "w8"), ("user", "w9")),
    ]
    for path in (
        write_rows(tmp_path / "a.jsonl", rows),
        write_parquet(tmp_path / "a.parquet", rows),
    ):
        documents = read(path, chat, messages_key="messages")
        assert learned(documents) == [["w2 w3 w191\n", "w5 w191\n"], ["w8 w191\n"]]
    first = "-w190 -w180 -w1 -w191 -w190 -w181 w2 w3 w191 -w190 -w180 -w4 -w191 -w190 -w181 w5 w191"
    second = "-w190 -w180 -w6 -w191 -w190 -w180 -w7 -w191 -w190 -w181 w8 w191 -w190 -w180 -w9 -w191"
    assert pack(documents, chat, 34, "x").blocks[0].tolist() == ids(f"{first} eos {second}")
    # A document that ends in context: the end of text after it is context too.
    packed = pack(documents[::-1], chat, 34, "x")
    assert packed.blocks[0].tolist() == ids(f"{second} -eos {first}")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": "hi"}, "value of 'messages' is not a list of messages"),
        ({"messages": ["hi"]}, "value of 'messages' is not a list of messages"),
        (turns(("user", None)), "value of 'role and content' is not a string"),
        ({"messages": []}, "no message of the assistant"),
        (turns(("assistant", "w1"), ("user", "w2")), "the assistant's message comes first"),
        (turns(("user", "w1")), "no message of the assistant"),
        (turns(("tool", "w1"), ("assistant", "w2")), r"messages .* template refuses \(no tools\)"),
        ({}, "no key 'messages'"),
    ],
)
def test_bad_messages(
    tmp_path: Path, chat: PreTrainedTokenizerFast, row: dict[str, Any], reason: str
) -> None:
    good = turns(("user", "w1"), ("assistant", "w2"))
    path = write_rows(tmp_path / "a.jsonl", [good, row])
    with pytest.raises(SparsifyError, match=rf"a\.jsonl:2: {reason}"):
        read(path, chat, messages_key="messages")
    assert len(read(path, chat, "skip", messages_key="messages")) == 1


# As TEMPLATE, with "w195 TOOLS w191" before; a call is its name, its argument a and their number.
CALLING = (
    "{% if tools %}w195{% for t in tools %} {{ t.function.name }} {{ t | length }}{% endfor %} w191"
    "\n{% endif %}"
    "{% for m in messages %}w190 {{ 'w181' if m.role == 'assistant' else 'w180' }} "
    "{{ m.content or '' }}{% if m.tool_calls is defined %}{% for call in m.tool_calls %}"
    "{{ call.function.name }} {{ call.function.arguments.a }} "
    "{{ call.function.arguments | length }}{% endfor %}{% endif %} w191\n{% endfor %}"
    "{% if add_generation_prompt %}w190 w181 {% endif %}"
)


def call(**arguments: str) -> dict[str, Any]:
    return {"function": {"name": "w50", "arguments": arguments}}


def calling_rows() -> list[dict[str, Any]]:
    """Two conversations whose tools and calls have other fields."""
    tools = [{"function": {"name": "w51"}}, {"function": {"name": "w52"}, "type": "function"}]
    result = {"role": "tool", "content": "w9"}
    asked = {"role": "user", "content": "w8"}
    first = [asked, {"role": "assistant", "content": None, "tool_calls": [call(a="w1")]}]
    said = {"role": "assistant", "content": "w2"}
    both = {"role": "assistant", "content": "w3 ", "tool_calls": [call(a="w4", b="w5")]}
    return [
        {"messages": [*first, result, said], "tools": tools},
        {"messages": [asked, both], "tools": None},
    ]


def test_calls_and_tools_reach_the_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = CALLING
    rows = calling_rows()
    as_text = [row | {"tools": row["tools"] and json.dumps(row["tools"])} for row in rows]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_rows(tmp_path / "hub" / "train.jsonl", rows)
    for path in (
        write_rows(tmp_path / "a.jsonl", rows),
        write_rows(tmp_path / "b.jsonl", as_text),
        write_parquet(tmp_path / "a.parquet", rows),
        write_parquet(tmp_path / "b.parquet", as_text),
        datasets.Dataset.from_list(rows),
        f"hf://{tmp_path / 'hub'}",
    ):
        documents = read(path, tokenizer, messages_key="messages")
        assert learned(documents) == [["w50 w1 1 w191\n", "w2 w191\n"], ["w3 w50 w4 2 w191\n"]]
        assert documents[0].text.startswith("w195 w51 1 w52 2 w191\nw190 w180 w8 w191\n")
        assert documents[1].text.startswith("w190 w180 w8 w191\n")


def test_calls_and_tools_that_cannot_be_written(tmp_path: Path, chat: Any) -> None:
    rows = calling_rows()
    empty = turns(("user", "w1"), ("assistant", "w2")) | {"tools": []}
    empty["messages"][1]["tool_calls"] = []
    for row, reason in (
        (
            rows[1] | {"tools": rows[0]["tools"]},
            "tools that the chat template leaves out: use the tokenizer",
        ),
        (rows[1], "tool_calls that the chat template leaves out: use the tokenizer"),
        (rows[1] | {"tools": "w1"}, "value of 'tools' is not a list of tools"),
        (
            {"messages": [rows[1]["messages"][0], {"role": "assistant", "tool_calls": "w1"}]},
            "value of 'tool_calls' is not a list of calls",
        ),
    ):
        path = write_rows(tmp_path / "a.jsonl", [empty, row])
        with pytest.raises(SparsifyError, match=rf"a\.jsonl:2: {reason}"):
            read(path, chat, messages_key="messages")
        assert len(read(path, chat, "skip", messages_key="messages")) == 1


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("'' + none", "can only concatenate str"),
        ("m.x.y", "has no attribute 'x'"),
        ("1 / 0", "division by zero"),
        ("'%d' | format('w1')", "real number is required"),
    ],
)
def test_whatever_a_template_fails_with_is_of_its_row(
    tmp_path: Path, chat: Any, mistake: str, said: str
) -> None:
    chat.chat_template = "{% if messages[0].role == 'system' %}{{ " + mistake + " }}{% endif %}"
    chat.chat_template = (
        "{% for m in messages[:1] %}" + chat.chat_template + "{% endfor %}" + TEMPLATE
    )
    good = turns(("user", "w1"), ("assistant", "w2"))
    bad = turns(("system", "w3"), ("user", "w1"), ("assistant", "w2"))
    path = write_rows(tmp_path / "a.jsonl", [good, bad])
    with pytest.raises(SparsifyError, match=rf":2: .* template refuses \(.*{said}.*\); .*skip"):
        read(path, chat, messages_key="messages")
    assert len(read(path, chat, "skip", messages_key="messages")) == 1


def test_a_template_that_rewrites_turns_is_refused(
    tmp_path: Path, chat: PreTrainedTokenizerFast
) -> None:
    chat.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.content if loop.last }}")
    rows = [turns(("user", "w1"), ("assistant", "w2"), ("user", "w3"))]
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(SparsifyError, match=":1: turns that the chat template changes .* one turn"):
        read(path, chat, messages_key="messages")


def test_errors(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_rows(tmp_path / "a.jsonl", [turns(("user", "w1"), ("assistant", "w2"))])
    with pytest.raises(SparsifyError, match="no chat template to write them: .*chat_template"):
        read(path, tokenizer, messages_key="messages")
    keys = {"prompt_key": "q", "response_key": "a"}
    for row, reason in (
        ({"q": "w1"}, "no key 'a'"),
        ({"q": "w1", "a": " "}, "empty text"),
        ({"q": 1, "a": "w1"}, "value of 'q' is not a string"),
    ):
        with pytest.raises(SparsifyError, match=f":1: {reason}"):
            read(write_rows(tmp_path / "b.jsonl", [row]), **keys)

    class Slow:
        eos_token_id = 0
        is_fast = False

    with pytest.raises(SparsifyError, match="x: Slow does not tell .*: use a fast tokenizer"):
        pack([Instruction("w1", ((0, 2),))], Slow(), 2, "x")


def make(train: Any, tokenizer: Any, **settings: Any) -> TextDataModule:
    settings = {"block_size": 8, "batch_size": 2, "seed": 1} | settings
    return TextDataModule(train=train, tokenizer=tokenizer, **settings)


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_of_a_blend_with_plain_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, streaming: bool
) -> None:
    rows = [{"q": words(i, 3) + " ", "a": words(100 + i, 1 + i % 3)} for i in range(60)]
    keys: dict[str, Any] = {"prompt_key": "q", "response_key": "a", "streaming": streaming}
    sources = {
        "chat": Source(write_rows(tmp_path / "chat.jsonl", rows), 1.0, **keys),
        "plain": Source(write_jsonl(tmp_path / "plain.jsonl", [words(150, 45)]), 1.0),
    }
    data = make(sources, tokenizer, validation=sources)
    loader = iter(data.train_dataloader())
    seen = [next(loader) for _ in range(8)]
    assert all(isinstance(batch, TokenBatch) for batch in seen)
    assert all(batch.tokens_BT.shape == batch.targets_BT.shape == (2, 8) for batch in seen)
    tokens = torch.cat([batch.tokens_BT for batch in seen])
    targets = torch.cat([batch.targets_BT for batch in seen])
    plain = (tokens >= 152).all(1)
    assert 0 < int(plain.sum()) < 16
    assert bool(targets[plain].all())
    # Prompts are of w0 to w61, responses of w100 to w161; the end of text is learned too.
    assert torch.equal(targets[~plain], (tokens[~plain] >= 102) | (tokens[~plain] == 0))
    chat, text = data.val_dataloader()
    assert isinstance(next(iter(chat)), TokenBatch)
    assert isinstance(next(iter(text)), torch.Tensor)
    assert bool((data.calibration(4) >= 0).all())


def test_a_stream_marks_the_end_of_text_over_block_borders(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    # Three tokens a document and three a block: each end of text is the first of its block's text.
    rows = [{"q": "w1 w2 ", "a": "w3"}, {"q": "w4 w5 ", "a": "w6"}]
    source = Source(
        write_rows(tmp_path / "a.jsonl", rows),
        prompt_key="q",
        response_key="a",
        streaming=True,
        shuffle_buffer=0,
    )
    data = make({"x": source}, tokenizer, block_size=3, batch_size=1)
    loader = data.train_dataloader()
    stream = ids("-w1 -w2 w3 eos -w4 -w5 w6 eos " * 6)
    for start in range(0, 36, 3):
        state = loader.state_dict()
        loader = data.train_dataloader()
        loader.load_state_dict(state)
        tokens, targets = next(loader)
        expected = torch.tensor([stream[start : start + 3]])
        assert torch.equal(tokens, torch.where(expected < 0, ~expected, expected))
        assert torch.equal(targets, expected >= 0)


def by_hand(logits: torch.Tensor, batch: TokenBatch) -> list[list[float]]:
    """For each window the losses of its targets, one at a time."""
    losses = []
    for window, tokens, targets in zip(logits, *batch, strict=True):
        losses.append(
            [
                F.cross_entropy(window[t - 1], tokens[t]).item()
                for t in range(1, len(tokens))
                if targets[t]
            ]
        )
    return losses


@pytest.fixture
def batch() -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 64, (4, 16), generator=generator)
    targets = torch.rand(4, 16, generator=generator) < 0.3
    targets[2] = False
    targets[2, 0] = True  # the first token of a window is never predicted
    return TokenBatch(tokens, targets)


def test_the_loss_is_the_mean_over_targets(batch: TokenBatch) -> None:
    model = tiny_llama()
    masked = masked_model(model, Dense())
    run = BatchRun(masked, batch, Draw(0, 0, 0))
    loss, task_loss, logits, *_ = run("dense")
    assert torch.equal(loss, task_loss)
    losses = [value for window in by_hand(logits, batch) for value in window]
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert run.task_loss is not None
    assert run.task_loss.item() == loss.item()
    everything = batch._replace(targets_BT=torch.ones_like(batch.targets_BT))
    plain = BatchRun(masked, batch.tokens_BT, Draw(0, 0, 0))("dense").task_loss
    assert BatchRun(masked, everything, Draw(0, 0, 0))("dense").task_loss.item() == (
        pytest.approx(plain.item(), rel=1e-6)
    )


def test_a_batch_without_target_has_loss_zero_and_a_graph(batch: TokenBatch) -> None:
    model = tiny_llama()
    nothing = batch._replace(targets_BT=torch.zeros_like(batch.targets_BT))
    masked = masked_model(model, Dense())
    model.requires_grad_(True)
    loss = BatchRun(masked, nothing, Draw(0, 0, 0))("dense").task_loss
    assert loss.item() == 0
    loss.backward()
    gradient = model.lm_head.weight.grad
    assert gradient is not None
    assert bool((gradient == 0).all())
    # Even where the model gives no number.
    assert mean_loss(torch.full((4, 15), float("nan")), nothing.targets_BT).item() == 0


def test_perplexity_is_of_targets(batch: TokenBatch) -> None:
    logits = tiny_llama()(input_ids=batch.tokens_BT).logits
    losses = token_losses(logits, batch.tokens_BT).detach()
    meter = PerplexityMeter(["chat", "plain"], torch.device("cpu"))
    for part in (slice(0, 1), slice(1, 4)):
        meter.update("chat", losses[part], batch.targets_BT[part])
    meter.update("plain", losses)
    scores = meter.scores()
    windows = [window for window in by_hand(logits, batch) if window]
    assert len(windows) == scores["chat"].windows == 3
    assert scores["chat"].targets == sum(map(len, windows))
    mean = sum(sum(window) / len(window) for window in windows) / 3
    assert scores["chat"].loss == pytest.approx(mean, rel=1e-6)
    overall = (3 * mean + 4 * losses.mean(1).mean().item()) / 7
    assert scores["overall"].loss == pytest.approx(overall, rel=1e-6)
    assert scores["overall"].windows == 7
    assert type(scores["overall"].targets) is int
    nothing = PerplexityMeter(["chat"], torch.device("cpu"))
    nothing.update("chat", losses[2:3], batch.targets_BT[2:3])
    with pytest.raises(SparsifyError, match="chat: none of its windows has a target"):
        nothing.scores()


def test_moving_and_counting(batch: TokenBatch) -> None:
    moved = batch.to(torch.device("meta"))
    assert {tensor.device.type for tensor in moved} == {"meta"}
    assert batch.numel() == 64
    assert split_batch(batch) == (batch.tokens_BT, batch.targets_BT)
    assert split_batch(batch.tokens_BT) == (batch.tokens_BT, None)
