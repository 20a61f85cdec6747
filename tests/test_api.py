"""The Python interface, on a model object."""

import logging
import signal
import threading
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from transformers import AutoModelForCausalLM
from transformers.utils.logging import is_progress_bar_enabled

import sparsify
from sparsify import Schedule
from sparsify.calibration import Layerwise
from sparsify.export import folder, read_back
from sparsify.strategies.maskllm import MaskLLM
from sparsify.strategies.maskpro import MaskPro
from sparsify.training.build import calibrate
from sparsify.training.optimizers import adamw
from tests.conftest import quiet_trainer, tiny_llama, word_tokenizer
from tests.tiny_models import tiny_gpt_oss, tiny_mixtral


def test_a_model_object_learns_masks_and_exports(
    model, tokenizer, text: Path, tmp_path: Path
) -> None:
    tokens = torch.randint(0, 64, (2, 16))
    result = sparsify.sparsify(
        model,
        "maskllm",
        sparsify.TextDataModule(train=str(text / "train.txt"), block_size=16),
        tokenizer,
        steps=3,
        trainer={"enable_progress_bar": False, "default_root_dir": tmp_path},
    )
    masks = result.masks()
    assert len(masks) == 14
    result.export(tmp_path / "export")
    before = model(input_ids=tokens).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert torch.equal(loaded(input_ids=tokens).logits, before)
    plain = result.fold()
    assert torch.equal(plain(input_ids=tokens).logits, before)
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    for name, mask in masks.items():
        assert torch.equal(plain.get_submodule(name).weight != 0, mask)


def test_an_export_is_compared_on_the_test_text_where_there_is_one(
    model, tokenizer, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def measure(masked: Any, tokens_BT: Any, measuring: Any) -> Any:
        seen.append(tokens_BT)
        return read_back.measure(masked, tokens_BT, measuring)

    monkeypatch.setattr(folder, "measure", measure)
    files = {split: str(text / f"{split}.txt") for split in ("train", "test")}
    data = sparsify.TextDataModule(**files, block_size=16)
    quiet = {"enable_progress_bar": False, "default_root_dir": tmp_path}
    result = sparsify.sparsify(model, "magnitude", data, tokenizer, trainer=quiet)
    result.export(tmp_path / "export")
    [tokens_BT] = seen
    assert torch.equal(tokens_BT, next(iter(result.trainer.datamodule.test_dataloader()[0])))


def test_test_measures_the_test_text_under_the_masks(
    model, tokenizer, text: Path, tmp_path: Path
) -> None:
    files = {split: str(text / f"{split}.txt") for split in ("train", "test")}
    data = sparsify.TextDataModule(**files, block_size=16)
    quiet = {"enable_progress_bar": False, "default_root_dir": tmp_path}
    result = sparsify.sparsify(model, "magnitude", data, tokenizer, trainer=quiet)
    scores = result.test()
    assert list(scores) == ["test", "overall"]
    losses = [
        model(input_ids=tokens, labels=tokens).loss
        for loader in result.trainer.datamodule.test_dataloader()
        for batch in loader
        for tokens in batch[:, None]
    ]
    assert scores["overall"].loss == pytest.approx(float(torch.stack(losses).mean()), abs=1e-4)


def test_test_without_a_text_says_what_to_give(
    model, tokenizer, text: Path, tmp_path: Path
) -> None:
    data = sparsify.TextDataModule(train=str(text / "train.txt"), block_size=16)
    quiet = {"enable_progress_bar": False, "default_root_dir": tmp_path}
    result = sparsify.sparsify(model, "magnitude", data, tokenizer, trainer=quiet)
    with pytest.raises(sparsify.SparsifyError, match="no test text; give TextDataModule"):
        result.test()


def test_a_checkpoint_saved_after_the_run_says_that_it_cannot_be_resumed(
    model, tokenizer, text: Path, tmp_path: Path
) -> None:
    data = sparsify.TextDataModule(train=str(text / "train.txt"), block_size=16)
    quiet = {"enable_progress_bar": False, "default_root_dir": tmp_path}
    result = sparsify.sparsify(model, "maskllm", data, tokenizer, steps=2, trainer=quiet)
    result.trainer.save_checkpoint(tmp_path / "late.ckpt")
    assert torch.load(tmp_path / "late.ckpt", weights_only=True)["resumable"] is False


def test_the_seed_decides_where_the_logits_start(model, tokenizer, text: Path) -> None:
    starts = []
    for seed in (0, 0, 1):
        module = sparsify.SparseCausalLM.from_model(
            tiny_llama(), tokenizer, MaskLLM(prior=None), seed=seed
        )
        module.configure_model()
        calibrate(module)
        starts.append(module.lm.model.layers[0].mlp.up_proj.masker.logits_OKG.detach())
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_a_model_that_was_masked_before_is_refused(model, tokenizer, text: Path, tmp_path) -> None:
    data = sparsify.TextDataModule(train=str(text / "train.txt"), block_size=16)
    quiet = {"enable_progress_bar": False, "default_root_dir": tmp_path}
    result = sparsify.sparsify(model, "magnitude", data, tokenizer, trainer=quiet)
    assert "Magnitude 2:4" in repr(result)
    with pytest.raises(sparsify.SparsifyError, match="load it again"):
        sparsify.sparsify(model, "magnitude", data, tokenizer, trainer=quiet)


class Fails(Callback):
    """Raises in the second step."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if trainer.global_step == 1:
            raise self.error


def state(model: Any) -> list[Any]:
    """All of a model that a failed run must leave as it was."""
    parts = [
        (name, type(module), module.training, getattr(module, "gradient_checkpointing", None))
        for name, module in model.named_modules()
    ]
    return [parts, [(name, p.requires_grad) for name, p in model.named_parameters()]]


def process() -> list[Any]:
    """All of the process that a run must leave as it was."""
    return [
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        list(warnings.filters),
        [(h, list(h.filters)) for h in logging.getLogger("lightning.pytorch").handlers],
        is_progress_bar_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
    ]


@pytest.mark.parametrize("name", ["maskllm", "sr_ste"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no luck")])
def test_a_failed_run_gives_the_model_back(
    model, tokenizer, text: Path, tmp_path: Path, monkeypatch, name: str, error: BaseException
) -> None:
    monkeypatch.chdir(tmp_path)
    data = sparsify.TextDataModule(train=str(text / "train.txt"), block_size=16)
    model.train().requires_grad_(True)
    before, around = state(model), process()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    options: Any = {"steps": 2, "gradient_checkpointing": True}
    quiet = {"enable_progress_bar": False}
    with pytest.raises(type(error)):
        sparsify.sparsify(
            model, name, data, tokenizer, trainer=quiet | {"callbacks": [Fails(error)]}, **options
        )
    assert state(model) == before
    assert process() == around
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert data.tokenizer is None
    assert list(tmp_path.iterdir()) == []
    again = sparsify.sparsify(model, name, data, tokenizer, trainer=quiet, **options)
    assert len(again.masks()) == 14
    assert process() == around
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["maskllm", "sr_ste"])
@pytest.mark.parametrize("make", [tiny_mixtral, tiny_gpt_oss])
def test_a_failed_run_gives_experts_back(make, tokenizer, text: Path, name: str) -> None:
    model = make().train()
    data = sparsify.TextDataModule(train=str(text / "train.txt"), block_size=16, batch_size=4)
    options: Any = {"steps": 2, "calibration": sparsify.Calibration(samples=4, cache=False)}
    before, way = state(model), model.config._experts_implementation
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    failing = {"enable_progress_bar": False, "callbacks": [Fails(KeyboardInterrupt())]}
    with pytest.raises(KeyboardInterrupt):
        sparsify.sparsify(model, name, data, tokenizer, trainer=failing, **options)
    assert state(model) == before
    assert model.config._experts_implementation == way
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_a_failed_calibration_gives_the_model_back(
    model, tokenizer, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = sparsify.TextDataModule(train=str(text / "train.txt"), block_size=16)
    options: Any = {
        "trainer": {"enable_progress_bar": False},
        "calibration": sparsify.Calibration(samples=4, cache=False),
    }
    before, collect = state(model), Layerwise.collect
    weights = {key: value.clone() for key, value in model.state_dict().items()}

    def failing(self: Any, block: str, *args: Any) -> Any:
        if block.endswith("1"):  # the first block's weights are changed by then
            raise sparsify.SparsifyError("no luck")
        return collect(self, block, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Layerwise, "collect", failing)
        with pytest.raises(sparsify.SparsifyError, match="no luck"):
            sparsify.sparsify(model, "sparsegpt", data, tokenizer, **options)
    assert state(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    sparsify.sparsify(model, "sparsegpt", data, tokenizer, **options)


class Seen(Callback):
    steps = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1


QUIET: dict[str, Any] = {"enable_progress_bar": False}
RATE = partial(torch.optim.AdamW, lr=0.1)


def masks_of(strategy: Any, text: Path, **options: Any) -> dict[str, torch.Tensor]:
    data = sparsify.TextDataModule(train=str(text / "train.txt"), block_size=16)
    given = {"steps": 4, "trainer": QUIET, "optimizer": RATE, **options}
    return sparsify.sparsify(tiny_llama(), strategy, data, word_tokenizer(), **given).masks()


def equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(mask, others[name]) for name, mask in some.items())


def test_callbacks_of_the_users_come_beside_our_own(text: Path) -> None:
    expected = masks_of("maskllm", text)
    for given in (seen := Seen(), [seen]):
        seen.steps = 0
        found = masks_of("maskllm", text, trainer=QUIET | {"callbacks": given})
        assert equal(found, expected)
        assert seen.steps == 4
    # Without our annealing the draws of other temperatures learn other masks.
    assert not equal(masks_of(MaskLLM(tau=Schedule(4.0, 4.0)), text), expected)


def test_a_strategy_that_ran_before_makes_the_same_masks(text: Path) -> None:
    strategy = MaskPro()
    expected = masks_of(strategy, text, seed=1)
    assert equal(masks_of(strategy, text, seed=1), expected)
    assert strategy.seed == MaskPro().seed


@pytest.mark.parametrize("name", ["maskllm", "selfmask", "maskpro", "proxsparse"])
def test_another_default_type_learns_the_same_masks(text: Path, name: str) -> None:
    model, data = (
        tiny_llama(),
        sparsify.TextDataModule(train=str(text / "train.txt"), block_size=16),
    )
    options: Any = {"calibration": sparsify.Calibration(cache=False), "steps": 2, "trainer": QUIET}
    expected = masks_of(name, text, optimizer=adamw, **options)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = sparsify.sparsify(model, name, data, word_tokenizer(), **options).masks()
    finally:
        torch.set_default_dtype(torch.float32)
    assert equal(found, expected)


def test_an_unknown_option_is_refused(model, tokenizer, text: Path) -> None:
    with pytest.raises(
        sparsify.SparsifyError, match="no option lr, patern; its options are calibration, "
    ):
        sparsify.sparsify(model, "magnitude", text / "train.txt", tokenizer, lr=0.1, patern="2:4")


@pytest.mark.parametrize("name", ["maskllm", "sr_ste"])
def test_a_folded_model_is_plain_again_and_has_no_masks(
    model, tokenizer, text: Path, tmp_path: Path, name: str
) -> None:
    data = sparsify.TextDataModule(train=str(text / "train.txt"), block_size=16)
    frozen = model.lm_head.weight.requires_grad_(False)
    options: Any = {"steps": 1, "trainer": QUIET, "gradient_checkpointing": True}
    result = sparsify.sparsify(model, name, data, tokenizer, **options)
    result.fold()
    for call in (
        result.masks,
        lambda: result.export(tmp_path / "export"),
        lambda: result.save_masks(tmp_path / "lone.nmask"),
    ):
        with pytest.raises(sparsify.SparsifyError, match=r"export\(\) before fold\(\)"):
            call()
    assert not list(tmp_path.iterdir())
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    assert not any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()


def test_a_module_whose_calibration_failed_does_not_go_on(
    tokenizer, text: Path, tmp_path: Path
) -> None:
    words = (text / "train.txt").read_text().split()[: 8 * 16]
    (tmp_path / "short.txt").write_text(" ".join(words))
    module = sparsify.SparseCausalLM.from_model(tiny_llama(), tokenizer, MaskLLM(prior="wanda"))
    for file, said in (
        (tmp_path / "short.txt", "calibration asks"),
        (text / "train.txt", "failed"),
    ):
        data = sparsify.TextDataModule(train=str(file), block_size=16)
        data.tokenizer = tokenizer
        with pytest.raises(sparsify.SparsifyError, match=said):
            quiet_trainer(tmp_path, max_steps=1).fit(module, datamodule=data)


def test_it_runs_off_the_main_thread(model, tokenizer, text: Path) -> None:
    data = sparsify.TextDataModule(train=str(text / "train.txt"), block_size=16)
    found: list[Any] = []

    def work() -> None:
        try:
            quiet = {"enable_progress_bar": False}
            found.append(
                sparsify.sparsify(model, "maskllm", data, tokenizer, steps=1, trainer=quiet)
            )
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(found[0], sparsify.Sparsified), found


def test_other_trainers_keep_lightnings_ddp() -> None:
    from lightning.pytorch import Trainer

    from sparsify.training.parallel.ddp import DDP
    from sparsify.training.trainer import Trainer as Own

    settings: Any = {"accelerator": "cpu", "devices": 2, "logger": False}
    settings |= {"enable_progress_bar": False, "enable_checkpointing": False}
    for name in ("ddp", "auto"):
        assert type(Own(strategy=name, **settings).strategy) is DDP
    assert StrategyRegistry["ddp"]["strategy"] is DDPStrategy
    assert type(Trainer(strategy="ddp", **settings).strategy) is DDPStrategy


def test_a_class_or_a_name_in_place_of_an_object_is_refused(model, tokenizer, text: Path) -> None:
    data = text / "train.txt"
    for strategy, given, words, message in (
        (MaskLLM, model, tokenizer, "strategy is .*MaskLLM"),
        ("maskllm", type(model), tokenizer, "model is .*LlamaForCausalLM"),
        ("maskllm", model, "my/tokenizer", "tokenizer is 'my/tokenizer'"),
    ):
        with pytest.raises(sparsify.SparsifyError, match=message):
            sparsify.sparsify(given, strategy, data, words)
