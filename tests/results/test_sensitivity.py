"""What each block loses by its masks, against plain models with weights set to zero by hand."""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsify.cli.main import main
from sparsify.masking.layer import masked_layers
from sparsify.models.perplexity import Score
from sparsify.results.sensitivity import kept_dense, measure_sensitivity
from tests.conftest import SIZES, Cli
from tests.masking.test_inject import TOKENS, mask_by_magnitude

BLOCK = 16
LAYERS = 6
COMMAND = ["sensitivity", "--strategy=magnitude"]


def six_blocks() -> LlamaForCausalLM:
    """A tiny Llama with more blocks than the last four."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": LAYERS})).eval()


@pytest.fixture
def six(cli: Cli, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The option that names it as a folder."""
    six_blocks().save_pretrained("six")
    tokenizer.save_pretrained("six")
    return ["--model.name_or_path=six"]


def loss_by_hand(pruned: Iterable[int], ids: list[int]) -> float:
    """The mean loss of all windows with 2:4 magnitude masks in these blocks' linear layers."""
    model = six_blocks()
    for block in pruned:
        for layer in model.model.layers[block].modules():
            if isinstance(layer, torch.nn.Linear):
                groups = layer.weight.data.view(-1, 4)
                groups.scatter_(1, groups.abs().argsort(1)[:, :2], 0.0)
    means = []
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        window = torch.tensor(ids[start : start + BLOCK])
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0]
        means.append(F.cross_entropy(logits[:-1], window[1:]).item())
    return sum(means) / len(means)


def found(run: Path) -> dict[str, Any]:
    return json.loads((run / "sensitivity.json").read_text(encoding="utf-8"))


def test_every_case_is_the_plain_model_with_these_blocks_pruned(
    cli: Cli, six: list[str], text: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    pytest.importorskip("matplotlib")
    cli(*COMMAND, *six)
    [run] = cli.runs()
    result = found(run)
    ids = tokenizer((text / "validation.txt").read_text())["input_ids"]
    every = set(range(LAYERS))
    dense, pruned = loss_by_hand([], ids), loss_by_hand(every, ids)

    def check(scores: dict[str, Any], loss: float) -> None:
        for name in ("validation", "overall"):
            assert scores[name]["loss"] == pytest.approx(loss, rel=1e-5)
            assert scores[name]["windows"] == len(ids) // BLOCK

    check(result["dense"], dense)
    check(result["pruned"], pruned)
    names = [block["name"] for block in result["blocks"]]
    assert names == [f"model.layers.{i}" for i in range(LAYERS)]
    for i, block in enumerate(result["blocks"]):
        alone_pruned, alone_dense = loss_by_hand([i], ids), loss_by_hand(every - {i}, ids)
        check(block["alone_pruned"], alone_pruned)
        check(block["alone_dense"], alone_dense)
        assert block["loss_increase"] == pytest.approx(alone_pruned - dense, abs=1e-5)
        assert block["loss_decrease"] == pytest.approx(pruned - alone_dense, abs=1e-5)
    few = {"first 1": {0}, "last 1": {5}, "last 4": {2, 3, 4, 5}}
    assert result["kept_dense"].keys() == few.keys()
    for name, kept in few.items():
        check(result["kept_dense"][name], loss_by_hand(every - kept, ids))

    assert result["schema"] == "sparsify.sensitivity/1"
    assert result["protocol"]["split"] == "validation"
    assert result["protocol"]["windows"]["overall"] == len(ids) // BLOCK
    assert result["run"]["pattern"] == "2:4"
    assert (run / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert not (run / "result-validation.json").exists()


def test_equal_cases_are_measured_once(model: LlamaForCausalLM) -> None:
    mask_by_magnitude(model, exclude=["model.layers.1.*"])
    layers = masked_layers(model)
    seen = []

    def measure() -> dict[str, Score]:
        dense = frozenset(n for n, layer in layers.items() if layer.scope.masking == "dense")
        seen.append(dense)
        return {"overall": Score(float(len(dense)), 1.0, 1, 1)}

    result = measure_sensitivity(model, measure)
    assert seen == [frozenset(layers), frozenset()]  # the second block has no masks
    first, second = result.blocks
    assert (first.loss_increase, first.loss_decrease) == (-7.0, -7.0)
    assert (second.loss_increase, second.loss_decrease) == (0.0, 0.0)
    assert list(result.kept_dense) == ["first 1", "last 1"]


def test_layers_get_their_own_scope_back(model: LlamaForCausalLM) -> None:
    dense = model(input_ids=TOKENS).logits
    scope = mask_by_magnitude(model)
    pruned = model(input_ids=TOKENS).logits
    everything = masked_layers(model).values()
    with kept_dense(everything):
        torch.testing.assert_close(model(input_ids=TOKENS).logits, dense)
    with pytest.raises(KeyError, match="stop"), kept_dense(everything):
        raise KeyError("stop")
    assert all(layer.scope is scope for layer in masked_layers(model).values())
    assert torch.equal(model(input_ids=TOKENS).logits, pruned)


def test_a_checkpoint_is_measured_by_its_masks(cli: Cli) -> None:
    cli("fit", "--strategy=maskllm", "--model.optimizer.init_args.lr=0.1", steps=4)
    checkpoint = f"--ckpt_path={cli.runs()[0]}/checkpoints/last.ckpt"
    main(["validate", checkpoint, *cli.trainer])
    main(["sensitivity", checkpoint, *cli.trainer])
    cli("sensitivity", "--strategy=maskllm")
    _, validated, learned, start = cli.runs()
    scores = json.loads((validated / "result-validation.json").read_text())["scores"]
    assert found(learned)["pruned"] == scores
    assert found(learned)["dense"] == found(start)["dense"]
    assert found(learned)["pruned"] != found(start)["pruned"]
    assert found(learned)["run"]["steps"] == 4


def test_the_tables_and_a_part_of_the_text(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--trainer.limit_val_batches=2", "--data.eval_batch_size=3"]
    cli(*COMMAND, *words, "--trainer.enable_progress_bar=true")
    page = capsys.readouterr().out
    for part in ("Magnitude 2:4 on", "pruned alone", "nats more", "kept dense", "sensitivity.json"):
        assert part in page
    assert found(cli.runs()[0])["pruned"]["overall"]["windows"] == 6


def test_without_matplotlib_there_is_a_hint(
    cli: Cli, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    cli(*COMMAND, "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=true")
    assert "pip install 'sparsify-llm[plot]'" in capsys.readouterr().out
    run = cli.runs()[0]
    assert found(run)["blocks"]
    assert not (run / "sensitivity.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.validation=null"], "no validation text.*give --data.validation FILE"),
        (["--trainer.limit_val_batches=0"], "limit_val_batches is 0.*nothing is measured"),
        (["--strategy=dense"], "Dense masks nothing"),
        (
            ["--strategy=sparsegpt", "--model.strategy.update_weights=true"],
            "base weights of SparseGPT are updated.*only chooses masks",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(
    cli: Cli, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    strategy = [] if words[0].startswith("--strategy") else COMMAND[1:]
    with pytest.raises(SystemExit, match="^2$"):
        cli(COMMAND[0], *strategy, *words)
    assert re.search(message, capsys.readouterr().err)


def test_the_embedded_model(cli: Cli) -> None:
    cut = ["--trainer.limit_val_batches=1", "--data.eval_batch_size=1", "--data.block_size=64"]
    main([*COMMAND, *cli.trainer, *cut])
    result = found(cli.runs()[0])
    assert len(result["blocks"]) == 6
    assert set(result["dense"]) == {"shakespeare", "bible", "python", "overall"}
    assert result["pruned"]["overall"]["loss"] > result["dense"]["overall"]["loss"]
