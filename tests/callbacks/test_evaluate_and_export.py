"""The result file, against plain transformers."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsify.models.hashes import hash_parameters
from sparsify.results.result import RESULT_SCHEMA
from tests.conftest import Cli, tiny_llama

BLOCK = 16


def window_means(folder: Path, text: str) -> list[float]:
    """The mean loss of each window, one window at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(text)["input_ids"]
    means = []
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        window = torch.tensor([ids[start : start + BLOCK]])
        with torch.no_grad():
            logits = model(input_ids=window).logits
        means.append(F.cross_entropy(logits[0, :-1], window[0, 1:]).item())
    return means


def test_the_result_is_what_plain_transformers_gets_from_the_export(cli: Cli, text: Path) -> None:
    words = (text / "test.txt").read_text().split()
    parts = {"long": " ".join(words[:300]), "short": " ".join(words[300:])}
    for name, part in parts.items():
        Path(f"{name}.txt").write_text(part)
    cli(
        "fit",
        "--strategy=maskllm",
        '--data.test=["long.txt","short.txt"]',
        "--data.eval_batch_size=5",
    )
    [run] = cli.runs()
    result = json.loads((run / "result.json").read_text())
    means = {name: window_means(run / "export", part) for name, part in parts.items()}
    assert {name: len(m) for name, m in means.items()} == {"long": 18, "short": 6}
    means["overall"] = means["long"] + means["short"]
    for name, values in means.items():
        score = result["scores"][name]
        assert score["loss"] == pytest.approx(sum(values) / len(values), rel=1e-5)
        assert score["perplexity"] == pytest.approx(math.exp(score["loss"]))
        assert score["windows"] == len(values)
        assert score["targets"] == len(values) * (BLOCK - 1)


def test_the_result_names_its_protocol_and_its_run(cli: Cli) -> None:
    cli("fit", "--strategy=maskllm", "--model.seed=3", steps=3)
    [run] = cli.runs()
    result = json.loads((run / "result.json").read_text())
    assert result["schema"] == RESULT_SCHEMA
    keys = {"schema", "date", "versions", "run", "protocol", "scores", "history", "masks", "sha256"}
    assert set(result) == keys
    assert {"sparsify", "torch", "lightning", "transformers", "python"} <= set(result["versions"])
    protocol = result["protocol"]
    assert protocol["split"] == "test"
    assert protocol["base"]["hash"] == hash_parameters(dict(tiny_llama().named_parameters()))
    assert protocol["base"]["dtype"] == "float32"
    assert protocol["base"]["name"] == Path(cli.model[0].partition("=")[2]).name
    assert str(Path.cwd().parent) not in json.dumps(result)  # records travel
    assert protocol["data"]["block_size"] == BLOCK
    source = protocol["data"]["sources"]["test"]
    assert (source["file"], source["tokens"], source["blocks"]) == ("test.txt", 400, 25)
    assert len(source["sha256"]) == 64
    done = result["run"]
    assert (done["pattern"], done["seed"], done["steps"], done["tokens"]) == (
        "2:4",
        3,
        3,
        3 * 4 * BLOCK,
    )
    assert done["sparsity"] == 0.5
    assert done["seconds"] > 0
    assert (done["command"], done["device"], done["processes"]) == ("fit", "cpu", 1)
    assert done["threads"] == torch.get_num_threads()
    assert done["cpu"]
    assert done["strategy"]["settings"]["alpha"] == 3.0
    manifest = json.loads((run / "export" / "sparsity_manifest.json").read_text())
    for key in ("run", "protocol", "scores"):
        assert manifest[key] == result[key]


def test_another_data_or_base_is_another_protocol(cli: Cli, text: Path) -> None:
    cli("test", "--strategy=dense")
    cli("test", "--strategy=magnitude")
    cli("test", "--strategy=dense", f"--data.test={text}/validation.txt")
    cli("test", "--strategy=dense", "--data.block_size=8")
    cli("test", "--strategy=dense", "--model.dtype=bfloat16")
    first, *others = [
        json.loads((run / "result.json").read_text())["protocol"] for run in cli.runs()
    ]
    assert [first == other for other in others] == [True, False, False, False]


def test_no_evaluation_on_request_but_the_checkpoint_stays(cli: Cli) -> None:
    cli("fit", "--strategy=maskllm", "--output.enabled=false")
    [run] = cli.runs()
    assert not (run / "result.json").exists()
    assert not (run / "export").exists()
    assert (run / "checkpoints" / "last.ckpt").is_file()


def test_without_test_text_the_model_is_exported_unmeasured(
    cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--data.test=null", "--output.folder=out", "--trainer.enable_progress_bar=true"
    cli("fit", "--strategy=magnitude", *words)
    assert "no test text was read, so nothing was measured; give --data" in capsys.readouterr().out
    assert json.loads((cli.runs()[0] / "result.json").read_text())["scores"] == {}
    weight = load_file("out/model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert weight.eq(0).float().mean() == 0.5


def test_a_run_that_ends_within_an_epoch_is_validated_and_tested(cli: Cli) -> None:
    cli("fit", "--strategy=maskllm", steps=3)
    [run] = cli.runs()
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    last = {name: value for row in rows for name, value in row.items() if value}
    tested = json.loads((run / "result.json").read_text())["scores"]["overall"]
    assert float(last["test/perplexity"]) == pytest.approx(tested["perplexity"])
    assert float(last["val/perplexity"]) > 1
    assert last["step"] == "3"
