"""Learning from the dense model: the loss by hand, what is run for it, and what is saved.

Shapes: B windows, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from sparsify import Calibration, Draw, SparseCausalLM, SparsifyError, SparsityStrategy
from sparsify import TextDataModule as Data
from sparsify.callbacks.annealing import Annealing
from sparsify.masking import distillation
from sparsify.masking.distillation import Distillation, divergence, relative_error
from sparsify.masking.layer import base_parameters
from sparsify.masking.schedule import Schedule
from sparsify.models.hashes import hash_parameters
from sparsify.models.token_batch import TokenBatch
from sparsify.strategies.fixed_mask import FixedMask
from sparsify.strategies.maskllm import MaskLLM
from sparsify.strategies.proxsparse import ProxSparse
from sparsify.strategies.sparsegpt import SparseGPT
from sparsify.strategies.sr_ste import SRSTE
from sparsify.training.step import BatchRun
from tests.conftest import quiet_trainer, tiny_llama
from tests.strategies.training import built, sgd

TOKENS = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0))
TARGETS = torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) < 0.5
DRAW = Draw(0, 0, 0)

MAKE: dict[str, Callable[[], SparsityStrategy]] = {
    "frozen": lambda: MaskLLM(prior="magnitude"),
    "trained": lambda: SRSTE(decay=5.0),
    "trained from updated weights": lambda: FixedMask(SparseGPT(update_weights=True)),
    "proxy": lambda: ProxSparse(strength=0.3),
    "adapted": lambda: FixedMask("magnitude", lora_rank=2),
}
kinds = pytest.mark.parametrize("kind", MAKE)


def slow(student: Tensor, teacher: Tensor, temperature: float, targets: Tensor | None) -> float:
    """temperature^2 KL(teacher || student), in nats, token by token; the first is never one that
    is predicted.
    """
    total, count = 0.0, 0
    for b in range(student.shape[0]):
        for t in range(student.shape[1] - 1):
            if targets is not None and not targets[b, t + 1]:
                continue
            q = [math.exp(x / temperature) for x in student[b, t].tolist()]
            p = [math.exp(x / temperature) for x in teacher[b, t].tolist()]
            zq, zp = sum(q), sum(p)
            total += sum(x / zp * math.log((x / zp) / (y / zq)) for x, y in zip(p, q, strict=True))
            count += 1
    return temperature**2 * total / count


def random_logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, 16, 24, generator=generator) * 2 for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("targets", [None, TARGETS])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_loss_is_the_mixture(weight: float, temperature: float, targets: Tensor | None) -> None:
    student, teacher = random_logits()
    mixed = Distillation(weight, temperature).mix(torch.tensor(2.5), student, teacher, targets)
    divergence = slow(student.double(), teacher.double(), temperature, targets)
    assert divergence > 0.5
    assert mixed.item() == pytest.approx((1 - weight) * 2.5 + weight * divergence, rel=1e-5)
    same = Distillation(1.0, temperature).mix(torch.tensor(2.5), teacher, teacher, targets)
    assert same.item() == pytest.approx(0, abs=1e-6)
    backwards = slow(teacher.double(), student.double(), temperature, targets)
    assert abs(backwards - divergence) > 0.01  # which way round it is can be told


def test_its_gradient_keeps_its_size_at_any_temperature() -> None:
    student, teacher = random_logits()
    student.requires_grad_()
    gradients = []
    for temperature in (1.0, 30.0, 60.0):
        loss = Distillation(1.0, temperature).mix(torch.zeros(()), student, teacher, None)
        gradients.append(torch.autograd.grad(loss, student)[0])
    # By hand: temperature * (q - p) over the number of predicted tokens.
    q, p = (torch.softmax(x.double() / 30.0, -1) for x in (student.detach(), teacher))
    expected = 30.0 * (q - p) / (3 * 15)
    expected[:, -1] = 0
    torch.testing.assert_close(gradients[1].double(), expected, rtol=1e-3, atol=1e-7)
    norms = [float(g.norm()) for g in gradients]
    assert norms[1] == pytest.approx(norms[2], rel=0.1)
    assert 0.2 < norms[1] / norms[0] < 5
    assert not bool(gradients[0][:, -1].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 100, 1 << 24])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_pieces_change_neither_the_divergence_nor_its_gradient(
    temperature: float, at_once: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "AT_ONCE", at_once)
    student, teacher = (logits.to(dtype) for logits in random_logits())
    upstream = torch.randn(3, 15, generator=torch.Generator().manual_seed(2))
    student.requires_grad_()
    found = divergence(student, teacher, temperature)
    assert found.dtype == torch.float32
    found.backward(upstream)
    twin = student.detach().double().requires_grad_()
    p, q = (torch.log_softmax(x[:, :-1].double() / temperature, -1) for x in (teacher, twin))
    expected = (p.exp() * (p - q)).sum(-1)
    expected.backward(upstream.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    wanted = twin.grad.to(dtype)
    rtol = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(student.grad, wanted, rtol=rtol, atol=rtol * 1e-2)


@pytest.mark.parametrize("targets", [None, TARGETS])
def test_blocks_add_their_relative_errors(targets: Tensor | None) -> None:
    student, teacher = random_logits()
    generator = torch.Generator().manual_seed(3)
    blocks, dense = (
        [torch.randn(3, 16, 5, generator=generator) for _ in range(2)] for _ in range(2)
    )
    total = 0.0
    for h, h_dense in zip(blocks, dense, strict=True):
        error = size = 0.0
        for b in range(3):
            for t in range(15):
                if targets is None or targets[b, t + 1]:
                    x, y = h[b, t].tolist(), h_dense[b, t].tolist()
                    error += sum((i - j) ** 2 for i, j in zip(x, y, strict=True))
                    size += sum(j**2 for j in y)
        total += error / size
    args = torch.tensor(2.5), student, teacher, targets
    for weight in (0.0, 0.4):
        without = Distillation(weight).mix(*args).item()
        found = Distillation(weight, hidden=0.3).mix(*args, blocks, dense).item()
        assert found == pytest.approx(without + 0.3 * total, rel=1e-5)
    block = blocks[0].requires_grad_()
    relative_error(block, dense[0], targets).backward()
    twin = block.detach().requires_grad_()
    counts = torch.ones(3, 15) if targets is None else targets[:, 1:].float()
    error, size = ((h.square().sum(-1)[:, :-1] * counts).sum() for h in (twin - dense[0], dense[0]))
    (error / size).backward()
    torch.testing.assert_close(block.grad, twin.grad)
    same = dense[0].clone().requires_grad_()
    relative_error(same, dense[0], targets).backward()
    assert not same.grad.any()
    nothing = torch.zeros(3, 16, dtype=torch.bool)
    assert Distillation(1.0, hidden=1.0).mix(*args[:3], nothing, blocks, dense).item() == 0


def test_a_run_gives_the_outputs_of_the_blocks(tokenizer: PreTrainedTokenizerFast) -> None:
    module = built(MAKE["frozen"](), tokenizer)
    run = BatchRun(module.masked, TOKENS, DRAW)
    assert run(DRAW).blocks == ()
    found = run("dense", grad=False, blocks=True)
    expected = tiny_llama()(input_ids=TOKENS, output_hidden_states=True).hidden_states
    assert len(found.blocks) == len(expected) - 1 == 2
    assert all(torch.equal(a, b) for a, b in zip(found.blocks, expected[1:], strict=True))
    sparse = run(DRAW, blocks=True)
    assert all(h.requires_grad for h in sparse.blocks)
    assert not torch.equal(sparse.blocks[0], found.blocks[0])
    module.lm.forward = lambda **_: CausalLMOutputWithPast(logits=found.logits)
    with pytest.raises(SparsifyError, match="does not give the outputs.*distillation.hidden 0"):
        run(DRAW, blocks=True)


def test_the_task_loss_is_that_under_masks(tokenizer: PreTrainedTokenizerFast) -> None:
    run = BatchRun(built(MAKE["frozen"](), tokenizer).masked, TOKENS, DRAW)
    dense = run("dense", grad=False).task_loss
    assert run.task_loss == dense  # there is no other yet
    sparse = run(DRAW).task_loss
    assert sparse != dense
    run("dense", grad=False)
    assert run.task_loss == sparse


def test_a_strategy_advises_and_the_run_decides(tokenizer: PreTrainedTokenizerFast) -> None:
    class Advising(MaskLLM):
        distillation = Distillation(0.7, hidden=0.1)

    def found(**options: Any) -> Distillation:
        return built(Advising(prior="magnitude"), tokenizer, **options).distillation

    assert found() == Distillation(0.7, 1.0, 0.1)
    assert found(distillation=Distillation(hidden=0.0)) == Distillation(0.7, 1.0, 0.0)
    assert found(distillation=Distillation(0.0, 2.0)) == Distillation(0.0, 2.0, 0.1)
    assert built(MAKE["frozen"](), tokenizer).distillation == Distillation(0.0, 1.0, 0.0)
    falling = Distillation(hidden=Schedule(0.5, 0.0))
    advised = falling.over(Distillation(0.7))
    assert advised == Distillation(0.7, 1.0, Schedule(0.5, 0.0))
    assert [advised.at(share).numbers for share in (0, 0.4)] == [(0.7, 1.0, 0.5), (0.7, 1.0, 0.3)]
    module = built(Advising(prior="magnitude"), tokenizer)
    counter = Counter(module)
    BatchRun(module.masked, TOKENS, DRAW, module.distillation)(DRAW)
    assert counter.maskings == ["dense", DRAW]


def test_a_task_loss_that_does_not_count_has_no_graph(tokenizer: PreTrainedTokenizerFast) -> None:
    module = built(MAKE["frozen"](), tokenizer)
    for weight in (0.5, 1.0):
        result = BatchRun(module.masked, TOKENS, DRAW, Distillation(weight))(DRAW)
        assert result.loss.requires_grad
        assert result.task_loss.requires_grad == (weight < 1)


def test_no_target_is_no_loss() -> None:
    student, teacher = random_logits()
    nothing = torch.zeros(3, 16, dtype=torch.bool)
    nothing[:, 0] = True  # the first token is predicted by none
    assert Distillation(1.0).mix(torch.zeros(()), student, teacher, nothing).item() == 0


class Counter:
    """Counts the forward passes of a model, and under which masking they are."""

    def __init__(self, module: SparseCausalLM) -> None:
        self.maskings: list[Any] = []
        module.lm.register_forward_pre_hook(
            lambda *_: self.maskings.append(module.masked.scope.masking)
        )


@kinds
def test_without_weight_nothing_is_run_or_held(
    kind: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    module = built(MAKE[kind](), tokenizer)
    counter = Counter(module)
    assert module.teacher is None
    run = BatchRun(module.masked, TOKENS, DRAW, module.distillation, module.teacher)
    result = run(run.draw())
    assert counter.maskings == [DRAW]
    assert result.loss is result.task_loss


@kinds
@pytest.mark.parametrize("instructions", [False, True])
def test_the_teacher_is_the_model_as_it_was(
    kind: str, instructions: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    distillation = Distillation(0.7, 2.0)
    module = built(MAKE[kind](), tokenizer, distillation=distillation)
    assert (module.teacher is not None) == module.strategy.effect.changes_base
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.3)
    dense = tiny_llama()(input_ids=TOKENS).logits.detach()
    batch = TokenBatch(TOKENS, TARGETS) if instructions else TOKENS
    targets = TARGETS if instructions else None
    for _ in range(3):
        run = BatchRun(module.masked, batch, DRAW, distillation, module.teacher)
        result = run(run.draw())
        expected = slow(result.logits.detach().double(), dense.double(), 2.0, targets)
        losses = F.cross_entropy(
            result.logits[:, :-1].detach().flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none"
        )
        wanted = TARGETS[:, 1:].flatten() if instructions else torch.ones(45, dtype=torch.bool)
        task = losses[wanted].mean().item()
        assert result.task_loss.item() == pytest.approx(task, rel=1e-5)
        assert run.task_loss is not None
        assert run.task_loss.item() == pytest.approx(task, rel=1e-5)
        assert result.loss.item() == pytest.approx(0.3 * task + 0.7 * expected, rel=1e-4)
        optimizer.zero_grad()
        module.strategy.loss(run).backward()
        optimizer.step()
        module.strategy.after_step(module.masked.maskers, 0.01)
    if module.teacher is not None:
        assert not any(p.requires_grad for p in module.teacher.parameters())
        assert all(p.grad is None for p in module.teacher.parameters())
        assert hash_parameters(dict(module.teacher.named_parameters())) == module.masked.base.hash
        assert hash_parameters(base_parameters(module.lm)) != module.masked.base.hash


def test_the_dense_model_runs_once_a_micro_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    module = built(MAKE["frozen"](), tokenizer, distillation=Distillation(1.0))
    counter = Counter(module)
    run = BatchRun(module.masked, TOKENS, DRAW, module.distillation, module.teacher)
    for k in range(3):
        run(run.draw(k, 3))
    assert counter.maskings.count("dense") == 1
    assert len(counter.maskings) == 4


@kinds
def test_its_gradient_is_that_of_the_plain_loss(
    kind: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    module = built(MAKE[kind](), tokenizer, distillation=Distillation(1.0))
    run = BatchRun(module.masked, TOKENS, DRAW, module.distillation, module.teacher)
    run(run.draw()).loss.backward()
    found = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    p = torch.softmax(tiny_llama()(input_ids=TOKENS).logits.detach()[:, :-1], -1)
    with module.masked.scope.use(DRAW):
        logits = module.lm(input_ids=TOKENS).logits
    # The entropy of the dense model is a constant.
    (-(p * torch.log_softmax(logits[:, :-1], -1)).sum(-1).mean()).backward()
    expected = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


class Stop(Callback):
    """Keeps losses; saves after a step and stops."""

    def __init__(self, at: int, path: Path) -> None:
        self.at, self.path = at, path
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].item())
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@kinds
def test_checkpoints_hold_no_teacher_and_go_on_bit_for_bit(
    kind: str, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    def fit(stop: int, ckpt_path: Path | None = None) -> tuple[SparseCausalLM, list[float]]:
        module = SparseCausalLM.from_model(
            tiny_llama(),
            tokenizer,
            MAKE[kind](),
            optimizer=sgd(0.05),
            distillation=Distillation(0.5, 2.0),
            calibration=Calibration(samples=8, cache=False),
        )
        callback = Stop(stop, tmp_path / "stopped.ckpt")
        trainer = quiet_trainer(tmp_path, max_steps=4, callbacks=[Annealing(), callback])
        data = Data(train=str(text / "train.txt"), block_size=16, batch_size=4)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=ckpt_path is None)
        return module, callback.losses

    whole, expected = fit(0)
    _, first = fit(2)
    saved = torch.load(tmp_path / "stopped.ckpt", weights_only=False)
    assert not any("teacher" in name for name in saved["state_dict"])
    resumed, second = fit(0, tmp_path / "stopped.ckpt")
    assert first + second == expected
    assert len(second) == 2
    state, other = dict(whole.state_dict()), dict(resumed.state_dict())
    assert state.keys() == other.keys()
    assert any(name.startswith("teacher.") for name in state) == whole.strategy.effect.changes_base
    for name, value in state.items():
        assert torch.equal(value, other[name]), name
    if resumed.teacher is not None:
        assert hash_parameters(dict(resumed.teacher.named_parameters())) == whole.masked.base.hash


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -0.1}, "weight=-0.1.*between 0 and 1"),
        ({"weight": 1.1}, "weight=1.1.*between 0 and 1"),
        ({"weight": math.nan}, "weight=nan"),
        ({"temperature": 0.0}, "temperature=0.0.*above 0"),
        ({"temperature": -1.0}, "temperature=-1.0.*--model.distillation.temperature"),
        ({"hidden": -1.0}, "hidden=-1.0.*must not be negative"),
        ({"hidden": math.nan}, "hidden=nan"),
        ({"hidden": Schedule(1.0, -0.5)}, r"hidden=Schedule.*-0.5.*must not be negative"),
        ({"hidden": Schedule(0.0, math.nan)}, r"hidden=Schedule.*nan"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsifyError, match=message):
        Distillation(**options)
