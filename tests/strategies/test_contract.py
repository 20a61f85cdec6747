"""What every strategy keeps to, whatever it does: one suite over a table of cases.

A new strategy enters ``CASES``; the first test fails until it does.
"""

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import sparsify.strategies
from sparsify import Draw, NMPattern, RunResult, SparseCausalLM, SparsityStrategy, TextDataModule
from sparsify.calibration import Calibration, Layerwise
from sparsify.callbacks.annealing import Annealing
from sparsify.export.folder import export
from sparsify.masking.inject import hard_masks
from sparsify.masking.layer import base_parameters, masked_layers
from sparsify.masking.masker import Masking
from sparsify.masking.registry import STRATEGIES, plugins
from sparsify.models.hashes import hash_parameters
from sparsify.strategies.admm import ADMM
from sparsify.strategies.dense import Dense
from sparsify.strategies.dsnot import DSnoT
from sparsify.strategies.fixed_mask import FixedMask
from sparsify.strategies.gblm import GBLM
from sparsify.strategies.magnitude import Magnitude
from sparsify.strategies.maskllm import MaskLLM
from sparsify.strategies.maskpro import MaskPro
from sparsify.strategies.proxsparse import ProxSparse
from sparsify.strategies.pruner_zero import PrunerZero
from sparsify.strategies.ria import RIA
from sparsify.strategies.selfmask import SelfMask
from sparsify.strategies.sparsegpt import SparseGPT
from sparsify.strategies.sr_ste import SRSTE
from sparsify.strategies.swaps import Swaps
from sparsify.strategies.wanda import Wanda
from sparsify.training.build import calibrate
from sparsify.training.step import BatchRun
from sparsify.training.trainer import Trainer
from tests.conftest import quiet_trainer, tiny_llama
from tests.tiny_models import tiny_mixtral


@dataclass(frozen=True)
class Case:
    """A strategy and what it claims.

    Attributes:
        label: for the test's name.
        make: builds it.
        patterns: those that it takes.
        learns: whether anything changes in training.
        draws: whether its loss is that of a random sample of its masks.
        gradients: whether it goes backward through the model.
        in_place: whether its optimizer takes gradients in backward, so that none are left.
        follows: the end of the names of tensors that follow from what is learned.
    """

    label: str
    make: Callable[[], SparsityStrategy]
    patterns: tuple[str, ...] = ("2:4", "1:4", "2:8", "4:8")
    learns: bool = True
    draws: bool = False
    gradients: bool = True
    in_place: bool = False
    follows: str | None = None


ANY = ("2:4", "1:4", "2:8", "4:8", "8:16")


def maskpro(estimator: Any) -> Callable[[], SparsityStrategy]:
    """With a strength at which draws differ, and a rate at which logits move."""
    return lambda: MaskPro(estimator=estimator, strength=2.0, lr=10.0)


CASES = [
    Case("dense", Dense, (), learns=False),
    Case("magnitude", Magnitude, ANY, learns=False),
    Case("wanda", Wanda, ANY, learns=False),
    Case("sparsegpt", SparseGPT, ANY, learns=False),
    Case("sparsegpt, updated", lambda: SparseGPT(update_weights=True), ANY, learns=False),
    Case("ria", RIA, ANY, learns=False),
    Case("gblm", GBLM, ANY, learns=False),
    Case("pruner_zero", PrunerZero, ANY, learns=False),
    Case("admm", ADMM, ANY, learns=False),
    Case("dsnot", lambda: DSnoT(skip=[]), ANY, learns=False),
    Case("swaps", Swaps, ANY, learns=False),
    Case("swaps, refitted", lambda: Swaps(refit=True), ANY, learns=False),
    Case("maskllm", MaskLLM, draws=True),
    Case("maskllm, magnitude prior", lambda: MaskLLM(prior="magnitude"), draws=True),
    Case("maskllm, hard samples", lambda: MaskLLM(hard=True), draws=True),
    Case("maskllm, no prior", lambda: MaskLLM(prior=None), draws=True),
    Case("selfmask", SelfMask, ANY, in_place=True, follows="kept_OJ"),
    Case(
        "selfmask in bf16 from magnitude on",
        lambda: SelfMask("magnitude", dtype="bfloat16"),
        ANY,
        in_place=True,
        follows="kept_OJ",
    ),
    Case("maskpro", maskpro("residual"), ANY, draws=True, gradients=False),
    Case("maskpro, leave-one-out", maskpro("leave_one_out"), ANY, draws=True, gradients=False),
    Case("maskpro, control variate", maskpro("control_variate")),
    Case("maskpro, mean gradient", maskpro("mean_gradient")),
    Case("sr_ste, no prior", SRSTE, ANY),
    Case("ste, no prior", lambda: SRSTE(decay=0), ANY),
    Case("asp, no prior", lambda: SRSTE(refresh="never"), ANY),
    Case("fixed_mask", FixedMask, ANY),
    Case("fixed_mask, lora", lambda: FixedMask(lora_rank=2), ANY),
    Case("proxsparse, no prior", ProxSparse, ("2:4",)),
    Case("proxsparse, anchored", lambda: ProxSparse(prior="wanda", anchor=1e-3), ("2:4",)),
]
UNREAD = ("magnitude", "magnitude prior", "no prior")  # those that need no text
LEARNING = [case for case in CASES if case.learns]
BACKWARD = [case for case in LEARNING if case.gradients and not case.in_place]
PRUNING = [case for case in CASES if case.patterns]
# One of each class, for what takes a second model.
PRUNING_ONCE = list({type(case.make()): case for case in reversed(PRUNING)}.values())
LEARNING_ONCE = [case for case in PRUNING_ONCE if case.learns]


def cases(chosen: list[Case] = CASES) -> pytest.MarkDecorator:
    """Run the test for each of the cases."""
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.label)


class Recorder(Callback):
    """Remembers losses, batches, and all values and gradients of each step; can save and stop."""

    def __init__(self, stop_after: int | None = None, path: Path | None = None) -> None:
        self.stop_after, self.path = stop_after, path
        self.losses: list[float] = []
        self.batches: list[Tensor] = []
        self.values: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = dict(pl_module.named_parameters())
        self.values.append({name: p.detach().clone() for name, p in named.items()})
        self.gradients.append({n: p.grad.clone() for n, p in named.items() if p.grad is not None})

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].item())
        self.batches.append(batch)
        if trainer.global_step == self.stop_after:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@dataclass
class Setting:
    """Where a test's runs take place."""

    text: Path
    folder: Path
    tokenizer: PreTrainedTokenizerFast

    def module(
        self, case: Case, model: PreTrainedModel | None = None, **options: Any
    ) -> SparseCausalLM:
        """A module that is not built yet; it calibrates each time anew."""
        return SparseCausalLM.from_model(
            model or tiny_llama(),
            self.tokenizer,
            case.make(),
            calibration=Calibration(samples=16, cache=False),
            **options,
        )

    def built(self, case: Case, **options: Any) -> SparseCausalLM:
        """A module with its first masks, without a Trainer."""
        module = self.module(case, **options)
        module.configure_model()
        calibrate(module, windows=lambda: self.data().calibration(16))
        return module

    def data(self) -> TextDataModule:
        """Blocks of 16 tokens, four at once."""
        splits = {name: str(self.text / f"{name}.txt") for name in ("train", "test")}
        return TextDataModule(**splits, block_size=16, batch_size=4, tokenizer=self.tokenizer)  # type: ignore[arg-type]

    def fit(
        self,
        module: SparseCausalLM,
        steps: int = 3,
        stop_after: int | None = None,
        ckpt_path: Path | None = None,
        **settings: Any,
    ) -> tuple[Trainer, Recorder]:
        """Train, and tell what happened."""
        recorder = Recorder(stop_after, self.folder / "stopped.ckpt")
        trainer = self.trainer(max_steps=steps, callbacks=[Annealing(), recorder], **settings)
        trainer.fit(
            module,
            datamodule=self.data(),
            ckpt_path=ckpt_path,
            weights_only=False if ckpt_path else None,
        )
        return trainer, recorder

    def trainer(self, **settings: Any) -> Trainer:
        """A quiet one, on CPU."""
        return quiet_trainer(self.folder, **settings)


@pytest.fixture
def setting(text: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Setting:
    return Setting(text, tmp_path, tokenizer)


class HandRun:
    """One micro-batch of one process: the rule for its draws and its loss, written once more."""

    def __init__(self, module: SparseCausalLM, batch: Tensor, step: int, micro_batch: int) -> None:
        self.module, self.batch, self.step, self.micro_batch = module, batch, step, micro_batch

    def draw(self, k: int = 0, of: int = 1) -> Draw:
        return Draw(self.module.seed, self.step, self.micro_batch * of + k)

    def __call__(self, masking: Masking, grad: bool = True) -> RunResult:
        lm = self.module.lm
        with torch.set_grad_enabled(grad), self.module.masked.scope.use(masking) as penalties:
            logits = lm(input_ids=self.batch, use_cache=False).logits
        shifted = logits[:, :-1].flatten(0, 1), self.batch[:, 1:].flatten()
        loss = F.cross_entropy(*shifted)
        return RunResult(loss, loss, logits, sum(penalties, torch.zeros(())))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names with bit-equal values."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def state(module: SparseCausalLM) -> dict[str, Tensor]:
    """All values of the model, masked or not."""
    return {k: v.clone() for k, v in module.state_dict().items() if k.startswith("model.")}


def test_every_strategy_is_in_the_table() -> None:
    found = {point.load() for point in plugins(STRATEGIES).values()}
    for file in pkgutil.iter_modules(sparsify.strategies.__path__):
        module = importlib.import_module(f"sparsify.strategies.{file.name}")
        for _, kind in inspect.getmembers(module, inspect.isclass):
            own = kind.__module__ == module.__name__ and issubclass(kind, SparsityStrategy)
            if own and not inspect.isabstract(kind):
                found.add(kind)
    assert found == {type(case.make()) for case in CASES}


@cases(PRUNING)
def test_hard_masks_keep_exactly_n_of_m(case: Case, setting: Setting) -> None:
    for text in case.patterns:
        pattern = NMPattern.parse(text)
        module = setting.built(case, pattern=text)
        masks = dict(hard_masks(module.lm))
        assert len(masks) == 14
        for name, mask in masks.items():
            layer = masked_layers(module.lm)[name]
            assert mask.dtype == torch.bool
            assert mask.shape == layer.weight_OI.shape
            assert bool((mask.unflatten(1, (-1, pattern.m)).sum(-1) == pattern.n).all()), name
            assert torch.equal(layer.masker.hard_mask(layer.weight_OI), mask), name
            weight, _ = layer.masker(layer.weight_OI, "hard")
            assert torch.equal(weight, torch.where(mask, layer.weight_OI, 0)), name
            assert not bool(weight[~mask].signbit().any()), name


@cases(PRUNING)
def test_all_weight_sized_tensors_have_rows_first(case: Case, setting: Setting) -> None:
    module = setting.built(case)
    for name, layer in masked_layers(module.lm).items():
        smallest = layer.weight_OI.numel() / layer.masker.pattern.m  # one value a group
        for parameter in layer.masker.parameters():
            assert parameter.numel() < smallest or parameter.shape[0] == layer.out_features, name


@cases()
def test_a_run_changes_what_the_strategy_declares_and_nothing_else(
    case: Case, setting: Setting
) -> None:
    model = tiny_llama()
    before = hash_parameters(dict(model.named_parameters()))
    module = setting.module(case, model)
    first = state(setting.built(case))
    trainer, recorder = setting.fit(module)
    assert trainer.global_step == (3 if case.learns else 1)
    assert all(math.isfinite(loss) for loss in recorder.losses)
    assert module.masked.base.hash == before
    if not module.strategy.effect.changes_base:
        assert hash_parameters(base_parameters(module.lm)) == before
    if module.strategy.effect.weights == "updated":
        dense = dict(tiny_llama().named_parameters())
        layers = masked_layers(module.lm)
        assert len(layers) == 14
        for name, parameter in base_parameters(module.lm).items():
            changed = parameter != dense[name]
            if (layer := layers.get(name.removesuffix(".weight"))) is None:
                assert not bool(changed.any()), name
            else:  # the kept ones, too
                assert bool(changed[layer.masker.hard_mask(layer.weight_OI)].any()), name
    after = state(module)
    assert first.keys() == after.keys()
    learned = {n for n, p in module.named_parameters() if p.requires_grad and n != "anchor"}
    assert bool(learned) == case.learns
    if module.strategy.effect.weights == "trained":
        assert learned == {f"model.{name}" for name in base_parameters(module.lm)}
    else:
        assert all(".masker." in name for name in learned)
    with_gradients = learned if case in BACKWARD else set()
    for gradients in recorder.gradients:
        assert set(gradients) - {"anchor"} == with_gradients
        assert all(bool(gradients[name].isfinite().all()) for name in with_gradients)
    # In the last step: what is multiplied by something that starts at zero has none in the first.
    assert all(bool(recorder.gradients[-1][name].any()) for name in with_gradients)
    for name, value in after.items():
        if case.follows is None or not name.endswith(case.follows):
            assert torch.equal(value, first[name]) != (name in learned), name
    for name, mask in hard_masks(module.lm):
        assert bool((mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()), name


@cases()
def test_a_resumed_run_continues_bit_for_bit(case: Case, setting: Setting) -> None:
    torch.manual_seed(1)
    whole = setting.module(case)
    trainer, expected = setting.fit(whole, steps=6)
    torch.manual_seed(2)  # the global generator must not matter: Lightning does not save it
    half = setting.module(case)
    _, first = setting.fit(half, steps=6, stop_after=3 if case.learns else 1)
    torch.manual_seed(3)
    resumed = setting.module(case)
    again, second = setting.fit(resumed, steps=6, ckpt_path=setting.folder / "stopped.ckpt")
    assert_equal(dict(resumed.state_dict()), dict(whole.state_dict()))
    if case.learns:
        assert first.losses + second.losses == expected.losses
        assert len(first.losses) == len(second.losses) == 3
        assert again.global_step == trainer.global_step == 6
        assert not torch.equal(
            torch.cat([v.flatten() for v in state(half).values()]),
            torch.cat([v.flatten() for v in state(resumed).values()]),
        )


@cases()
def test_a_checkpoint_holds_what_the_run_changes_and_no_frozen_weights(
    case: Case, setting: Setting
) -> None:
    module = setting.module(case)
    trainer, _ = setting.fit(module)
    path = setting.folder / "c.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=False)["state_dict"]
    if module.strategy.effect.changes_base:
        assert saved.keys() == module.state_dict().keys()
    else:
        assert all(
            ".masker." in key or key == "anchor" or key.startswith("strategy.") for key in saved
        )
        base_bytes = sum(p.nbytes for p in base_parameters(module.lm).values())
        learned_bytes = sum(v.nbytes for v in saved.values())
        assert path.stat().st_size < 3 * learned_bytes + base_bytes / 2  # values and two moments
    fresh = setting.module(case)
    fresh.on_load_checkpoint(torch.load(path, weights_only=False))
    fresh.load_state_dict(saved, strict=False)
    assert_equal(dict(fresh.state_dict()), dict(module.state_dict()))


@cases(PRUNING)
def test_a_checkpoint_spares_the_calibration(
    case: Case, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = setting.module(case)
    setting.fit(module, steps=6, stop_after=1)
    expected = state(module)

    def run(*_: Any) -> None:
        raise AssertionError("calibrated")

    monkeypatch.setattr(Layerwise, "run", run)
    with pytest.raises(AssertionError, match="calibrated"):
        setting.fit(setting.module(case))
    path = setting.folder / "stopped.ckpt"
    tested = setting.module(case)
    setting.trainer().test(
        tested, datamodule=setting.data(), ckpt_path=path, weights_only=False, verbose=False
    )
    assert_equal(state(tested), expected)
    assert tested.calibrated == module.calibrated
    assert (tested.calibrated is None) == (case.label.endswith(UNREAD))
    setting.fit(setting.module(case), steps=3, ckpt_path=path)


@cases()
def test_what_is_measured_is_what_ships(case: Case, setting: Setting) -> None:
    module = setting.module(case)
    trainer, _ = setting.fit(module)
    trainer.test(module, datamodule=setting.data(), verbose=False)
    score = module.scores["overall"]
    export(module.masked, setting.folder / "out", {})
    plain = AutoModelForCausalLM.from_pretrained(setting.folder / "out", dtype=torch.float32)
    assert score.windows >= 20
    assert perplexity(plain, setting.data()) == pytest.approx(score.perplexity, rel=1e-6)


def perplexity(plain: PreTrainedModel, data: TextDataModule) -> float:
    """Of the test text, window by window."""
    data.setup("test")
    means = []
    with torch.no_grad():
        for window in torch.cat(list(data.test_dataloader()[0])):
            logits = plain(input_ids=window[None]).logits[0]
            means.append(F.cross_entropy(logits[:-1], window[1:]).item())
    return math.exp(sum(means) / len(means))


@cases(PRUNING_ONCE)
def test_experts_are_pruned_as_other_layers_are(case: Case, setting: Setting) -> None:
    first = state(setting.built(case, model=tiny_mixtral()))
    module = setting.module(case, tiny_mixtral())
    trainer, recorder = setting.fit(module, steps=2)
    assert all(math.isfinite(loss) for loss in recorder.losses)
    after = state(module)
    stacks = [name for name, layer in masked_layers(module.lm).items() if layer.experts == 4]
    assert len(stacks) == 4
    for name in stacks:
        learned = {n for n, p in module.named_parameters() if p.requires_grad}
        own = {n for n in learned if n.startswith(f"model.{name}")}
        assert bool(own) == case.learns
        assert all(not torch.equal(after[n], first[n]) for n in own)
    trainer.test(module, datamodule=setting.data(), verbose=False)
    export(module.masked, setting.folder / "out", {})
    plain = AutoModelForCausalLM.from_pretrained(
        setting.folder / "out", dtype=torch.float32, experts_implementation="eager"
    )
    values, dense = dict(plain.named_parameters()), dict(tiny_mixtral().named_parameters())
    for name, mask in hard_masks(module.lm):
        assert bool((mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()), name
        key = name if name in stacks else f"{name}.weight"
        weight_OI, dense_OI = (w.view(-1, w.shape[-1]) for w in (values[key], dense[key]))
        assert not bool(weight_OI[~mask].any()), name
        if module.strategy.effect.weights == "frozen":
            assert torch.equal(weight_OI[mask], dense_OI[mask]), name
    assert module.scores["overall"].perplexity == pytest.approx(
        perplexity(plain, setting.data()), rel=1e-6
    )


@cases(LEARNING_ONCE)
def test_a_run_with_experts_resumes_bit_for_bit(case: Case, setting: Setting) -> None:
    whole = setting.module(case, tiny_mixtral())
    _, expected = setting.fit(whole, steps=2)
    _, first = setting.fit(setting.module(case, tiny_mixtral()), steps=2, stop_after=1)
    torch.manual_seed(3)
    resumed = setting.module(case, tiny_mixtral(), gradient_checkpointing=True)
    _, second = setting.fit(resumed, steps=2, ckpt_path=setting.folder / "stopped.ckpt")
    assert first.losses + second.losses == expected.losses
    assert_equal(dict(resumed.state_dict()), dict(whole.state_dict()))


@cases(PRUNING)
def test_validation_is_under_the_hard_mask(case: Case, setting: Setting) -> None:
    module = setting.built(case)
    tokens = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0))
    losses = module.window_losses(tokens)
    assert torch.equal(module.window_losses(tokens), losses)
    dense = module.window_losses(tokens, "dense")
    if module.strategy.effect.weights == "updated":  # the dense weights are gone
        torch.testing.assert_close(dense, losses)
        dense = plain_losses(tokens)
    assert float((losses - dense).abs().max()) > 0.01
    assert torch.equal(dense, plain_losses(tokens))


def plain_losses(tokens: Tensor) -> Tensor:
    """Of the dense model that nothing was done to."""
    logits = tiny_llama()(input_ids=tokens).logits.detach()[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)


@cases(BACKWARD)
def test_accumulated_micro_batches_have_own_draws_and_the_mean_gradient(
    case: Case, setting: Setting
) -> None:
    module = setting.module(case, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    _, recorder = setting.fit(module, steps=2, accumulate_grad_batches=2)
    assert len(recorder.batches) == 4
    assert len(recorder.gradients) == 2
    for step in (0, 1):
        for name, parameter in module.named_parameters():
            parameter.data.copy_(recorder.values[step][name])
        module.strategy.anneal(step / 2)
        found: dict[str, list[Tensor]] = {}
        for micro_batch in (0, 1):
            module.zero_grad()
            batch = recorder.batches[2 * step + micro_batch]
            loss = module.strategy.loss(HandRun(module, batch, step, micro_batch))
            assert loss.item() == pytest.approx(
                recorder.losses[2 * step + micro_batch] * 2, rel=1e-6
            )
            loss.backward()
            for name in recorder.gradients[step]:
                found.setdefault(name, []).append(module.get_parameter(name).grad.clone())
        for name, (first, second) in found.items():
            torch.testing.assert_close(
                recorder.gradients[step][name], (first + second) / 2, rtol=1e-5, atol=1e-8, msg=name
            )
            # Another draw would have given another gradient: the tolerance sees it. (What is
            # multiplied by something that starts at zero has none at first.)
            alike = torch.allclose(first, second, rtol=1e-2, atol=0)
            assert not alike or (step == 0 and not bool(first.any())), name
    after = state(module)
    assert all(bool(value.isfinite().all()) for value in after.values())


@cases(LEARNING)
def test_activation_checkpointing_changes_no_bit(case: Case, setting: Setting) -> None:
    states, calls = [], [0, 0]
    for checkpointed in (False, True):

        def count(*_: Any, which: bool = checkpointed) -> None:
            calls[which] += 1

        module = setting.built(case, gradient_checkpointing=checkpointed)
        for layer in masked_layers(module.lm).values():
            layer.register_forward_pre_hook(count)
        _, recorder = setting.fit(module)
        states.append((state(module), recorder.losses))
    # Every layer ran again in backward, of the passes that have one.
    assert calls[1] > calls[0] > 0 if case.gradients else calls[1] == calls[0] > 0
    assert_equal(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]


@cases(LEARNING)
def test_noise_follows_seed_step_and_draw(case: Case, setting: Setting) -> None:
    module = setting.built(case)
    batch = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))

    def loss(step: int, index: int, seed: int = 0) -> float:
        module.seed = seed
        run = BatchRun(module.masked, batch, Draw(module.seed, step, index))
        return module.strategy.loss(run).item()

    values = [loss(0, 0), loss(0, 1), loss(1, 0), loss(0, 0, seed=1)]
    torch.manual_seed(7)
    assert [loss(0, 0), loss(0, 1), loss(1, 0), loss(0, 0, seed=1)] == values
    assert len(set(values)) == (4 if case.draws else 1)
