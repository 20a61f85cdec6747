"""Files of others run nothing: every route of docs/security.md, and a checkpoint's settings."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger
from rich.console import Group
from rich.table import Table
from rich.text import Text

from sparsify.cli.commands.output import say
from sparsify.cli.main import main
from sparsify.cli.parser import Parser
from sparsify.cli.short_forms import expand
from sparsify.cli.trainer_cli import SparsifyCLI
from sparsify.common.errors import SparsifyError
from sparsify.common.printable import is_printable, printable
from sparsify.common.seal import content_hash
from sparsify.common.secrets import REDACTED, is_secret, redacted
from sparsify.export.manifest import MANIFEST
from sparsify.masking.registry import allow_current_folder
from sparsify.models.base import load_model, load_skeleton, load_tokenizer
from sparsify.strategies.maskllm import MaskLLM
from sparsify.training.checkpoints.settings import settings_of
from sparsify.training.module import SparseCausalLM
from tests.conftest import Cli, start_in
from tests.hostile import CODE, ESCAPE, Pickled

COMMANDS = ("fit", "validate", "test", "export", "sensitivity")
# Would leave a file if it ran, however it is come by.
POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": "touch OWNED", "shell": True}}


@pytest.fixture(scope="module")
def settings_saved(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text: Path
) -> dict[str, Any]:
    """A whole checkpoint of a run of one step, as it was read."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        start_in(folder, patch)
        Cli(folder, model_folder, text)(
            "fit", "--strategy=maskllm", "--model.strategy.prior=magnitude"
        )
    [path] = folder.glob("runs/maskllm/*/checkpoints/last.ckpt")
    return torch.load(path, weights_only=True)


def evil(saved: dict[str, Any], place: str, value: Any) -> str:
    """The checkpoint with one of its settings replaced; its path."""
    saved = saved | {"hyper_parameters": json.loads(json.dumps(saved["hyper_parameters"]))}
    *parents, last = place.split("/")
    at = saved["hyper_parameters"]["config"]
    for key in parents:
        at = at[key]
    at[last] = value
    # Whoever makes an evil file also makes its hash.
    saved["settings_sha256"] = content_hash(saved["hyper_parameters"]["config"])
    torch.save(saved, "evil.ckpt")
    return "evil.ckpt"


IN_ANY = {
    "class_path": "transformers.PreTrainedTokenizerFast",
    "init_args": {"tokenizer_file": "none.json", "unk_id": POPEN},
}
EVIL = {
    "nested in any": ("data/tokenizer", IN_ANY),
    "as a text": ("data/train", json.dumps(POPEN)),
    "as a text in a text": ("data/train", json.dumps({"a": json.dumps(POPEN)})),
    "data": ("data/train", {"web": POPEN}),
    "calibration": ("model/calibration", POPEN),
    "pattern": ("model/pattern", POPEN),
    "strategy": ("model/strategy", POPEN),
    "helper": ("model/strategy", "helper_mod.S"),
    "strategy's option": ("model/strategy/init_args/alpha", POPEN),
    "prior": ("model/strategy/init_args/prior", POPEN),
    "prior as a text": ("model/strategy/init_args/prior", json.dumps(POPEN)),
    "prior from a helper": ("model/strategy/init_args/prior", "helper_mod.S"),
    "through one of ours": ("model/strategy", "sparsify.strategies.maskllm.torch.hub.load"),
    "optimizer": ("model/optimizer", POPEN),
    "optimizer's option": ("model/optimizer/init_args/lr", POPEN),
    "optimizer from a helper": ("model/optimizer", "helper_mod.S"),
    "callbacks": ("trainer/callbacks", [POPEN]),
    "callback from a helper": ("trainer/callbacks", [{"class_path": "helper_mod.S"}]),
    "logger": ("trainer/logger", POPEN),
    "profiler": ("trainer/profiler", POPEN),
    "plugins": ("trainer/plugins", [POPEN]),
    "trainer's strategy": ("trainer/strategy", POPEN),
    "trainer's option": ("trainer/max_steps", POPEN),
    "a dotted key": ("model", {"strategy.class_path": "helper_mod.S", "strategy": "helper_mod.S"}),
    "a config in the config": ("config", "evil.yaml"),
    "a place to write": (
        "trainer/callbacks",
        [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"dirpath": "OWNED"},
            }
        ],
    ),
    "the export's place": ("output", {"folder": "OWNED", "overwrite": True, "enabled": True}),
    "the root": ("trainer/default_root_dir", "OWNED"),
}


@pytest.mark.parametrize("kind", EVIL)
def test_a_checkpoint_runs_nothing(
    cli: Cli, settings_saved: dict[str, Any], kind: str, audited: None
) -> None:
    Path("helper_mod.py").write_text(CODE)
    Path("evil.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [POPEN]}}))
    path = evil(settings_saved, *EVIL[kind])
    passed: list[str] = []
    for command in COMMANDS:
        with watched() as seen, suppress(SparsifyError):
            words = expand([command, f"--ckpt_path={path}"])
            config = next(word for word in words if word.startswith("--config={"))
            if config not in passed:
                make(json.loads(config.partition("=")[2]))
            passed.append(config)
        for odd in ("Popen", "OWNED", '"helper_mod.S"', "evil.yaml"):
            assert odd not in "".join(passed)
        assert not FOREIGN & {name.partition(".")[0] for name in seen}
        assert not set(WATCHED) & set(seen)
    assert not Path("OWNED").exists()


def test_a_tokenizer_of_a_checkpoint_is_not_made(
    cli: Cli, settings_saved: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    cli("test", f"--ckpt_path={evil(settings_saved, 'data/tokenizer', IN_ANY)}")
    assert "data.tokenizer of the checkpoint's run is left out" in capsys.readouterr().err
    assert not Path("OWNED").exists()


def test_what_is_left_out_of_a_run_is_told(
    cli: Cli, settings_saved: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings_saved["hyper_parameters"]["config"]
    wandb = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {}}
    stop = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {}}
    told: list[str] = []
    trainer = config["trainer"] | {"logger": wandb, "callbacks": [stop], "max_steps": 7}
    taken = settings_of(config | {"trainer": trainer}, True, tell=told.append)
    assert taken["trainer"]["max_steps"] == 7
    assert not {"logger", "callbacks", "default_root_dir"} & set(taken["trainer"])
    assert [line.split()[0] for line in told] == ["trainer.callbacks", "trainer.logger"]
    assert "EarlyStopping" in told[0]
    assert "--logger NAME" in told[1]
    assert settings_of(config, True, tell=told.append)["checkpoint"] == config["checkpoint"]
    assert len(told) == 2, "the default logger is not missed"


def test_a_foreign_strategy_is_named_in_every_command_and_keeps_its_settings(
    cli: Cli, settings_saved: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("foreign_mod.py").write_text(
        "from sparsify.strategies.maskllm import MaskLLM\nclass Mine(MaskLLM):\n    '''Mine.'''\n"
    )
    spec = settings_saved["hyper_parameters"]["config"]["model"]["strategy"]
    options = spec["init_args"] | {"alpha": 17.0}
    path = evil(
        settings_saved, "model/strategy", {"class_path": "foreign_mod.Mine", "init_args": options}
    )
    for command in COMMANDS:
        with pytest.raises(SparsifyError, match="this command: --strategy foreign_mod.Mine"):
            expand([command, f"--ckpt_path={path}"])
    assert "foreign_mod" not in sys.modules
    Path("mine.yaml").write_text("model:\n  strategy: foreign_mod.Mine\n")
    try:
        for named in ("--strategy=foreign_mod.Mine", "--config=mine.yaml"):
            with pytest.raises(SystemExit, match="^0$"):
                main(["fit", f"--ckpt_path={path}", named, "--print_config"])
            strategy = yaml.safe_load(capsys.readouterr().out)["model"]["strategy"]
            assert strategy["class_path"] == "foreign_mod.Mine"
            assert strategy["init_args"]["alpha"] == 17.0
    finally:
        sys.modules.pop("foreign_mod", None)


def test_a_file_in_the_current_folder_takes_no_modules_place(cli: Cli) -> None:
    Path("colorsys.py").write_text(CODE)
    sys.modules.pop("colorsys", None)
    allow_current_folder()
    assert sys.path[-1] == os.getcwd()
    import colorsys

    assert Path(colorsys.__file__).parent != Path.cwd()
    assert not Path("OWNED").exists()


@pytest.mark.filterwarnings("ignore:Found keys that are in the model")
def test_loading_a_checkpoint_in_python_calls_no_function_that_it_names(
    cli: Cli, settings_saved: dict[str, Any]
) -> None:
    Path("helper_mod.py").write_text(CODE)
    evil = {"_instantiator": "helper_mod.S", "strategy": POPEN}
    saved = settings_saved["hyper_parameters"] | evil
    torch.save(settings_saved | {"hyper_parameters": saved}, "evil.ckpt")
    sys.path.append(os.getcwd())
    loaded = SparseCausalLM.load_from_checkpoint(
        "evil.ckpt", strategy=MaskLLM(prior="magnitude"), map_location="cpu"
    )
    assert loaded.strategy.values
    assert not Path("OWNED").exists()


# -- the settings of a checkpoint, at random ------------------------------------------------------

PATHS = st.sampled_from(
    [
        "subprocess.Popen",
        "os.system",
        "helper_mod.S",
        "antigravity.x",
        "torch.hub.load",
        "torch.optim.torch.hub.load",
        "torch.optim.lr_scheduler.LambdaLR",
        "torch.optim.Adam",
        "sparsify.strategies.maskllm.torch.hub.load",
        "sparsify.strategies.magnitude.Magnitude",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "builtins.eval",
    ]
)
KEYS = st.sampled_from(
    ["strategy", "optimizer", "prior", "init_args", "class_path", "lr", "train", "tokenizer", "x"]
    + ["strategy.class_path", "overrides", "calibration", "callbacks", "dict_kwargs"]
)
LEAVES = st.one_of(PATHS, st.integers(), st.booleans(), st.none(), st.text(max_size=5))


def nested(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    spec = st.fixed_dictionaries(
        {"class_path": PATHS}, optional={"init_args": st.dictionaries(KEYS, values, max_size=2)}
    )
    return st.one_of(
        spec,
        spec.map(json.dumps),
        st.dictionaries(KEYS, values, max_size=3),
        st.lists(values, max_size=2),
    )


VALUES = st.recursive(LEAVES, nested, max_leaves=8)
HOOK: dict[str, list[str] | None] = {"seen": None}
FOREIGN = {"helper_mod", "antigravity", "subprocess", "os", "builtins"}
WATCHED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if HOOK["seen"] is not None and event in ("import", *WATCHED):
        HOOK["seen"].append(str(arguments[0]) if event == "import" else event)


@pytest.fixture(scope="module")
def audited() -> None:
    """An audit hook, which cannot be taken away again, and does nothing unless :func:`watched`."""
    sys.addaudithook(_audit)


@contextmanager
def watched() -> Iterator[list[str]]:
    HOOK["seen"] = seen = []
    try:
        yield seen
    finally:
        HOOK["seen"] = None


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_no_settings_import_or_run_anything(
    audited: None, settings_saved: dict[str, Any], data: st.DataObject
) -> None:
    config = json.loads(json.dumps(settings_saved["hyper_parameters"]["config"]))
    places: list[tuple[Any, Any]] = [(config, key) for key in config]
    for part in ("model", "data", "trainer"):
        places += [(config[part], key) for key in config[part]]
    options = config["model"]["strategy"]["init_args"]
    places += [(options, key) for key in options]
    at, key = data.draw(st.sampled_from(range(len(places))).map(lambda i: places[i]))
    at[key] = data.draw(VALUES)
    with watched() as seen:
        try:
            taken = settings_of(config, True)
        except SparsifyError:
            return
        make(taken)
    assert not set(seen) & set(WATCHED)
    assert not FOREIGN & {name.partition(".")[0] for name in seen}


def test_the_watch_sees_what_an_unchecked_checkpoint_does(
    cli: Cli, settings_saved: dict[str, Any], audited: None
) -> None:
    Path("helper_mod.py").write_text(CODE)
    config = json.loads(json.dumps(settings_saved["hyper_parameters"]["config"]))
    config["model"]["strategy"] = "helper_mod.S"
    config["data"]["tokenizer"] = POPEN
    with watched() as seen:
        make({"model": config["model"]})
    assert "helper_mod" in seen


@cache
def _parser() -> Parser:
    made = Parser(exit_on_error=False)
    object.__new__(SparsifyCLI).add_core_arguments_to_parser(made)
    return made


def make(taken: dict[str, Any]) -> None:
    """Parse settings and make the model and the data of them, as fit does; what is wrong with
    them does not matter here.
    """
    taken = {key: value for key, value in taken.items() if key != "seed_everything"}
    with suppress(Exception), torch.random.fork_rng():
        _parser().instantiate_classes(_parser().parse_object(taken))


# -- models, masks and records --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"attn_implementation": "evil/kernel"}, "attn_implementation 'evil/kernel'"),
        ({"_attn_implementation": "evil/kernel:f"}, "_attn_implementation"),
        ({"attn_implementation": "flash_attention_2"}, "it may be eager, sdpa"),
        ({"attn_implementation": {"": "evil/kernel"}}, "'evil/kernel'"),
        ({"text_config": {"_attn_implementation_internal": "evil/kernel"}}, "'evil/kernel'"),
        ({"experts_implementation": "evil/kernel"}, "experts_implementation"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq'"),
        ({"kernel_config": {"RMSNorm": "evil/kernel"}}, "kernel_config"),
        ({"attn_implementation": "eager"}, None),
    ],
)
def test_a_models_configuration_fetches_nothing(
    model_folder: Path, tmp_path: Path, entry: dict[str, Any], message: str | None
) -> None:
    shutil.copytree(model_folder, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | entry))
    for load in (load_model, load_skeleton):
        if message is None:
            load(str(tmp_path / "m"))
            continue
        with pytest.raises(SparsifyError, match="config.json has") as refused:
            load(str(tmp_path / "m"))
        assert message in str(refused.value)


def test_an_adapter_is_no_model(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "m")
    (tmp_path / "m/adapter_config.json").write_text('{"base_model_name_or_path": "evil/model"}')
    with pytest.raises(SparsifyError, match="an adapter is not a model"):
        load_model(str(tmp_path / "m"))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_custom_code_of_a_model_runs_not_and_nobody_is_asked(
    model_folder: Path, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda text: pytest.fail("asked"))
    shutil.copytree(model_folder, "m")
    Path("m/evil.py").write_text(CODE)
    config = json.loads(Path("m", file).read_text())
    config["auto_map"] = {
        "AutoConfig": "evil.C",
        "AutoModelForCausalLM": "evil.M",
        "AutoTokenizer": ["evil.T", "evil.T"],
    }
    if file == "config.json":
        config["model_type"] = "evil"
    else:
        config["tokenizer_class"] = "EvilTokenizer"
    Path("m", file).write_text(json.dumps(config))
    for load in (load_model, load_tokenizer):
        with suppress(SparsifyError):
            load("m")
    assert not Path("OWNED").exists()


def test_pickles_are_not_run(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, "m")
    Path("m/model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Pickled()}, "m/pytorch_model.bin")
    torch.save({"layer": Pickled()}, "masks.pt")
    np.savez("masks.npz", layer=np.array([Pickled()], dtype=object))
    torch.save({"hyper_parameters": Pickled()}, "evil.ckpt")
    Path("sharded.ckpt").mkdir()
    torch.save({"hyper_parameters": Pickled()}, "sharded.ckpt/meta.pt")
    with pytest.raises(SparsifyError, match="take the model's safetensors file"):
        load_model("m")
    for words in (
        ["mask", "import", "masks.pt", "out.nmask", "--base=m"],
        ["mask", "import", "masks.npz", "out.nmask", "--base=m"],
        ["test", "--ckpt_path=evil.ckpt"],
        ["test", "--ckpt_path=sharded.ckpt"],
    ):
        with pytest.raises(SystemExit, match="^2$"):
            main(words)
    assert not Path("OWNED").exists()


# -- the terminal ---------------------------------------------------------------------------------


def test_text_of_files_is_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(ESCAPE, title=Text(ESCAPE))
    table.add_row(ESCAPE)
    for content in (ESCAPE, Text(ESCAPE), table, Group(Text(ESCAPE), ESCAPE)):
        say(content)
        out = capsys.readouterr().out
        assert is_printable(out), ascii(out)
        assert r"\x1b]0;owned" in out.replace("\n", "")
    assert printable("a\tb\nü 中 e\u0301 \U0001f600") == "a\tb\nü 中 e\u0301 \U0001f600"
    assert printable("a\x9b\u202e\ud800\r") == r"a\x9b\u202e\ud800\r"


def test_verify_and_errors_show_no_escape_sequences(
    cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    cli("export", "--strategy=magnitude", "--output.folder=out")
    path = Path("out") / MANIFEST
    text = path.read_text()
    assert "model.layers.0.mlp.up_proj" in text
    path.write_text(
        text.replace("model.layers.0.mlp.up_proj", json.dumps(f"{ESCAPE}.up_proj")[1:-1])
    )
    for words in (["verify", "out"], ["mask", "show", f"no{ESCAPE}.nmask"]):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code in (1, 2)
        said = capsys.readouterr()
        assert is_printable(said.out + said.err), ascii(said)
        assert "x1b]0;owned" in said.out + said.err


# -- secrets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    ["api_key", "API_KEY", "apiKey", "wandb_api_key", "token", "hf_token", "access_token"]
    + ["password", "db_password", "client_secret", "aws_secret_access_key", "credentials"]
    + ["Authorization", "auth", "private_key", "X-Api-Key"],
)
def test_keys_of_secrets(key: str) -> None:
    assert is_secret(key)


@pytest.mark.parametrize(
    "key",
    ["tokenizer", "tokens", "eos_token", "pad_token_id", "bos_token", "max_tokens", "keys", "key"]
    + ["text_key", "messages_key", "prompt_key", "token_ids", "author", "secretary", "passes"]
    + ["num_key_value_heads", "mask_token", "unk_token", "cls_token", "additional_special_tokens"],
)
def test_keys_of_no_secrets(key: str) -> None:
    assert not is_secret(key)


def test_secrets_are_redacted_at_any_depth() -> None:
    given = {"a": [{"api_key": "s3", "b": 1}], "token": {"x": ["s3", None]}, "auth": True}
    assert redacted(given) == {
        "a": [{"api_key": REDACTED, "b": 1}],
        "token": {"x": [REDACTED, None]},
        "auth": True,
    }
    assert redacted("https://me:s3@host/x") == f"https://{REDACTED}@host/x"
    assert redacted("https://host/a@b") == "https://host/a@b"


class SecretLogger(CSVLogger):
    """Keeps what it was given.

    Args:
        save_dir: where to.
        api_key: a secret.
        url: another.
    """

    given: ClassVar[list[str]] = []

    def __init__(self, save_dir: str, api_key: str, url: str) -> None:
        super().__init__(save_dir, "secret")
        self.given += [api_key, url]


def test_no_file_of_a_run_holds_its_secrets(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    logger = ["--trainer.logger=tests.test_security.SecretLogger", "--trainer.logger.save_dir=runs"]
    logger += ["--trainer.logger.api_key=s3cr3t", "--trainer.logger.url=http://me:s3cr3t@host"]
    cli("fit", "--strategy=magnitude", *logger)
    assert SecretLogger.given == ["s3cr3t", "http://me:s3cr3t@host"]
    [run] = cli.runs()
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"config.yaml", "hparams.yaml", "result.json", MANIFEST} <= {path.name for path in files}
    assert not [path for path in files if b"s3cr3t" in path.read_bytes()]
    assert REDACTED in (run / "config.yaml").read_text()
    with pytest.raises(SystemExit, match="^2$"):
        main(["fit", "--config", str(run / "config.yaml")])
    assert "trainer.logger.init_args.api_key was a secret" in capsys.readouterr().err


def test_a_secret_that_was_not_saved_is_not_passed_on(settings_saved: dict[str, Any]) -> None:
    config = json.loads(json.dumps(settings_saved["hyper_parameters"]["config"]))
    config["data"]["train"] = [f"https://{REDACTED}@host/t.txt"]
    config["checkpoint"]["api_key"] = REDACTED
    told: list[str] = []
    taken = settings_of(config, True, tell=told.append)
    assert REDACTED not in json.dumps(taken)
    assert any("checkpoint.api_key of the checkpoint's run was a secret" in line for line in told)
