"""MaskLLM's distribution, its start, its samples and its loss, against the paper's equations.

Shapes: O out, I in, G groups, M group size, K candidates.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sparsify import Draw, LayerResult, NMPattern, Schedule, SparseCausalLM, SparsifyError
from sparsify.calibration import Calibration
from sparsify.calibration.prior import MasksOnly
from sparsify.export.folder import export
from sparsify.export.mask_file.file import write_masks
from sparsify.export.mask_file.index import FILE_NAME
from sparsify.masking import noise
from sparsify.masking.inject import hard_masks
from sparsify.masking.layer import base_parameters, masked_layers
from sparsify.models.hashes import hash_parameters
from sparsify.strategies.magnitude import Magnitude
from sparsify.strategies.maskllm import CandidateMasker, MaskLLM
from sparsify.strategies.sparsegpt import SparseGPT
from sparsify.training.build import calibrate
from sparsify.training.step import BatchRun
from tests.conftest import tiny_llama

TWO_FOUR = NMPattern(2, 4)
SHAPE = (256, 512)  # 32,768 groups of 2:4
GROUPS = SHAPE[0] * SHAPE[1] // 4
TOKENS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
TEXT = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(1))


def start(
    strategy: MaskLLM,
    prior: Tensor | None,
    pattern: NMPattern = TWO_FOUR,
    shape: tuple[int, int] = SHAPE,
) -> CandidateMasker:
    """A masker with its first logits."""
    masker = strategy.make_masker("layer", shape, pattern)
    strategy.init_masker(masker, torch.ones(shape), None if prior is None else LayerResult(prior))
    return masker


def random_prior(pattern: NMPattern = TWO_FOUR, shape: tuple[int, int] = SHAPE) -> Tensor:
    """A random candidate for every group."""
    generator = torch.Generator().manual_seed(0)
    return pattern.unrank(
        torch.randint(pattern.candidates, (shape[0], shape[1] // pattern.m), generator=generator)
    )


def masks_of(masker: CandidateMasker, index: int = 0) -> Tensor:
    """One soft mask, [O, I]: the sample of a weight of ones."""
    return masker.sample(torch.ones(masker.shape), Draw(0, 0, index))[0].detach()


def built(
    strategy: MaskLLM, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, **options: Any
) -> SparseCausalLM:
    """A module with its first logits."""
    module = SparseCausalLM.from_model(model, tokenizer, strategy, **options)
    module.configure_model()
    calibrate(module, windows=lambda: TEXT)
    return module


def logits(module: SparseCausalLM) -> dict[str, Tensor]:
    """The logits of all layers."""
    return {n: layer.masker.logits_OKG.detach() for n, layer in masked_layers(module.lm).items()}


def agreement(mask: Tensor, prior: Tensor, m: int = 4) -> float:
    """The share of groups that are as in the prior."""
    return float((mask == prior).unflatten(1, (-1, m)).all(-1).double().mean())


@pytest.mark.parametrize("text", ["1:4", "2:4", "2:8", "4:8"])
def test_a_soft_mask_sums_to_n_in_every_group(text: str) -> None:
    pattern = NMPattern.parse(text)
    masker = start(MaskLLM(), random_prior(pattern, (8, 64)), pattern, (8, 64))
    sums = masks_of(masker).unflatten(1, (-1, pattern.m)).sum(-1)
    torch.testing.assert_close(
        sums, torch.full_like(sums, pattern.n), atol=2e-6 * pattern.m, rtol=0
    )


def test_samples_follow_the_softmax_of_scaled_logits() -> None:
    prior = random_prior()
    masker = start(MaskLLM(alpha=3.0, init_std=0.01, tau=Schedule(1e-6, 1e-6)), prior)
    # The prior's part of the logits alone: what the random start added is taken away again.
    masker.logits_OKG.data -= start(MaskLLM(prior=None, init_std=0.01), None).logits_OKG.data
    shared = [2, 1, 1, 1, 1, 0]  # positions that 1100 shares with the six candidates
    weights = np.exp(100 * 0.03 * np.array(shared))
    p = weights / weights.sum()
    assert p == pytest.approx([0.832, 0.041, 0.041, 0.041, 0.041, 0.002], abs=5e-4)
    # At tau -> 0 the sample is the argmax of kappa * logits + gumbel, so its mask is hard.
    rounds = 8
    counts = np.zeros(3)
    prior_OGM = prior.unflatten(1, (-1, 4))
    for index in range(rounds):
        mask = masks_of(masker, index).round().bool()
        common = (mask.unflatten(1, (-1, 4)) & prior_OGM).sum(-1)
        counts += np.bincount(common.flatten().numpy(), minlength=3)
    total = rounds * GROUPS
    for common, share in ((2, p[0]), (1, p[1:5].sum()), (0, p[5])):
        assert abs(counts[common] / total - share) < 4 * math.sqrt(share * (1 - share) / total)


def test_every_candidate_is_as_likely_as_its_logit_says() -> None:
    masker = start(MaskLLM(prior=None, tau=Schedule(1e-6, 1e-6), kappa=Schedule(2.0, 2.0)), None)
    wanted = torch.tensor([0.4, -0.3, 0.1, 0.0, -1.0, 0.7])
    masker.logits_OKG.data.copy_(wanted[None, :, None].expand_as(masker.logits_OKG))
    p = torch.softmax(2 * wanted.double(), 0).numpy()
    ranks = TWO_FOUR.rank(masks_of(masker).round().bool())
    seen = np.bincount(ranks.flatten().numpy(), minlength=6) / GROUPS
    assert np.abs(seen - p).max() < 4 * math.sqrt(0.25 / GROUPS)
    assert np.bincount(start_ranks(masker), minlength=6).argmax() == 5


def start_ranks(masker: CandidateMasker) -> np.ndarray[Any, Any]:
    """Ranks of the hard mask."""
    return TWO_FOUR.rank(masker.hard_mask(torch.ones(masker.shape))).flatten().numpy()


@pytest.mark.parametrize(
    ("kappa", "tau", "kept", "dropped"),
    [
        (100, 4.0, 0.62, 0.38),
        (200, 3.0, 0.78, 0.22),
        (300, 2.0, 0.91, 0.09),
        (500, 0.05, 0.97, 0.03),
    ],
)
def test_the_soft_mask_at_the_prior(kappa: float, tau: float, kept: float, dropped: float) -> None:
    prior = random_prior()
    strategy = MaskLLM(kappa=Schedule(kappa, kappa), tau=Schedule(tau, tau))
    mask = masks_of(start(strategy, prior))
    found = float(mask[prior].mean()), float(mask[~prior].mean())
    assert found == pytest.approx((kept, dropped), abs=0.008)
    # The same with numpy's generator, and candidates written out.
    rng = np.random.default_rng(0)
    table = np.array(
        [[i in c for i in range(4)] for c in itertools.combinations(range(4), 2)], float
    )
    shared = table @ table[0]
    pi = rng.normal(0, 0.01, (200_000, 6)) + 0.03 * shared
    scores = (kappa * pi + rng.gumbel(size=pi.shape)) / tau
    y = np.exp(scores - scores.max(1, keepdims=True))
    soft = (y / y.sum(1, keepdims=True)) @ table
    assert found == pytest.approx((soft[:, :2].mean(), soft[:, 2:].mean()), abs=0.006)


@pytest.mark.parametrize("text", ["1:4", "2:4", "4:8"])
@pytest.mark.parametrize("alpha", [0.0, 3.0, 7.5])
def test_the_logits_start_as_in_equation_10(text: str, alpha: float) -> None:
    pattern = NMPattern.parse(text)
    shape = (6, 32)
    prior = random_prior(pattern, shape)
    without = start(MaskLLM(prior=None), None, pattern, shape).logits_OKG
    with_prior = start(MaskLLM(alpha=alpha), prior, pattern, shape).logits_OKG
    added = (with_prior - without).detach()
    candidates = list(itertools.combinations(range(pattern.m), pattern.n))
    mean = pattern.n**2 / pattern.m
    for row, group in itertools.product(range(6), range(32 // pattern.m)):
        m0 = prior[row, group * pattern.m : (group + 1) * pattern.m].tolist()
        similarity = [sum(m0[i] for i in c) - mean for c in candidates]
        assert sum(similarity) == pytest.approx(0, abs=1e-9)
        expected = torch.tensor(similarity) * alpha * 0.01
        constant = (added[row, :, group] - expected).mean()  # has no effect on the softmax
        torch.testing.assert_close(added[row, :, group], expected + constant, atol=1e-7, rtol=0)


def test_the_random_start_has_the_std_that_was_asked_for() -> None:
    values = start(MaskLLM(prior=None), None).logits_OKG.detach().double()
    assert values.shape == (256, 6, 128)
    deviation = 0.01 / math.sqrt(2 * values.numel())
    assert abs(float(values.std()) - 0.01) < 4 * deviation
    assert abs(float(values.mean())) < 4 * 0.01 / math.sqrt(values.numel())
    wide = start(MaskLLM(prior=None, init_std=0.5), None).logits_OKG.detach()
    torch.testing.assert_close(wide, 50 * values.float(), rtol=1e-5, atol=1e-7)
    other = MaskLLM(prior=None).make_masker("other", SHAPE, TWO_FOUR)
    MaskLLM(prior=None).init_masker(other, torch.ones(SHAPE), None)
    assert abs(float((other.logits_OKG.detach() * values).mean())) < 1e-4 * 4 / math.sqrt(
        values.numel()
    )


def test_rows_of_a_shard_start_as_in_the_whole() -> None:
    strategy, prior = MaskLLM(), random_prior()
    whole = start(strategy, prior)
    part = strategy.make_masker("layer", (6, 512), TWO_FOUR)
    strategy.init_masker(part, torch.ones(6, 512), LayerResult(prior[5:11]), row0=5)
    assert torch.equal(part.logits_OKG, whole.logits_OKG[5:11])
    sampled = part.sample(torch.ones(6, 512), Draw(0, 0, 0), row0=5)[0]
    torch.testing.assert_close(sampled, masks_of(whole)[5:11], rtol=1e-6, atol=1e-7)


def test_one_in_eighteen_groups_starts_away_from_its_prior() -> None:
    prior = random_prior()
    mask = start(MaskLLM(), prior).hard_mask(torch.ones(SHAPE))
    assert 1 - agreement(mask, prior) == pytest.approx(0.055, abs=0.01)
    strong = start(MaskLLM(alpha=100.0), prior).hard_mask(torch.ones(SHAPE))
    assert torch.equal(strong, prior)
    uniform = start(MaskLLM(prior=None), None).hard_mask(torch.ones(SHAPE))
    assert agreement(uniform, prior) == pytest.approx(1 / 6, abs=4 * math.sqrt(5 / 36 / GROUPS))


def test_without_a_prior_all_candidates_are_alike() -> None:
    ranks = start_ranks(start(MaskLLM(prior=None), None))
    seen = np.bincount(ranks, minlength=6) / GROUPS
    assert np.abs(seen - 1 / 6).max() < 4 * math.sqrt(5 / 36 / GROUPS)


def test_the_schedules_are_the_papers() -> None:
    strategy = MaskLLM()
    for progress, kappa, tau, weight in (
        (0, 100, 4, 1e-5),
        (0.5, 300, 2.025, 5e-6),
        (1, 500, 0.05, 0),
    ):
        strategy.anneal(progress)
        assert strategy.values == pytest.approx(
            {"kappa": kappa, "tau": tau, "penalty_weight": weight}, rel=1e-12
        )
        assert {k: float(v) for k, v in strategy.metrics().items()} == pytest.approx(
            strategy.values
        )


def test_maskers_see_the_annealed_values() -> None:
    strategy = MaskLLM()
    masker = start(strategy, random_prior())
    early = masks_of(masker)
    assert float((early.clamp(max=1) - early.round()).abs().mean()) > 0.3
    strategy.anneal(1.0)
    late = masks_of(masker)
    assert float((late - late.round()).abs().mean()) < 0.02
    assert float(masker.metrics()["max_probability"]) > 0.9
    assert 0 < float(masker.metrics()["entropy"]) < 0.3


def test_the_distributions_metrics_are_those_of_its_softmax() -> None:
    masker = start(MaskLLM(), random_prior((NMPattern(2, 4)), (4, 16)), TWO_FOUR, (4, 16))
    p = torch.softmax(100 * masker.logits_OKG.detach().double(), 1)
    found = masker.metrics()
    assert float(found["entropy"]) == pytest.approx(float(-(p * p.log()).sum(1).mean()), rel=1e-5)
    assert float(found["max_probability"]) == pytest.approx(float(p.max(1).values.mean()), rel=1e-5)
    kept = torch.einsum("okg,km->omg", p, TWO_FOUR.table().double())
    change = float((2 * kept * (1 - kept)).mean())
    assert float(found["sample_change"]) == pytest.approx(change, rel=1e-4)


def test_the_loss_is_cross_entropy_less_the_retained_norm(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    strategy = MaskLLM(prior="magnitude", penalty_weight=Schedule(1e-2, 0.0))
    module = built(strategy, model, tokenizer, seed=5)
    loss = strategy.loss(BatchRun(module.masked, TOKENS, Draw(5, 3, 1)))
    # By hand: put the sampled weights into a plain copy of the model.
    plain = LlamaForCausalLM(model.config).eval()
    weights = {n: p for n, p in model.named_parameters() if ".masker." not in n}
    norm = 0.0
    for name, layer in masked_layers(model).items():
        sampled = layer.masker.sample(layer.weight_OI, Draw(5, 3, 1))[0].detach()
        weights[f"{name}.weight"] = sampled
        norm += float(sampled.double().square().sum())
    plain.load_state_dict(weights, strict=True)
    task = F.cross_entropy(
        plain(input_ids=TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()
    )
    assert norm > 100
    assert loss.item() == pytest.approx(task.item() - 1e-2 * norm, rel=1e-5)
    strategy.anneal(1.0)
    assert strategy.values["penalty_weight"] == 0


def test_the_retained_norm_raises_the_masks_of_large_weights() -> None:
    masker = start(MaskLLM(prior=None), None, TWO_FOUR, (1, 4))
    weight = torch.tensor([[3.0, 2.0, 0.1, 0.1]])
    _, retained = masker.sample(weight, Draw(0, 0, 0))
    (-retained).backward()
    step = -masker.logits_OKG.grad.flatten()
    assert int(step.argmax()) == 0  # 1100
    assert int(step.argmin()) == 5  # 0011


def test_hard_samples_are_exact_and_have_the_soft_gradient() -> None:
    prior = random_prior(TWO_FOUR, (16, 64))
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    soft, hard = (start(MaskLLM(hard=hard), prior, TWO_FOUR, (16, 64)) for hard in (False, True))
    assert torch.equal(soft.logits_OKG, hard.logits_OKG)
    draw = Draw(0, 0, 0)
    mask = hard.sample(torch.ones(16, 64), draw)[0].detach()
    chosen = mask == 1
    assert torch.equal(mask, chosen.float())  # zeros and ones, to the last bit
    assert bool((chosen.unflatten(1, (-1, 4)).sum(-1) == 2).all())
    assert not torch.equal(chosen, hard.hard_mask(weight))  # a sample, not the most likely mask
    # It is the candidate of the largest soft share.
    ranks = TWO_FOUR.rank(chosen).long()[:, None]
    shares = candidate_shares(soft, draw)
    assert torch.equal(shares.argmax(1, keepdim=True), ranks)
    for masker in (soft, hard):
        masked = masker.sample(weight, draw)[0]
        (masked * upstream).sum().backward()
    torch.testing.assert_close(hard.logits_OKG.grad, soft.logits_OKG.grad, rtol=1e-5, atol=1e-6)


def candidate_shares(masker: CandidateMasker, draw: Draw) -> Tensor:
    """The mixture's weights [O, K, G], from the noise module and the equations."""
    rows, candidates, groups = masker.logits_OKG.shape
    u = noise.uniform(draw.key("layer"), rows, candidates * groups).view(rows, candidates, groups)
    scores = masker.values["kappa"] * masker.logits_OKG.detach() - torch.log(-torch.log(u))
    return torch.softmax(scores / masker.values["tau"], dim=1)


def test_8_16_is_refused_with_its_number_of_candidates(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(SparsifyError, match=r"8:16 has 12,870 candidates.*smaller M"):
        built(MaskLLM(), model, tokenizer, pattern="8:16")


@pytest.mark.parametrize("kind", ["name", "object", "file", "folder"])
def test_a_prior_is_a_strategy_a_file_or_a_folder(
    kind: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    first = SparseCausalLM.from_model(model, tokenizer, Magnitude())
    first.configure_model()
    calibrate(first, windows=lambda: TEXT)
    masks = dict(hard_masks(model))
    export(first.masked, tmp_path / "out", {})
    priors: dict[str, Any] = {
        "name": "magnitude",
        "object": Magnitude(),
        "file": str(tmp_path / "out" / FILE_NAME),
        "folder": str(tmp_path / "out"),
    }
    found = logits(built(MaskLLM(prior=priors[kind]), tiny_llama(), tokenizer))
    expected = logits(built(MaskLLM(prior="magnitude"), tiny_llama(), tokenizer))
    uniform = logits(built(MaskLLM(prior=None), tiny_llama(), tokenizer))
    assert found.keys() == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(found[name], expected[name])
        # Largest where the prior keeps: the added part points at its candidate.
        added = found[name] - uniform[name]
        assert torch.equal(TWO_FOUR.unrank(added.argmax(1)), mask)


@pytest.mark.parametrize("strategy", [MaskLLM(), MaskLLM(prior="sparsegpt")])
def test_the_default_prior_is_an_updating_sparsegpts_mask(
    strategy: MaskLLM, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    updating = MasksOnly(SparseGPT(update_weights=True))
    expected = dict(hard_masks(built(updating, tiny_llama(), tokenizer).lm))
    found = logits(built(strategy, model, tokenizer))
    uniform = logits(built(MaskLLM(prior=None), tiny_llama(), tokenizer))
    assert len(expected) == 14
    for name, layer in masked_layers(model).items():
        added = found[name] - uniform[name]
        assert torch.equal(TWO_FOUR.unrank(added.argmax(1)), expected[name]), name
        assert not torch.equal(TWO_FOUR.top(layer.weight_OI.abs()), expected[name]), name


def test_a_prior_that_updates_weights_gives_its_masks_only(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    strategy = MaskLLM(prior=SparseGPT(update_weights=True))
    module = built(strategy, model, tokenizer, calibration=Calibration(cache=False))
    assert hash_parameters(base_parameters(model)) == module.masked.base.hash


def test_a_layer_without_a_prior_is_an_error(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    masks = {
        name: TWO_FOUR.top(module.weight.abs())
        for name, module in model.named_modules()
        if name.endswith("_proj") and name != "model.layers.1.mlp.up_proj"
    }
    assert len(masks) == 13
    write_masks(tmp_path / "m.nmask", masks, TWO_FOUR, "h")
    with pytest.raises(
        SparsifyError, match=r"model\.layers\.1\.mlp\.up_proj: the prior .* holds no mask of it"
    ):
        built(MaskLLM(prior=str(tmp_path / "m.nmask")), model, tokenizer)


def test_a_prior_of_another_shape_or_pattern_is_an_error(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for pattern, columns, message in (
        (NMPattern(1, 4), 1.0, "q_proj: the prior does not keep 2 weights of every 4.*pattern 2:4"),
        (TWO_FOUR, 0.5, r"q_proj: the prior's mask is \(32, 16\).*\(32, 32\)"),
    ):
        masks = {
            name: pattern.top(module.weight[:, : int(module.weight.shape[1] * columns)].abs())
            for name, module in model.named_modules()
            if name.endswith("_proj")
        }
        path = tmp_path / f"{pattern.n}.nmask"
        write_masks(path, masks, pattern, "h")
        with pytest.raises(SparsifyError, match=message):
            built(MaskLLM(prior=str(path)), copy_of(model), tokenizer)


def copy_of(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy that can be masked by itself."""
    copy = LlamaForCausalLM(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy
