"""ProxSparse's proximal operator, its steps and its penalty, against slow references.

Shapes: O out, I in.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsify import Draw, NMPattern, SparsifyError
from sparsify.export.folder import export
from sparsify.masking.inject import hard_masks, inject
from sparsify.masking.layer import base_parameters, masked_layers, maskers
from sparsify.masking.select import Selection, select
from sparsify.models.hashes import hash_parameters
from sparsify.strategies import proxsparse
from sparsify.strategies.proxsparse import ProxSparse, ProxyMasker, proximal_
from sparsify.strategies.sparsegpt import SparseGPT
from sparsify.training.step import BatchRun
from tests.conftest import tiny_llama
from tests.strategies.training import Array, adamw, built, largest, rate, sgd, train

TWO_FOUR = NMPattern(2, 4)
TOKENS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
DRAW = Draw(0, 0, 0)
TRIPLES = list(itertools.combinations(range(4), 3))


def objective(v: Array, z: Array, strength: float) -> float:
    """|v - z|^2 / 2 + strength r(v), r being the sum over triples of their product's magnitude."""
    r = sum(abs(v[a] * v[b] * v[c]) for a, b, c in TRIPLES)
    return float(((v - z) ** 2).sum() / 2 + strength * r)


def lowest(z: Array, strength: float, rng: np.random.Generator, starts: int = 40) -> float:
    """The least objective that coordinate descent finds from many starts, with signs left to it."""
    v = z * rng.uniform(0, 1, (starts, 4))
    v[:16] = z * np.array(list(itertools.product((0, 1), repeat=4)))  # and every support
    for _ in range(200):
        for i in range(4):
            others = [j for j in range(4) if j != i]
            pairs = sum(abs(v[:, a] * v[:, b]) for a, b in itertools.combinations(others, 2))
            v[:, i] = np.sign(z[i]) * np.maximum(abs(z[i]) - strength * pairs, 0)
    return min(objective(one, z, strength) for one in v)


def slow(z: Array, strength: float) -> Array:
    """The operator as it is published, for one group."""
    order = sorted(range(4), key=lambda i: -abs(z[i]))
    size = [abs(z[i]) for i in order]
    candidates = [[size[0], size[1], 0.0, 0.0]]
    for count in (3, 4):
        v = [0.0] * 4
        for _ in range(100):
            change = 0.0
            for i in reversed(range(count)):
                others = [v[j] for j in range(4) if j != i]
                pairs = sum(a * b for a, b in itertools.combinations(others, 2))
                new = max(size[i] - strength * pairs, 0.0)
                change, v[i] = max(change, abs(new - v[i])), new
            if change < 1e-8:
                break
        candidates.append(v)
    best = min(candidates, key=lambda v: objective(np.array(v), np.array(size), strength))
    out = np.zeros(4)
    out[order] = best
    return np.copysign(out, z)


def groups(count: int, seed: int = 0, scale: float = 1.0) -> Array:
    """Random groups ``[count, 4]``."""
    return scale * np.random.default_rng(seed).normal(size=(count, 4))


@pytest.mark.parametrize("strength", [0.05, 0.3, 0.7, 1.0, 3.0, 20.0])
def test_no_point_is_lower(strength: float) -> None:
    z = groups(40, int(strength * 100))
    found = torch.from_numpy(z.copy())
    proximal_(found, strength)
    rng = np.random.default_rng(1)
    for v, at in zip(found.numpy(), z, strict=True):
        assert objective(v, at, strength) <= lowest(at, strength, rng) + 1e-8
    nonzero = (found != 0).sum(-1).unique().tolist()
    assert len(nonzero) > 1 or strength > 1  # both kinds of result are met


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_the_published_operator(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Both stop where a sweep changes less than 1e-8, not necessarily after the same one.
    tolerance = 1e-6 if dtype == torch.float64 else 1e-5
    for strength, scale in ((0.4, 1.0), (1.0, 1.0), (12.0, 0.05), (40.0, 0.02)):
        z = groups(400, 3, scale)
        expected = np.array([slow(row, strength) for row in z])
        found = torch.from_numpy(z).to(dtype, copy=True).view(100, 16)
        proximal_(found, strength)
        values = found.view(400, 4).double().numpy()
        far = np.abs(values - expected).max(1) > tolerance
        assert far.sum() <= (0 if dtype == torch.float64 else 4)
        for i in np.flatnonzero(far):  # where two candidates are as low, rounding decides
            lows = [objective(v[i], z[i], strength) for v in (values, expected)]
            assert lows[0] == pytest.approx(lows[1], rel=1e-5)
        assert 0 < (expected == 0).mean() < 1
        # However the groups are taken; those that converge slowest stop a little elsewhere.
        for at_once, sweeps in ((7, 5), (1 << 18, 1), (1 << 18, 100)):
            monkeypatch.setattr(proxsparse, "GROUPS_AT_ONCE", at_once)
            monkeypatch.setattr(proxsparse, "SWEEPS_AT_ONCE", sweeps)
            again = torch.from_numpy(z).to(dtype, copy=True).view(100, 16)
            proximal_(again, strength)
            torch.testing.assert_close(again, found, rtol=0, atol=10 * tolerance)
            monkeypatch.undo()


def test_descent_over_all_four_may_miss_the_lowest_of_three() -> None:
    z = np.array([1.834, -1.799, 1.794, 1.622])  # nearly equal: there each stops somewhere else
    found = torch.from_numpy(z.copy())
    proximal_(found, 0.5)
    assert found.numpy() == pytest.approx(slow(z, 0.5), abs=1e-6)
    assert objective(found.numpy(), z, 0.5) <= lowest(z, 0.5, np.random.default_rng(0)) + 1e-8
    assert found[3] == 0
    assert bool((found[:3] != 0).all())


def test_groups_that_are_sparse_stay_and_signs_do() -> None:
    z = torch.from_numpy(groups(200, 5))
    sparse = torch.where(TWO_FOUR.top(z.abs()), z, 0)
    found = sparse.clone()
    proximal_(found, 5.0)
    assert torch.equal(found, sparse)
    same = z.clone()
    proximal_(same, 0.0)
    torch.testing.assert_close(same, z, rtol=0, atol=0)
    shrunk = z.clone()
    proximal_(shrunk, 0.5)
    assert torch.equal(shrunk.signbit(), z.signbit())
    assert bool((shrunk.abs() <= z.abs()).all())
    assert torch.equal(TWO_FOUR.top(shrunk.abs()), TWO_FOUR.top(z.abs()))  # the order stays
    gone = z.clone()
    proximal_(gone, 1e4)
    assert torch.equal(gone, sparse)
    empty = torch.zeros(0, 8)
    proximal_(empty, 1.0)
    # Equal weights: the lower index is taken for the larger.
    ties = torch.ones(1, 4)
    proximal_(ties, 10.0)
    assert ties.tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize("coupled", [False, True])
def test_steps_are_gradient_steps_and_then_the_operator(
    coupled: bool, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    lr, strength = 0.05, 5.0 if coupled else 0.5
    module = built(ProxSparse(strength=strength, coupled=coupled), tokenizer, optimizer=sgd(lr))
    steps = train(module, text, tmp_path, 3)
    zeros, kept = 0, 0
    for name in steps.gradients[0]:
        assert name.endswith(".masker.proxy_OI")
        for t, gradients in enumerate(steps.gradients):
            moved = steps.values[t][name] - rate(lr, t, 3) * gradients[name]
            now = strength * (rate(lr, t, 3) if coupled else 1)
            expected = np.array([slow(z, now) for z in moved.reshape(-1, 4)]).reshape(moved.shape)
            found = steps.values[t + 1][name]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4, err_msg=name)
            zeros += int((found == 0).sum())
            kept += int((found != 0).sum())
    assert zeros > 100
    assert kept > 100
    assert len(steps.gradients[0]) == 14


def test_the_copy_trains_dense_and_the_base_ships(
    tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    module = built(ProxSparse(strength=0.3), tokenizer, optimizer=adamw(0.02, 0.0))
    first = dict(hard_masks(module.lm))
    loss = module.strategy.loss(BatchRun(module.masked, TOKENS, DRAW))
    assert loss.item() == pytest.approx(loss_of(tiny_llama()), rel=1e-6)  # a copy of all weights
    train(module, text, tmp_path)
    proxies = {n: layer.masker.proxy_OI.detach() for n, layer in masked_layers(module.lm).items()}
    copy = tiny_llama()
    for name, proxy in proxies.items():
        copy.get_parameter(f"{name}.weight").data.copy_(proxy)
    loss = module.strategy.loss(BatchRun(module.masked, TOKENS, DRAW))
    assert loss.item() == pytest.approx(loss_of(copy), rel=1e-6)
    export(module.masked, tmp_path / "out", {})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    base = tiny_llama()
    flips = 0
    for name, proxy in proxies.items():
        mask = torch.from_numpy(largest(proxy.numpy()))
        flips += int((mask != first[name]).sum())
        shipped = torch.where(mask, base.get_parameter(f"{name}.weight"), 0)
        assert torch.equal(plain.get_parameter(f"{name}.weight"), shipped), name
    assert flips > 20
    assert hash_parameters(base_parameters(module.lm)) == module.masked.base.hash


def loss_of(model: LlamaForCausalLM) -> float:
    """Of a plain model on TOKENS, nats a token."""
    logits = model(input_ids=TOKENS).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, TOKENS[:, 1:].flatten()).item()


def penalty_of(w: Array, w0: Array, eps: float) -> float:
    """Weight by weight."""
    total = 0.0
    for a, b in zip(w.ravel(), w0.ravel(), strict=True):
        total += (a / (b + eps * (1 if b >= 0 else -1)) * (a - b)) ** 2
    return total


def test_the_anchor_is_the_papers_second_term() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 8, generator=generator)
    base[0, :2] = 0.0
    masker = ProxyMasker("layer", (4, 8), TWO_FOUR, anchor_eps=0.1)
    masker.proxy_OI.data.copy_(base + 0.3 * torch.randn(4, 8, generator=generator))
    sampled, penalty = masker.sample(base, DRAW)
    assert torch.equal(sampled, masker.proxy_OI)
    w, w0 = masker.proxy_OI.detach().double().numpy(), base.double().numpy()
    assert penalty.item() == pytest.approx(penalty_of(w, w0, 0.1), rel=1e-5)
    penalty.backward()
    for index in itertools.product(range(4), range(8)):
        ends = []
        for step in (1e-6, -1e-6):
            moved = w.copy()
            moved[index] += step
            ends.append(penalty_of(moved, w0, 0.1))
        slope = (ends[0] - ends[1]) / 2e-6
        assert float(masker.proxy_OI.grad[index]) == pytest.approx(slope, rel=1e-4, abs=1e-5)
    none = ProxyMasker("layer", (4, 8), TWO_FOUR)
    assert float(none.sample(base, DRAW)[1]) == 0


def test_the_anchor_is_added_to_the_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    prior = SparseGPT(update_weights=True)
    with_anchor = ProxSparse(prior=prior, anchor=0.25, anchor_eps=0.5)
    modules = [built(s, tokenizer) for s in (with_anchor, ProxSparse(prior=prior))]
    losses = [m.strategy.loss(BatchRun(m.masked, TOKENS, DRAW)) for m in modules]
    total = 0.0
    for layer in masked_layers(modules[0].lm).values():
        proxy = layer.masker.proxy_OI.detach().double().numpy()
        total += penalty_of(proxy, layer.weight.detach().double().numpy(), 0.5)
    assert total > 0.1  # the prior has moved the copy away from the base
    assert (losses[0] - losses[1]).item() == pytest.approx(0.25 * total, rel=1e-4)


def test_a_prior_is_the_first_mask(tokenizer: PreTrainedTokenizerFast) -> None:
    expected = dict(hard_masks(built(SparseGPT(), tokenizer).lm))
    module = built(ProxSparse(prior=SparseGPT()), tokenizer)
    assert hash_parameters(base_parameters(module.lm)) == module.masked.base.hash
    for name, layer in masked_layers(module.lm).items():
        assert torch.equal(layer.masker.hard_mask(layer.weight_OI), expected[name]), name
        assert not torch.equal(TWO_FOUR.top(layer.weight_OI.abs()), expected[name]), name
        kept = expected[name]
        assert torch.equal(layer.masker.proxy_OI[kept], layer.weight_OI[kept]), name
    plain = built(ProxSparse(), tokenizer)
    for name, layer in masked_layers(plain.lm).items():
        assert torch.equal(layer.masker.proxy_OI, layer.weight_OI), name


def test_a_shared_copy_takes_one_step(model: LlamaForCausalLM) -> None:
    first, second = (block.mlp.up_proj for block in model.model.layers)
    second.weight = first.weight
    strategy = ProxSparse(strength=0.5)
    inject(model, select(model, Selection(TWO_FOUR))[0], Selection(TWO_FOUR), strategy.make_masker)
    layers = masked_layers(model)
    for layer in layers.values():
        strategy.init_masker(layer.masker, layer.weight_OI, None)
    strategy.after_step(maskers(layers), 0.1)
    found: Tensor = layers["model.layers.1.mlp.up_proj"].masker.proxy_OI.detach()
    once = first.weight.detach().clone()
    proximal_(once, 0.5)
    assert torch.equal(found, once)
    twice = once.clone()
    proximal_(twice, 0.5)
    assert not torch.equal(twice, once)


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "2:8"])
def test_other_patterns_are_refused(pattern: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        SparsifyError, match=f"pattern {pattern}: .*2:4 alone; give --model.pattern"
    ):
        built(ProxSparse(), tokenizer, pattern=pattern)


@pytest.mark.parametrize("options", [{"strength": -0.1}, {"anchor": -1.0}, {"anchor_eps": 0.0}])
def test_settings_that_cannot_be(options: dict[str, float]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(SparsifyError, match=f"{name}={value}.*must"):
        ProxSparse(**options)


def test_a_bf16_base_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SparsifyError, match="bfloat16: ProxSparse trains weights.*float32"):
        built(ProxSparse(), tokenizer, tiny_llama().to(torch.bfloat16))
