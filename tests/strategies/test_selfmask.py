"""Selfmask: its start, its gradient and its steps, each by another way.

Shapes: O out, I in, M group size.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsify import Draw, LayerResult, NMPattern, SparseCausalLM, SparsifyError
from sparsify.masking import noise
from sparsify.masking.distillation import Distillation
from sparsify.masking.inject import hard_masks
from sparsify.masking.layer import MaskedLinear, MaskScope, masked_layers
from sparsify.masking.mask_bits import unpack
from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.schedule import Schedule
from sparsify.models.base import BaseModel
from sparsify.strategies.selfmask import ScoreMasker, SelfMask
from sparsify.training.step import BatchRun
from tests.conftest import SIZES, tiny_llama
from tests.strategies.training import built, largest, rate, sgd, train

PATTERNS = ("2:4", "1:4", "4:8", "8:16", "1:2", "3:5")
DRAW = Draw(0, 0, 0)
DTYPES = ("float32", "bfloat16")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def started(
    weight_OI: Tensor,
    text: str,
    prior_OI: Tensor | None = None,
    inputs_I: Tensor | None = None,
    **options: Any,
) -> ScoreMasker:
    """A masker after its start."""
    strategy = SelfMask(prior=None if prior_OI is None else "magnitude", **options)
    masker = strategy.make_masker("layer", tuple(weight_OI.shape), NMPattern.parse(text))  # type: ignore[arg-type]
    result = None if prior_OI is None else LayerResult(prior_OI, inputs=inputs_I)
    strategy.init_masker(masker, weight_OI, result)
    return masker


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("margin", [0.0, 0.02])
def test_it_starts_from_the_priors_mask(text: str, dtype: Any, margin: float) -> None:
    pattern = NMPattern.parse(text)
    weight_OI = (random(16, 240) * 8).round() / 8  # ties, and zeros
    prior_OI = pattern.top(random(16, 240, seed=1))
    for chosen in (prior_OI, None):
        masker = started(weight_OI, text, chosen, dtype=dtype, margin=margin)
        expected = pattern.top(weight_OI.abs()) if chosen is None else chosen
        assert masker.scores_OI.dtype == getattr(torch, dtype)
        assert torch.equal(masker.hard_mask(weight_OI), expected)
        assert torch.equal(pattern.top(masker.scores_OI.detach()), expected)


@pytest.mark.parametrize("measured", [True, False])
def test_first_scores_are_those_of_the_equations(measured: bool) -> None:
    weight_OI, prior_OI = random(6, 16), NMPattern(2, 4).top(random(6, 16, seed=1))
    inputs_I = 3 * random(16, seed=2).abs() if measured else None
    masker = started(weight_OI, "2:4", prior_OI, inputs_I, scale=0.3, margin=0.05)
    size = weight_OI.double().abs().numpy()
    if inputs_I is not None:
        size = size * inputs_I.double().numpy()
    score = 0.3 * (size / size.mean()) ** 2
    for row in range(6):
        for start in range(0, 16, 4):
            group = range(start, start + 4)
            kept = [i for i in group if prior_OI[row, i]]
            least = min(score[row, i] for i in kept)
            for i in group:
                if i in kept:
                    score[row, i] += 0.05
                elif score[row, i] > least:  # it is pressed down to the smallest kept one
                    score[row, i] = least
    np.testing.assert_allclose(masker.scores_OI.detach().numpy(), score, rtol=1e-5)


@pytest.mark.parametrize("text", PATTERNS)
def test_the_gradient_is_that_of_the_mask_less_the_groups_mean(text: str) -> None:
    pattern = NMPattern.parse(text)
    weight_OI, x_BI, upstream_BO = random(8, 240), random(5, 240, seed=1), random(5, 8, seed=2)
    masker = started(weight_OI, text)
    linear = nn.Linear(240, 8, bias=False)
    linear.weight = nn.Parameter(weight_OI, requires_grad=False)
    layer = MaskedLinear(linear, masker, MaskScope())
    with layer.scope.use(DRAW):
        y_BO = layer(x_BI)
        y_BO.backward(upstream_BO)
    # The same product with the mask as a tensor that autograd differentiates.
    mask_OI = torch.from_numpy(largest(weight_OI.numpy(), pattern.n, pattern.m))
    mask_OI = mask_OI.float().requires_grad_()
    expected_BO = F.linear(x_BI, weight_OI * mask_OI)
    expected_BO.backward(upstream_BO)
    torch.testing.assert_close(y_BO, expected_BO)
    slope_OGM = mask_OI.grad.view(8, -1, pattern.m)  # type: ignore[union-attr]
    expected = (slope_OGM - slope_OGM.mean(-1, keepdim=True)).view(8, 240)
    torch.testing.assert_close(masker.scores_OI.grad, expected, rtol=1e-4, atol=1e-5)
    assert masker.kept_OJ.grad is None


class Hand:
    """Steps on the tiny model that are taken with plain autograd and numpy."""

    def __init__(self, module: SparseCausalLM) -> None:
        self.distillation = module.distillation
        self.scores = {
            name: layer.masker.scores_OI.detach().double().numpy().copy()
            for name, layer in masked_layers(module.lm).items()
        }
        self.mean = {name: np.zeros_like(score) for name, score in self.scores.items()}
        self.square = {name: np.zeros((len(score), 1)) for name, score in self.scores.items()}

    def slopes(self, tokens: Tensor, progress: float) -> dict[str, Any]:
        """What backward gives each score, from the masked weights' gradients."""
        share, _, hidden = self.distillation.at(progress).numbers
        sparse, dense = tiny_llama(), tiny_llama()
        weights = {name: sparse.get_submodule(name).weight for name in self.scores}
        for name, weight in weights.items():
            weight.data *= torch.from_numpy(largest_of(self.scores[name]))
        out, wanted = (
            model(input_ids=tokens, output_hidden_states=True) for model in (sparse, dense)
        )
        p = torch.softmax(wanted.logits[:, :-1].detach(), -1)
        log_q = torch.log_softmax(out.logits[:, :-1], -1)
        loss = share * (p * (p.log() - log_q)).sum(-1).mean()
        for h, h_dense in zip(out.hidden_states[1:], wanted.hidden_states[1:], strict=True):
            apart, size = (h - h_dense.detach())[:, :-1], h_dense[:, :-1].detach()
            loss = loss + hidden * (apart.norm() / size.norm()).square()
        if share < 1:
            shifted = out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
            loss = loss + (1 - share) * F.cross_entropy(*shifted)
        loss.backward()
        found = {}
        for name, weight in weights.items():
            plain = tiny_llama().get_submodule(name).weight.detach()
            product = (weight.grad * plain).double().numpy()  # type: ignore[operator]
            groups = product.reshape(len(product), -1, 4)
            found[name] = (groups - groups.mean(-1, keepdims=True)).reshape(product.shape)
        return found

    def step(self, tokens: Tensor, lr: float, number: int) -> None:
        for name, slope in self.slopes(tokens, number / 4).items():
            self.mean[name] = 0.9 * self.mean[name] + 0.1 * slope
            signs = noise.uniform(noise.fold("signs", 0, number), slope.shape[1], 16).numpy() > 0.5
            squares = ((slope @ np.where(signs, 1.0, -1.0)) ** 2).mean(1, keepdims=True)
            self.square[name] = 0.99 * self.square[name] + 0.01 * squares / slope.shape[1]
            square = self.square[name] / (1 - 0.99 ** (number + 1))
            size = np.sqrt(np.maximum(square, 0.01 * square.mean()))
            self.scores[name] -= lr * self.mean[name] / (1 - 0.9 ** (number + 1)) / size


def largest_of(score: Any) -> Any:
    """The mask of the two largest scores of each group of four (scores may be negative)."""
    return largest(score - score.min())


@pytest.mark.parametrize(
    "distillation",
    [
        Distillation(),
        Distillation(0.0, hidden=0.0),
        Distillation(0.5, hidden=0.7),
        Distillation(hidden=Schedule(2.0, 0.0)),
    ],
    ids=["as advised", "no teacher", "other weights", "falling"],
)
def test_steps_are_those_of_the_equations(
    distillation: Distillation,
    tokenizer: PreTrainedTokenizerFast,
    text: Path,
    tmp_path: Path,
) -> None:
    strategy = SelfMask("magnitude", lr=0.02)
    module = built(strategy, tokenizer, distillation=distillation)
    if distillation == Distillation():
        assert module.distillation == Distillation(1.0, 1.0, 0.0)
    hand = Hand(module)
    first = dict(hard_masks(module.lm))
    steps = train(module, text, tmp_path)
    for number, tokens in enumerate(steps.batches):
        hand.step(tokens, rate(0.02, number), number)
    for name, layer in masked_layers(module.lm).items():
        found = layer.masker.scores_OI.detach().numpy()
        np.testing.assert_allclose(found, hand.scores[name], atol=2e-4, err_msg=name)
        mask = unpack(layer.masker.kept_OJ.detach(), found.shape[1])
        assert torch.equal(mask, NMPattern(2, 4).top(layer.masker.scores_OI.detach()))
    masks = dict(hard_masks(module.lm))
    flipped = [float((masks[name] != first[name]).float().mean()) for name in masks]
    assert min(flipped) > 0.01  # enough for a mistake to show


def test_bf16_takes_four_bytes_and_a_bit_a_weight_and_no_gradient(
    tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    module = built(SelfMask("magnitude", lr=0.02, dtype="bfloat16"), tokenizer)
    first = dict(hard_masks(module.lm))
    steps = train(module, text, tmp_path)
    assert steps.gradients == [{}] * 4
    optimizer = module.trainer.optimizers[0]
    layers = masked_layers(module.lm).values()
    weights = sum(layer.weight.numel() for layer in layers)
    held = sum(p.nbytes for layer in layers for p in layer.masker.parameters())
    states = optimizer.state.values()
    assert held + sum(state["momentum"].nbytes for state in states) == (4 + 1 / 8) * weights
    rows = sum(len(layer.weight) for layer in layers)
    assert sum(state["square"].nbytes for state in states) == 4 * rows
    assert {key for state in states for key in state} == {"step", "momentum", "square"}
    masks = dict(hard_masks(module.lm))
    assert any(not torch.equal(masks[name], first[name]) for name in masks)


def test_one_rate_flips_as_many_groups_at_any_width() -> None:
    shares = {}
    for width in (64, 128, 256):
        config = LlamaConfig(**SIZES | {"hidden_size": width, "intermediate_size": 2 * width})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = BaseModel(LlamaForCausalLM(config).eval(), "random", torch.float32, "")
        strategy = SelfMask(None, lr=0.01)
        masked = MaskedModel(base, strategy)
        masked.calibrate()
        learned = [p for p in base.model.parameters() if p.requires_grad]
        optimizer = strategy.optimizer(learned, masked.maskers, sgd(0.1))
        shares[width] = []
        for step in range(5):
            tokens = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(step))
            before = masked.hard_masks()
            run = BatchRun(masked, tokens, Draw(0, step, 0), strategy.distillation)
            strategy.loss(run).backward()
            optimizer.step()
            strategy.after_step(masked.maskers, 0.01)
            flips = [mask != before[name] for name, mask in masked.hard_masks().items()]
            share = [float(f.view(len(f), -1, 4).any(-1).float().mean()) for f in flips]
            shares[width].append(sum(share) / len(share))
    assert 0.005 < shares[64][-1] < 0.05
    for width in (128, 256):  # with four and sixteen times as many weights
        assert shares[width][-1] == pytest.approx(shares[64][-1], rel=0.3)


def test_metrics_say_how_far_groups_are_from_a_flip() -> None:
    weight_OI = random(6, 16)
    masker = started(weight_OI, "2:4", margin=0.0)
    scores = masker.scores_OI.detach().double().numpy()
    margins = [
        sorted(group)[2] - sorted(group)[1] for row in scores for group in row.reshape(-1, 4)
    ]
    assert float(masker.metrics()["margin"]) == pytest.approx(np.mean(margins), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale=0.0.*must be positive"),
        ({"margin": -0.1}, "margin=-0.1.*not negative"),
        ({"margin": 1e38}, r"margin=1e\+38.*at most 1,000"),
        ({"scale": float("inf")}, "scale=inf.*at most 1,000"),
        ({"dtype": "float16"}, "dtype='float16'.*'float32' or 'bfloat16'"),
        ({"prior": "maskllm"}, "prior MaskLLM: it learns its masks"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsifyError, match=message):
        SelfMask(**options)
