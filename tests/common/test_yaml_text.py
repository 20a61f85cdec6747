"""Settings in YAML, as people write them."""

from pathlib import Path

import pytest
import yaml

from sparsify.common.yaml_text import dumps, load
from tests.conftest import Cli


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "12:16", "1:30.5", "12:30:45", "2026-11-29"])
def test_what_yaml_1_1_takes_for_times_is_text(text: str) -> None:
    assert load(text) == text
    assert load(f"a: {text}\nb: [{text}]") == {"a": text, "b": [text]}


def test_other_values_are_as_ever() -> None:
    text = "{a: 1e-3, b: 5E-4, c: 1_000, d: -2, e: 0.5, f: yes, g: off, h: null, i: '1', j: .inf}"
    expected = {
        "a": 1e-3, "b": 5e-4, "c": 1000, "d": -2, "e": 0.5, "f": True, "g": False,
        "h": None, "i": "1", "j": float("inf"),
    }  # fmt: skip
    assert load(text) == expected
    assert load("a/b: c.txt") == {"a/b": "c.txt"}
    with pytest.raises(yaml.YAMLError):
        load("{a: [}")


@pytest.mark.parametrize("text", ["😀/é", "\x7f\x85\u2028\ufffe", "\\ud83d\\ude00", '\n\0"'])
def test_any_text_comes_back(text: str) -> None:
    value = {text: [text, 1, None, True]}
    assert load(dumps(value)) == value
    assert dumps(value).isascii()


def test_patterns_need_no_quotes_in_a_config(cli: Cli) -> None:
    Path("run.yaml").write_text(
        "model:\n  pattern: 2:4\n  overrides:\n    '*.down_proj': 1:4\n    '*.up_proj': 4:8\n"
    )
    cli("fit", "--strategy=maskllm", "--config=run.yaml", steps=1)
    run = cli.runs()[0]
    saved = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert saved["pattern"] == "2:4"
    assert saved["overrides"] == {"*.down_proj": "1:4", "*.up_proj": "4:8"}
    cli("test", f"--ckpt_path={run}/checkpoints/last.ckpt")  # its settings hold the same
    cli("fit", "--strategy=magnitude", "--model.overrides={'*.down_proj': 1:4}", steps=1)
    saved = yaml.safe_load((cli.runs()[-1] / "config.yaml").read_text())["model"]
    assert saved["overrides"] == {"*.down_proj": "1:4"}
