"""The model card of an export, read by the Hub's own library."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, metadata_load
from transformers import PreTrainedTokenizerFast

from sparsify import SparsifyError
from sparsify.cli.main import main
from sparsify.common.file_hashes import hash_file
from sparsify.common.seal import sealed
from sparsify.export.card import CARD, is_of_others, make_card, write_card
from sparsify.export.folder import export
from sparsify.export.manifest import MANIFEST
from sparsify.export.mask_file.index import open_index
from sparsify.results.downstream.report import DOWNSTREAM_SCHEMA
from sparsify.serving.verify import verify
from tests.conftest import Cli, tiny_llama
from tests.export.test_folder import masked_module
from tests.hostile import ESCAPE

PROTOCOL = {
    "split": "test",
    "base": {"name": "tiny", "hash": "ab" * 32, "dtype": "float32"},
    "data": {
        "block_size": 16,
        "bos": ["<s>"],
        "sources": {
            "my.text": {"file": "test.txt"},
            "wiki": {"file": "hf://Salesforce/wikitext", "config": "wikitext-2", "split": "test"},
        },
    },
}
SCORES = {
    name: {"perplexity": value, "loss": 3.0, "windows": 5, "targets": 75}
    for name, value in (("my.text", 20.5), ("wiki", 30.25), ("overall", 25.0))
}
RECORD = {"run": {"steps": 1200, "tokens": 98304}, "protocol": PROTOCOL, "scores": SCORES}


@pytest.fixture(scope="module")
def exported(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with a record."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    export(masked_module(tiny_llama(), tokenizer).masked, folder, RECORD)
    return folder


@pytest.fixture
def out(exported: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(exported, tmp_path / "out")


def edit_base(folder: Path, **entries: Any) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    content["base"].update(entries)
    (folder / MANIFEST).write_text(json.dumps(content))


def card(text: str) -> ModelCard:
    """As the Hub parses it; errors in the metadata are raised."""
    return ModelCard(text, ignore_metadata_errors=False)


def test_the_metadata_says_what_was_measured_and_how(out: Path) -> None:
    edit_base(out, name="meta-llama/Llama-2-7b-hf", license={"license": "llama2"})
    found = card(make_card(out)).data
    assert (found.base_model, found.base_model_relation) == ("meta-llama/Llama-2-7b-hf", "finetune")
    assert (found.license, found.model_name) == ("llama2", "Llama-2-7b-hf-2of4")
    mine, wiki, _ = found.eval_results
    assert (mine.dataset_type, mine.dataset_split, mine.metric_value) == ("my.text", "test", 20.5)
    assert mine.dataset_args == {
        "window": 16,
        "first_tokens": ["<s>"],
        "dtype": "float32",
        "windows": 5,
    }
    assert (wiki.dataset_type, wiki.dataset_config) == ("Salesforce/wikitext", "wikitext-2")


def test_the_text_says_what_is_sparse_how_to_run_it_and_claims_no_speed(out: Path) -> None:
    text = (out / CARD).read_text()
    for part in (
        "| pattern | 2:4 in 14 layers |",
        "| strategy | `magnitude`; the kept weights are the base model's |",
        "| learned in | 1,200 steps, 98,304 tokens |",
        "- `lm_head` (1), 2,048 weights: output head",
        "windows of 16 tokens that do not overlap, each after `<s>`; computed in float32",
        "The dense model was not measured beside it.",
        "vllm serve FOLDER -q sparsify",
        "from sparsify.serving import load",
        "sparsify onnx FOLDER model.onnx",
        "**No speed is claimed.**",
    ):
        assert part in text
    with_dense = make_card(out, dense={"overall": {"perplexity": 12.5}})
    assert "| overall | 12.500 | 25.000 |" in with_dense
    assert "was not measured beside it" not in with_dense


def test_permuted_channels_are_said(out: Path) -> None:
    content = json.loads((out / MANIFEST).read_text())
    assert "channels" not in make_card(out)
    (out / MANIFEST).write_text(json.dumps(content | {"permutation": {"parts": ["residual"]}}))
    assert "| channels | in another order than the base's" in make_card(out)


def test_without_a_record_the_card_says_that_nothing_was_measured(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_llama()
    model.config._name_or_path = str(tmp_path / "base")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / CARD).write_text("---\nlicense: llama3.2\n---\n")
    module = masked_module(model, tokenizer, overrides={"*.down_proj": "4:8"})
    export(module.masked, tmp_path / "out", {})
    text = (tmp_path / "out" / CARD).read_text()
    assert "Not measured" in text
    assert "- 2 layers are not 2:4" in text
    assert str(tmp_path) not in text
    data = card(text).data
    assert (data.eval_results, data.license, data.base_model) == (None, "llama3.2", None)


# -- whose card it is ------------------------------------------------------------------------------


def test_an_edited_card_is_never_overwritten(
    out: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    assert not is_of_others(out / CARD)
    edited = (out / CARD).read_text().replace("## Limits", "## Limits and thanks")
    (out / CARD).write_text(edited)
    assert is_of_others(out / CARD)
    with pytest.raises(SparsifyError, match="stays; write the card to another file"):
        write_card(out / CARD, make_card(out))
    module = masked_module(tiny_llama(), tokenizer)
    export(module.masked, out, {"run": 2}, overwrite=True)
    assert (out / CARD).read_text() == edited
    assert "is your own and was kept" in caplog.text
    (out / CARD).unlink()
    (out / CARD).mkdir()
    assert is_of_others(out / CARD)


def test_an_untouched_card_is_written_anew(out: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    former = (out / CARD).read_text()
    module = masked_module(tiny_llama(), tokenizer, pattern="1:4")
    export(module.masked, out, {}, overwrite=True)
    text = (out / CARD).read_text()
    assert text != former
    assert "1:4 in 14 layers" in text
    assert not is_of_others(out / CARD)


def test_the_command_writes_the_card_again(
    out: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (out / CARD).unlink()
    main_ok("card", str(out))
    assert "| overall | 25.000 |" in (out / CARD).read_text()
    (out / CARD).write_text("# mine\n")
    with pytest.raises(SystemExit, match="^2$"):
        main(["card", str(out)])
    assert "--output FILE" in capsys.readouterr().err
    assert (out / CARD).read_text() == "# mine\n"
    main_ok("card", str(out), "--output", str(tmp_path / "card.md"))
    assert card((tmp_path / "card.md").read_text()).data.library_name == "transformers"


def main_ok(*words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert not stop.value.code


def test_a_fit_leaves_its_results_and_the_command_adds_what_was_measured_since(
    cli: Cli, tmp_path: Path
) -> None:
    cli("fit", "--strategy=magnitude")
    [run] = cli.runs()
    result = json.loads((run / "result.json").read_text())
    found = ModelCard.load(run / "export" / CARD)
    data = found.data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["sparsify", "sparsity", "2of4", "magnitude"]
    assert "base_model" not in metadata_load(run / "export" / CARD)  # a folder is none of the Hub's
    assert {r.dataset_name: r.metric_value for r in data.eval_results} == {
        name: score["perplexity"] for name, score in result["scores"].items()
    }
    assert {r.dataset_args["window"] for r in data.eval_results} == {16}
    score = dict(result["scores"]["overall"])
    row = f"| overall | {score['perplexity']:.3f} | {score['loss']:.4f} | {score['windows']} |"
    assert row in found.text
    assert str(Path(cli.model[0].partition("=")[2]).parent) not in found.content
    assert str(Path.cwd()) not in found.content
    report = verify(run / "export")
    assert report.ok
    assert "README" not in str(report.to_dict())

    dense = tmp_path / "dense" / "result.json"
    dense.parent.mkdir()
    result["run"]["pattern"] = "dense"
    result["scores"]["overall"]["perplexity"] = 7.25
    dense.write_text(json.dumps(sealed(result)))
    report = {
        "schema": DOWNSTREAM_SCHEMA,
        "protocol": {
            "masks": open_index(run / "export").digest,
            "manifest": "of another export of the same masks",
            "dtype": "float32",
            "limit": None,
            "tasks": {},
        },
        "versions": {"lm_eval": "0.4.12"},
        "results": {
            "arc_easy": {
                "metric": "acc",
                "examples": 10,
                "dense": {"value": 0.5, "stderr": None},
                "sparse": {"value": 0.4, "stderr": 0.01},
            }
        },
    }
    (run / "downstream.json").write_text(json.dumps(report))
    main_ok("card", str(run), "--dense", str(dense))
    found = ModelCard.load(run / "export" / CARD)
    assert f"| overall | 7.250 | {score['perplexity']:.3f} |" in found.text
    assert "arc_easy" not in found.text
    digest = hash_file(run / "export" / MANIFEST)
    report["protocol"]["manifest"] = digest  # type: ignore[index]
    (run / "downstream.json").write_text(json.dumps(report))
    main_ok("card", str(run))
    found = ModelCard.load(run / "export" / CARD)
    assert "| arc_easy | acc | 10 | 0.5000 | 0.4000 ± 0.0100 |" in found.text
    assert found.data.eval_results[-1].dataset_type == "arc_easy"

    result["protocol"]["data"]["block_size"] = 8
    dense.write_text(json.dumps(sealed(result)))
    with pytest.raises(SystemExit, match="^2$"):
        main(["card", str(run), "--dense", str(dense)])
    assert ModelCard.load(run / "export" / CARD).content == found.content


def test_a_merged_model_has_no_scores_of_the_unmerged_one(cli: Cli) -> None:
    cli("fit", "--strategy=magnitude")
    [run] = cli.runs()
    assert json.loads((run / "result.json").read_text())["scores"]
    content = json.loads((run / "export" / MANIFEST).read_text())
    content.pop("scores", None)
    (run / "export" / MANIFEST).write_text(json.dumps(content))
    main_ok("card", str(run))
    assert "| overall |" in (run / "export" / CARD).read_text()  # those of the result beside it
    content["merged"] = [{"adapter": "lora"}]
    (run / "export" / MANIFEST).write_text(json.dumps(content))
    main_ok("card", str(run))
    assert "Not measured" in (run / "export" / CARD).read_text()


# -- what others wrote -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "base", "shown"),
    [
        ("owner/model", "owner/model", "[owner/model](https://huggingface.co/owner/model)"),
        ("owner/repo/file.gguf", "owner/repo", "[owner/repo]"),
        ("gpt2", None, "`gpt2`"),
        ("../models/llama", None, "`llama`"),
        ("owner/a--b", None, "`a--b`"),
        ("/home/me/models/secret", None, "`secret`"),
        ("C:\\Users\\me\\model", None, "`model`"),
        ("embedded", None, "The embedded model of sparsify"),
    ],
)
def test_only_an_id_of_the_hub_is_a_base(
    name: str, base: str | None, shown: str, out: Path
) -> None:
    edit_base(out, name=name)
    text = make_card(out)
    assert card(text).data.base_model == base
    assert shown in text
    assert "/home/me" not in text
    assert "Users" not in text


def test_nothing_of_a_hostile_manifest_is_obeyed(out: Path) -> None:
    content = json.loads((out / MANIFEST).read_text())
    bad = f"a\n---\nlicense: mit\n| <script> `x` {ESCAPE}"
    content["base"]["name"] = content["strategy"]["class"] = content["dtype"] = bad
    content["coverage"]["dense"][0].update(name=bad, reason=bad)
    content["scores"] = {bad: {"perplexity": 2.0}, "x": {"perplexity": "many"}, "y": 1}
    content["run"], content["protocol"] = [], {"data": 3, "base": bad}
    (out / MANIFEST).write_text(json.dumps(content))
    text = make_card(out)
    found = card(text)
    assert found.data.license is None
    assert [r.metric_value for r in found.data.eval_results] == [2.0]
    assert found.text.count("\n---") == 0
    assert "| <script>" not in found.text
    assert "\x1b" not in found.text
