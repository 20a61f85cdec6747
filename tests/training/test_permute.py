"""Permuted channels through the product: fit, export, verify, masks, adapters, priors, resume."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify import Calibration, SparsifyError, TextDataModule, sparsify
from sparsify.calibration.permuting import parse_permute
from sparsify.calibration.results import read_index
from sparsify.cli.main import main
from sparsify.export.mask_file.file import read_masks
from sparsify.models.base import load_model
from sparsify.models.permutation_file import FILE, Permutation, read_permutation
from sparsify.results.compare.loading import load_runs
from sparsify.results.compare.settings import settings
from sparsify.serving.adapters import MaskAdapters
from sparsify.serving.verify import verify
from sparsify.strategies.maskllm import MaskLLM
from sparsify.strategies.wanda import Wanda
from sparsify.training.checkpoints.resume import check_order
from sparsify.training.module import SparseCausalLM
from tests.conftest import Cli, start_in, tiny_llama, word_tokenizer
from tests.tiny_models import tiny_gpt_oss, tiny_mixtral
from tests.training.test_two_ranks import TORCHRUN, launch

TOKENS = torch.arange(2, 18)[None]
RUN = ["--model.permute=all", "--model.calibration.samples=8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text: Path) -> Path:
    """The folder of a run whose channels were permuted, with its export."""
    folder = tmp_path_factory.mktemp("permuted")
    with pytest.MonkeyPatch.context() as patch:
        start_in(folder, patch)
        cli = Cli(folder, model_folder, text)
        cli("fit", "--strategy=wanda", *RUN)
        return cli.runs()[-1]


@pytest.fixture
def export(run: Path) -> Path:
    return run / "export"


def tool(*words: object, status: int = 0) -> None:
    """Run a command that uses no Trainer."""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    assert ended.value.code == status


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load_model(str(folder)).named_parameters())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits  # type: ignore[no-any-return]


def test_the_export_undone_is_the_base_bit_for_bit(export: Path, model_folder: Path) -> None:
    permutation, model = read_permutation(export), load_model(str(export))
    assert {"residual", "model.layers.1.mlp"} <= permutation.orders.keys()
    permutation.undo(model)
    base, masked = weights(model_folder), 0
    for name, weight in model.named_parameters():
        kept = weight != 0
        masked += int((~kept).sum() > 0)
        assert torch.equal(weight[kept], base[name][kept]), name
    assert masked == 14


@pytest.mark.parametrize("kind", ["all", "heads"])
def test_channels_that_are_one_group_stay(
    kind: str, cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "sparsify"):
        words = [f"--model.permute={kind}", "--model.calibration.samples=8"]
        cli("fit", "--strategy=magnitude", "--model.pattern=4:8", *words)
    assert "model.layers.0.self_attn stays: its 8 channels are one group" in caplog.text
    record = json.loads((cli.runs()[-1] / "result.json").read_text())["run"]
    parts = record.get("permutation", {}).get("parts", [])
    assert parts == (["model.layers.*.mlp", "residual"] if kind == "all" else [])


def test_records_name_the_permutation(run: Path, export: Path, model_folder: Path) -> None:
    permutation = read_permutation(export)
    for record in (
        json.loads((export / "sparsity_manifest.json").read_text())["permutation"],
        json.loads((run / "result.json").read_text())["run"]["permutation"],
    ):
        assert record["sha256"] == permutation.digest
        assert record["parts"] == ["model.layers.*.mlp", "model.layers.*.self_attn", "residual"]
    masks = read_masks(export)
    assert masks.base_hash == permutation.permuted_hash
    assert masks.permutation is not None
    assert masks.permutation.digest == permutation.digest
    assert settings(load_runs([run])[0][0])["permuted"] == "mlp, self_attn, residual"
    protocol = json.loads((run / "result.json").read_text())["protocol"]
    assert protocol["base"]["hash"] == permutation.base_hash  # compares with other runs


def test_results_state_what_the_search_took(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(*options: str) -> dict[str, Any]:
        cli("fit", "--strategy=wanda", *RUN, *options)
        run = json.loads((cli.runs()[-1] / "result.json").read_text())["run"]
        return run["permutation"]  # type: ignore[no-any-return]

    found = record()
    assert found["seconds"] > 0
    assert found["device"] == "cpu"
    kept = {"seconds": 77.0, "device": "other"}
    monkeypatch.setattr(
        "sparsify.calibration.permuting.read_index", lambda folder: read_index(folder) | kept
    )
    assert record() == found | kept
    given = record(f"--model.permute={cli.runs()[-1] / 'export'}")
    assert given == {key: found[key] for key in ("parts", "sha256")}


def test_verify_compares_with_the_base_as_it_was(export: Path, model_folder: Path) -> None:
    report = verify(export, base=str(model_folder))
    assert report.problems == []
    assert all(not row.problems for row in report.layers)


def test_verify_finds_other_orders(export: Path, model_folder: Path, tmp_path: Path) -> None:
    for file in export.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / FILE).read_text())
    order = content["orders"]["model.layers.0.mlp"]
    order[0], order[1] = order[1], order[0]
    (tmp_path / FILE).write_text(json.dumps(content))
    report = verify(tmp_path, base=str(model_folder))
    assert any(problem.startswith(f"{FILE} holds") for problem in report.problems)
    assert any("differ from the base's" in str(row.problems) for row in report.layers)


def test_masks_applied_to_the_base_give_the_export(
    export: Path, model_folder: Path, tmp_path: Path
) -> None:
    lone = tmp_path / "lone.nmask"
    lone.write_bytes((export / "masks.nmask").read_bytes())
    out = tmp_path / "out"
    tool("mask", "export", lone, out, "--base", model_folder)
    found, wanted = weights(out), weights(export)
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    assert verify(out, base=str(model_folder)).problems == []


def test_zeros_and_files_keep_the_order(export: Path, model_folder: Path, tmp_path: Path) -> None:
    file, npz = tmp_path / "zeros.nmask", tmp_path / "masks.npz"
    tool("mask", "import", export, file)
    tool("mask", "diff", export, file)
    assert read_masks(file).digest == read_masks(export).digest
    tool("mask", "export", export, npz, "--base", model_folder, status=2)
    assert not npz.exists()


def test_a_mask_adapter_permutes_while_it_is_active(export: Path, model_folder: Path) -> None:
    model, sparse = load_model(str(model_folder)), load_model(str(export))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapters = MaskAdapters(model)
    adapters.add("permuted", export)
    with adapters.use("permuted"):
        assert torch.equal(logits(model), logits(sparse))
        adapters.add("again", export)  # hashes are those of the model as it was given
        with adapters.use("again"):
            assert torch.equal(logits(model), logits(sparse))
        with adapters.use(None):
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    folded = adapters.fold("permuted")
    assert torch.equal(logits(folded), logits(sparse))


def test_a_prior_needs_its_own_order(
    export: Path, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    prior = ["--strategy=fixed_mask", f"--model.strategy.prior={export}"]
    for permute, said in (("none", "has channels in the order"), ("all", "no other can be")):
        with pytest.raises(SystemExit):
            cli("fit", *prior, f"--model.permute={permute}")
        assert said in capsys.readouterr().err
    cli("fit", *prior, f"--model.permute={export}", steps=1)
    found = cli.runs()[-1] / "export"
    assert read_masks(found).digest == read_masks(export).digest
    assert read_permutation(found).digest == read_permutation(export).digest


@pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict")  # frozen weights
def test_a_resumed_run_is_the_run_that_was_not_stopped(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--strategy=maskllm", *RUN, "--model.strategy.prior=wanda"]
    cli("fit", *options, "--checkpoint.every_n_steps=2", steps=4)
    whole = cli.runs()[-1]

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it searches again")

    monkeypatch.setattr("sparsify.training.build.find_orders", never)
    checkpoint = whole / "checkpoints" / "step-00000002.ckpt"
    main(["fit", f"--ckpt_path={checkpoint}"])
    resumed = cli.runs()[-1]
    assert resumed != whole
    assert read_masks(resumed / "export").digest == read_masks(whole / "export").digest
    orders = read_permutation(whole / "export")
    assert read_permutation(resumed / "export").digest == orders.digest
    results = [json.loads((run / "result.json").read_text()) for run in (whole, resumed)]
    before, after = (result["run"]["permutation"] for result in results)
    assert before == after
    assert before["seconds"] > 0
    module = SparseCausalLM.load_from_checkpoint(
        whole / "checkpoints" / "last.ckpt", strategy=MaskLLM(prior="wanda")
    )
    assert module.masked.base.hash == orders.permuted_hash
    masks, stored = module.masked.hard_masks(), read_masks(whole / "export")
    assert all(torch.equal(mask, stored[name]) for name, mask in masks.items())


def test_a_checkpoint_needs_the_folder_of_its_orders_no_more(cli: Cli, export: Path) -> None:
    shutil.copytree(export, cli.folder / "orders")
    cli("fit", "--strategy=maskllm", "--model.strategy.prior=null", "--model.permute=orders")
    shutil.rmtree(cli.folder / "orders")
    main(["validate", f"--ckpt_path={cli.runs()[-1] / 'checkpoints' / 'last.ckpt'}"])
    assert list(cli.folder.rglob("result-validation.json"))


@pytest.mark.parametrize(("of_run", "asked"), [("none", "all"), ("all", "none"), ("all", "[mlp]")])
@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_checkpoint_goes_on_in_its_own_order(
    cli: Cli, capsys: pytest.CaptureFixture[str], command: str, of_run: str, asked: str
) -> None:
    cli("fit", "--strategy=maskllm", "--model.strategy.prior=null", f"--model.permute={of_run}")
    checkpoint = cli.runs()[-1] / "checkpoints" / "last.ckpt"
    more = ["--trainer.max_steps=9"] if command == "fit" else []
    with pytest.raises(SystemExit):
        main([command, f"--ckpt_path={checkpoint}", f"--model.permute={asked}", *more])
    said = " ".join(capsys.readouterr().err.split())
    assert f"run had --model.permute {of_run}, and this one has" in said
    main([command, f"--ckpt_path={checkpoint}", f"--model.permute={of_run}", *more])


@pytest.mark.parametrize("damaged", [5, ["tails"], [["mlp"]]])
def test_a_damaged_order_in_a_checkpoint_is_refused(damaged: Any) -> None:
    with pytest.raises(SparsifyError, match="permute="):
        check_order({"hyper_parameters": {"permute": damaged}}, "all")
    check_order({"hyper_parameters": {"permute": "gone/export"}}, "./gone/export")
    check_order({"hyper_parameters": {}}, "all")


@pytest.mark.parametrize("make", [tiny_gpt_oss, tiny_mixtral])
def test_orders_are_found_for_experts_however_they_are_stored(
    make: Callable[[], Any], text: Path, tmp_path: Path
) -> None:
    data = TextDataModule(train=str(text / "train.txt"), block_size=16)
    quiet = {"enable_progress_bar": False, "default_root_dir": tmp_path}
    calibration = Calibration(samples=8, cache=False)
    options: Any = {"permute": "mlp", "calibration": calibration, "trainer": quiet}
    result = sparsify(make(), "wanda", data, word_tokenizer(), **options)
    assert result.module.masked.base.permutation.orders


def test_a_model_object_is_permuted_in_place(text: Path, tmp_path: Path) -> None:
    model, data = tiny_llama(), TextDataModule(train=str(text / "train.txt"), block_size=16)
    given = {name: p.detach().clone() for name, p in model.named_parameters()}
    options: dict[str, Any] = {
        "steps": 1,
        "trainer": {"enable_progress_bar": False, "default_root_dir": tmp_path},
        "calibration": Calibration(samples=8, cache=False),
    }
    strategy = Wanda()
    strategy.calibrate = _fails  # type: ignore[method-assign]
    with pytest.raises(SparsifyError, match="no luck"):
        sparsify(model, strategy, data, word_tokenizer(), permute="all", **options)
    assert all(torch.equal(p, given[name]) for name, p in model.named_parameters())
    found = sparsify(model, "wanda", data, word_tokenizer(), permute=["mlp"], **options)
    up = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(model.get_parameter(up), given[up])
    found.save_masks(tmp_path / "lone.nmask")
    adapters = MaskAdapters(tiny_llama())
    adapters.add("lone", tmp_path / "lone.nmask")
    with adapters.use("lone"):
        assert torch.equal(logits(adapters.model), logits(model))


def _fails(blocks: Any) -> Any:
    next(iter(blocks))
    raise SparsifyError("no luck")


@pytest.mark.slow
def test_two_processes_find_one_order(
    export: Path, model_folder: Path, text: Path, tmp_path: Path
) -> None:
    options = [f"--model.name_or_path={model_folder}", "--trainer.accelerator=cpu", "--devices=2"]
    options += [f"--data.{s}={text}/{s}.txt" for s in ("train", "validation", "test")]
    options += ["--data.block_size=16", "--data.batch_size=4", "--trainer.max_steps=2"]
    options += ["--trainer.enable_progress_bar=false", "--output.folder=out"]
    words = ["-m", "sparsify", "fit", "--strategy=wanda", "--shard", *RUN, *options]
    done = launch(*TORCHRUN, *words, "--model.calibration.cache=false", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert read_permutation(tmp_path / "out").digest == read_permutation(export).digest
    assert read_masks(tmp_path / "out").digest == read_masks(export).digest


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("none", ()),
        ("all", ("mlp", "heads", "residual")),
        (["residual", "mlp"], ("mlp", "residual")),
        ("[mlp, heads]", ("mlp", "heads")),
        ("runs/a/export", Path("runs/a/export")),
    ],
)
def test_what_can_be_asked(value: Any, found: Any) -> None:
    assert parse_permute(value) == found


def test_a_wrong_word_is_refused() -> None:
    with pytest.raises(SparsifyError, match=r"permute='head'; it must be none, all, some of mlp"):
        parse_permute(["mlp", "head"])


def _edited(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    content = Permutation({"a": torch.tensor([1, 0])}, "x", "y").to_dict()
    change(content)
    return content


@pytest.mark.parametrize(
    "content",
    [
        [],
        None,
        _edited(lambda c: c.pop("orders")),
        _edited(lambda c: c.update(schema="other/1")),
        _edited(lambda c: c["orders"].update(a=[0, 0])),
        _edited(lambda c: c["orders"].update(a=[0, True])),
        _edited(lambda c: c["orders"].update(a="01")),
        _edited(lambda c: c.update(orders=[1])),
    ],
)
def test_damaged_orders_are_refused(content: Any) -> None:
    with pytest.raises(SparsifyError, match="there: no readable orders of channels"):
        Permutation.from_dict(content, "there")
