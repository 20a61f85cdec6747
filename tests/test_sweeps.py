"""Every packaged sweep: the command lines that an agent would make of it are ours."""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsify.cli.main import main
from sparsify.masking.registry import STRATEGIES, plugins

SWEEPS = sorted((Path(str(files("sparsify.configs"))) / "sweeps").glob("*.yaml"))


def choices(parameter: dict[str, Any]) -> list[Any]:
    """The values that a parameter may have; of a range its ends."""
    if "value" in parameter:
        return [parameter["value"]]
    return parameter.get("values") or [parameter["min"], parameter["max"]]


def settings(sweep: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All parameters at their first values, and each alone at its last."""
    found = {name: choices(parameter) for name, parameter in sweep["parameters"].items()}
    first = {name: values[0] for name, values in found.items()}
    yield first
    yield from (first | {name: values[-1]} for name, values in found.items() if values[1:])


def command_line(sweep: dict[str, Any], setting: dict[str, Any]) -> list[str]:
    """As `wandb agent` makes it, whose server sends parameters in alphabetical order."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    args = {name: {"value": setting[name]} for name in sorted(setting)}
    flags = create_sweep_command_args({"args": args})["args"]
    words = create_sweep_command(list(sweep["command"]))
    filled = {"${program}": [sweep["program"]], "${args}": flags}
    return [part for word in words for part in filled.get(word, [word])]


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_its_settings_are_those_of_fit(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = yaml.safe_load(file.read_text())
    assert sweep["metric"] == {"name": "val/perplexity", "goal": "minimize"}
    ranges = [p for p in sweep["parameters"].values() if "min" in p]
    assert sweep["method"] == ("bayes" if ranges else "grid")
    assert set(choices(sweep["parameters"]["strategy"])) <= set(plugins(STRATEGIES))
    for setting in settings(sweep):
        program, *words = command_line(sweep, setting)
        assert program == "sparsify"
        capsys.readouterr()
        with pytest.raises(SystemExit, match="^0$"):
            main([*words, "--print_config"])
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed["trainer"]["logger"]["class_path"].endswith("WandbLogger")
        strategy = printed["model"]["strategy"]
        name = strategy["class_path"] if isinstance(strategy, dict) else strategy
        assert name == plugins(STRATEGIES)[setting["strategy"]].value.replace(":", ".")
        for key in setting.keys() - {"strategy"}:
            assert find(printed, key) == setting[key]


def find(printed: Any, key: str) -> Any:
    """A setting by its name on the command line."""
    for part in key.split("."):
        printed = printed.get("init_args", printed) if part != "init_args" else printed
        printed = printed[part]
    return printed
