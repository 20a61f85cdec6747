"""Masks and weights of experts, against a loop over experts and tokens.

Shapes: T tokens, E experts, O out, I in.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakSet

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sparsify import LayerResult, NMPattern, SparsityStrategy
from sparsify.calibration import Calibration, Hessian, Layerwise, collecting
from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.select import Selection, decoder_blocks
from sparsify.strategies.sparsegpt import SparseGPT, inverse_factor, prune_and_update
from sparsify.strategies.wanda import Wanda
from tests.architectures import tiny
from tests.calibration.engine import Probe
from tests.conftest import masked_model
from tests.strategies.layers import keep_largest

TEXT = torch.randint(2, 64, (6, 24), generator=torch.Generator().manual_seed(0))
TWO_FOUR = NMPattern(2, 4)
# Stored transposed, with interleaved outputs and biases; with shared experts; over all tokens.
KINDS = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text"]
EXPERTS = Selection(include=["*.experts.*"])


def feed_forward(block: Any) -> Any:
    return block.feed_forward if hasattr(block, "feed_forward") else block.mlp


def routes(moe: Any, x_TI: Tensor) -> Iterator[tuple[int, Tensor]]:
    """What enters which expert, token by token."""
    if "Llama4" in type(moe).__name__:
        scores_TE = moe.router(x_TI)[0]
        for x_I, scores_E in zip(x_TI, scores_TE, strict=True):
            yield from ((e, x_I * s) for e, s in enumerate(scores_E) if s != 0)
        return
    router = moe.router if hasattr(moe, "router") else moe.gate
    chosen_TK = router(x_TI[None] if "Deepseek" in type(moe).__name__ else x_TI)[2]
    for x_I, chosen_K in zip(x_TI, chosen_TK.tolist(), strict=True):
        yield from ((e, x_I) for e in chosen_K)


def between(moe: Any, expert: int, x_I: Tensor) -> Tensor:
    """What enters the second matrix of an expert, for one token."""
    matrix, kind = moe.experts.gate_up_proj[expert], type(moe).__name__
    if "Llama4" in kind:
        gate, up = (x_I @ matrix).chunk(2)
        return up * F.silu(gate)
    if "GptOss" in kind:
        y = x_I @ matrix + moe.experts.gate_up_proj_bias[expert]
        gate, up = y[::2].clamp(max=7.0), y[1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = (matrix @ x_I).chunk(2)
    return F.silu(gate) * up


@torch.no_grad()
def expert_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """All that enters each matrix of each expert of the dense model: float64 ``[T, I]`` by the
    names of calibration; no tokens where none was routed.
    """
    found: dict[str, list[Tensor]] = {}
    sizes: dict[str, int] = {}
    for name, block in decoder_blocks(model).items():
        moe = feed_forward(block)
        if not hasattr(moe, "experts"):
            continue  # the first block of DeepSeek is dense
        entered: list[Tensor] = []
        hook = moe.register_forward_pre_hook(lambda _, args, to=entered: to.append(args[0]))
        for window in TEXT:
            model(input_ids=window[None], use_cache=False)
        hook.remove()
        own = f"{name}.{'feed_forward' if hasattr(block, 'feed_forward') else 'mlp'}.experts"
        for e in range(4):
            sizes |= {f"{own}.gate_up_proj.{e}": 32, f"{own}.down_proj.{e}": 0}
        for expert, x_I in routes(moe, torch.cat([x.flatten(0, -2) for x in entered])):
            y_I = between(moe, expert, x_I)
            found.setdefault(f"{own}.gate_up_proj.{expert}", []).append(x_I.double())
            found.setdefault(f"{own}.down_proj.{expert}", []).append(y_I.double())
            sizes |= {f"{own}.down_proj.{e}": len(y_I) for e in range(4)}
    return {
        key: torch.stack(found[key]) if key in found else torch.zeros(0, size).double()
        for key, size in sizes.items()
    }


def matrix_OI(model: PreTrainedModel, name: str) -> Tensor:
    """One expert's matrix, from the Parameter."""
    stack, _, expert = name.rpartition(".")
    values = dict(model.named_parameters())[stack].detach()[int(expert)]
    transposed = model.config.model_type in ("gpt_oss", "llama4_text")
    return values.T if transposed else values


def as_scored(x_TI: Tensor) -> Tensor:
    """An expert with few tokens is pruned as if all inputs were alike."""
    return x_TI if len(x_TI) >= 32 else torch.eye(x_TI.shape[1], dtype=torch.float64)


def calibrate(
    model: PreTrainedModel, strategy: SparsityStrategy, **options: Any
) -> tuple[MaskedModel, dict[str, LayerResult]]:
    masked = masked_model(model, strategy, options.pop("selection", EXPERTS))
    settings = Calibration(cache=False, activations="dense")
    results = dict(Layerwise(masked, lambda: TEXT, settings, torch.device("cpu")).run(strategy))
    masked.calibrate(results.items())
    return masked, results


def wanda_mask(model: PreTrainedModel, name: str, x_TI: Tensor) -> Tensor:
    score = matrix_OI(model, name).double().abs() * x_TI.square().sum(0).sqrt()
    return torch.from_numpy(keep_largest(score.numpy(), "2:4"))


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_those_of_a_loop_over_experts_and_tokens(kind: str) -> None:
    dense, inputs = tiny(kind), expert_inputs(tiny(kind))
    masked, results = calibrate(tiny(kind), Wanda())
    assert results.keys() == inputs.keys()
    counts = [len(x_TI) for x_TI in inputs.values()]
    assert max(counts) >= 32
    expected = {name: wanda_mask(dense, name, as_scored(x)) for name, x in inputs.items()}
    for name, result in results.items():
        assert torch.equal(result.mask, expected[name]), name
        assert result.weight is None
    masks = masked.hard_masks()
    assert set(masks) == {name.rpartition(".")[0] for name in inputs}
    for stack, mask_OI in masks.items():
        assert torch.equal(mask_OI, torch.cat([expected[f"{stack}.{e}"] for e in range(4)]))


@pytest.mark.parametrize("kind", KINDS)
def test_updated_weights_are_those_of_each_expert_by_itself(kind: str) -> None:
    dense, inputs = tiny(kind), expert_inputs(tiny(kind))
    masked, results = calibrate(tiny(kind), SparseGPT(update_weights=True))
    assert results.keys() == inputs.keys()
    for name, x_TI in inputs.items():
        x_TI = as_scored(x_TI)
        hessian_II = (x_TI.T @ x_TI).float()
        factor_II = inverse_factor(hessian_II, 0.01, name)
        weight_OI = matrix_OI(dense, name).masked_fill(hessian_II.diagonal() == 0, 0)
        mask_OI, new_OI = prune_and_update(weight_OI, factor_II, TWO_FOUR)
        result = results[name]
        assert result.weight is not None
        assert torch.equal(result.mask, mask_OI), name
        torch.testing.assert_close(result.weight, new_OI, rtol=1e-3, atol=1e-4)
        # In its place in the Parameter, in the layout of the plain model.
        assert torch.equal(matrix_OI(masked.model, name), result.weight)
        torch.testing.assert_close(
            masked.hard_masks()[name.rpartition(".")[0]].chunk(4)[int(name[-1])], mask_OI
        )


def test_an_expert_needs_32_tokens_and_may_have_none(caplog: pytest.LogCaptureFixture) -> None:
    def biased() -> PreTrainedModel:
        model = tiny("gpt_oss")
        for block, few in zip(decoder_blocks(model).values(), (-2.0, -3.0), strict=True):
            block.mlp.router.bias.data.copy_(torch.tensor([1.0, 0.0, few, -1e9]))
        return model

    dense, inputs = biased(), expert_inputs(biased())
    counts = {name: len(x_TI) for name, x_TI in inputs.items()}
    few = [name for name, count in counts.items() if count < 32]
    assert {0, *(c for c in counts.values() if 0 < c < 32)} > {0}, counts
    assert min(counts.values()) == 0
    assert max(counts.values()) > 32
    with caplog.at_level(logging.WARNING, "sparsify"):
        _, results = calibrate(biased(), Wanda())
    assert f"{len(few)} of 16 experts' matrices got fewer than 32 calibration tok" in caplog.text
    for name, result in results.items():
        by_size = torch.from_numpy(keep_largest(matrix_OI(dense, name).abs().numpy(), "2:4"))
        assert torch.equal(result.mask, by_size) == (name in few), name


@pytest.mark.parametrize("more", [0, 1])
def test_the_least_number_of_tokens_is_enough(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, inputs = tiny("mixtral"), expert_inputs(tiny("mixtral"))
    name = min(inputs, key=lambda name: len(inputs[name]))
    least = len(inputs[name])
    assert least > 0
    monkeypatch.setattr(collecting, "MIN_TOKENS", least + more)
    _, results = calibrate(tiny("mixtral"), Wanda())
    x_TI = torch.eye(inputs[name].shape[1]).double() if more else inputs[name]
    assert torch.equal(results[name].mask, wanda_mask(dense, name, x_TI))


class Counted(Hessian):
    """Knows which of them are alive, and what they held together at most."""

    alive: ClassVar[WeakSet["Counted"]] = WeakSet()
    made = most = 0

    def __init__(self, inputs: int, device: torch.device) -> None:
        super().__init__(inputs, device)
        kind = type(self)
        kind.alive.add(self)
        kind.made += 1
        kind.most = max(kind.most, sum(other.matrix_II.nbytes for other in kind.alive))


@contextmanager
def counting() -> Iterator[type[Counted]]:
    Counted.alive.clear()
    Counted.made = Counted.most = 0
    yield Counted


class Sums(SparsityStrategy):
    """Prunes by magnitude, and keeps what can be told of each statistic without holding it."""

    def __init__(self, kind: type[Counted]) -> None:
        super().__init__()
        self.kind = kind
        self.found: dict[str, tuple[int, Tensor]] = {}

    def calibrate(self, blocks: Any) -> Iterator[tuple[str, LayerResult]]:
        for block in blocks:
            statistics = block.collect(self.kind)
            for name, layer in block.layers.items():
                self.found[name] = (
                    statistics[name].tokens,
                    statistics[name].matrix_II.clone(),
                )
                yield name, LayerResult(TWO_FOUR.top(layer.weight_OI.abs()))
            del statistics  # or a block's would live until the next block has its own


@pytest.mark.parametrize("at_once", [0, 20_000, 40_000])
def test_statistics_of_few_experts_are_held_at_once(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One of down_proj has 64 x 64 x 4 = 16,384 bytes, one of gate_up_proj 4,096; of a block 81,920.
    with counting() as kind:
        calibrate(tiny("mixtral"), whole := Sums(kind))
        assert kind.most == 81_920
    monkeypatch.setattr(collecting, "AT_ONCE", at_once)
    with counting() as kind:
        calibrate(tiny("mixtral"), parts := Sums(kind))
        assert kind.most <= max(at_once, 16_384)
    assert parts.found.keys() == whole.found.keys()
    for name, (tokens, matrix_II) in whole.found.items():
        assert parts.found[name][0] == tokens
        assert torch.equal(parts.found[name][1], matrix_II), name


@pytest.mark.parametrize("strategy", [SparseGPT, lambda: SparseGPT(update_weights=True), Wanda])
def test_results_are_the_same_in_small_parts(
    strategy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"selection": Selection()}
    _, whole = calibrate(tiny("mixtral"), strategy(), **options)
    monkeypatch.setattr(collecting, "AT_ONCE", 0)
    _, parts = calibrate(tiny("mixtral"), strategy(), **options)
    assert whole.keys() == parts.keys()
    for name, result in whole.items():
        assert torch.equal(parts[name].mask, result.mask), name
        if result.weight is not None:
            assert torch.equal(parts[name].weight, result.weight), name


def test_any_expert_can_be_asked_for_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "AT_ONCE", 0)
    probe = Probe(Hessian)

    class Backwards(Probe):
        def calibrate(self, blocks: Any) -> Iterator[tuple[str, LayerResult]]:
            for block in blocks:
                statistics = block.collect(Hessian)
                assert list(statistics) == list(block.layers)
                assert len(statistics) == len(block.layers)
                self.found[Hessian] = {n: statistics[n] for n in reversed(list(statistics))} | (
                    self.found.get(Hessian, {})
                )
                with pytest.raises(KeyError, match="other"):
                    statistics["other"]
                for name, layer in block.layers.items():
                    yield name, LayerResult(TWO_FOUR.top(layer.weight_OI.abs()))

    calibrate(tiny("mixtral"), probe)
    calibrate(tiny("mixtral"), back := Backwards())
    assert back.found[Hessian].keys() == probe.found[Hessian].keys()
    for name, hessian in probe.found[Hessian].items():
        assert torch.equal(back.found[Hessian][name].matrix_II, hessian.matrix_II)
