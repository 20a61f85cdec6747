from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from sparsify.cli.main import main
from sparsify.data import Source, TextDataModule

FOLDER = Path(str(files("sparsify.configs"))) / "data"
EXPECTED: dict[str, dict[str, dict[str, Source]]] = {
    "c4": {
        "train": {"c4": Source("hf://allenai/c4", config="en", streaming=True)},
        "validation": {
            "c4": Source(
                "hf://allenai/c4", config="en", split="validation", streaming=True, documents=1000
            )
        },
        "test": {},
    },
    "fineweb": {
        "train": {
            "fineweb": Source("hf://HuggingFaceFW/fineweb", config="sample-10BT", streaming=True)
        },
        "validation": {},
        "test": {},
    },
    "wikitext2": {
        "test": {
            "wikitext2": Source(
                "hf://Salesforce/wikitext", config="wikitext-2-raw-v1", split="test", joined=True
            )
        },
    },
}


def build(*names: str) -> TextDataModule:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TextDataModule, "data")
    parsed = parser.parse_args([f"--config={FOLDER / name}.yaml" for name in names])
    data: TextDataModule = parser.instantiate(parsed).data
    return data


def test_every_config_builds_its_sources() -> None:
    assert {file.stem for file in FOLDER.glob("*.yaml")} == EXPECTED.keys()
    for name, expected in EXPECTED.items():
        found: Any = build(name).sources
        assert {split: found[split] for split in expected} == expected
    both = build("c4", "wikitext2").sources
    assert both["train"] == EXPECTED["c4"]["train"]
    assert both["test"] == EXPECTED["wikitext2"]["test"]


@pytest.mark.parametrize("name", EXPECTED)
def test_the_command_line_takes_it_beside_a_model(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["sparsify"])
    options = ["--strategy=maskllm", f"--config={FOLDER / name}.yaml", "--data.block_size=2048"]
    with pytest.raises(SystemExit, match="^0$"):
        main(["fit", *options, "--model.name_or_path=some/model", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["block_size"] == 2048
    for split, sources in EXPECTED[name].items():
        assert (printed["data"][split] or {}) == {n: vars(s) for n, s in sources.items()}
