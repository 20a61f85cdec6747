"""What strategies are told of the calibration text, against whole plain models."""

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsify import Block, FixedMasker, LayerResult, SparsifyError, SparsityStrategy
from sparsify.calibration import Calibration, CrossHessian, Hessian, Layerwise, Moments
from sparsify.masking.inject import inject
from sparsify.masking.layer import masked_layers
from sparsify.masking.select import Selection, decoder_blocks
from sparsify.strategies.magnitude import Magnitude
from sparsify.strategies.pruner_zero import PrunerZero
from sparsify.strategies.wanda import Wanda
from tests.calibration.engine import (
    TEXT,
    TWO_FOUR,
    Probe,
    apply,
    calibrated,
    count_passes,
    masked,
)
from tests.tiny_models import FAMILIES


def by_hand(
    model: PreTrainedModel, results: dict[str, LayerResult], block: str, dense: bool
) -> dict[str, Tensor]:
    """What enters each linear layer of a block over the whole text, [tokens, I] in float64.

    The plain model runs as a whole; the layers of earlier blocks were overwritten.
    """
    blocks = decoder_blocks(model)
    earlier = tuple(f"{name}." for name in list(blocks)[: list(blocks).index(block)])
    for name, result in results.items():
        if name.startswith(earlier) and not dense:
            layer = model.get_submodule(name)
            conv = isinstance(layer, Conv1D)
            old = layer.weight.detach().T if conv else layer.weight.detach()
            new = (old if result.weight is None else result.weight) * result.mask
            layer.weight.data = new.T.contiguous() if conv else new
    seen: dict[str, list[Tensor]] = {}
    for name, layer in blocks[block].named_modules():
        if isinstance(layer, nn.Linear | Conv1D):
            inputs = seen.setdefault(f"{block}.{name}", [])
            layer.register_forward_pre_hook(
                lambda _, x, inputs=inputs: inputs.append(x[0].flatten(0, -2))
            )
    with torch.no_grad():
        for tokens in TEXT:
            model(input_ids=tokens[None], use_cache=False)
    return {name: torch.cat(inputs).double() for name, inputs in seen.items()}


def check(model: Callable[[], PreTrainedModel], probe: Probe, results: Any, dense: bool) -> None:
    """The probe's statistics are those of whole plain models."""
    count = 0
    for block in decoder_blocks(model()):
        dense_inputs = by_hand(model(), results, block, dense=True)
        for name, x_TI in by_hand(model(), results, block, dense).items():
            if name not in probe.found[Moments]:
                continue
            count += 1
            moments, hessian = probe.found[Moments][name], probe.found[Hessian][name]
            close(moments.sum_I, x_TI.sum(0))
            close(moments.square_I, x_TI.square().sum(0))
            close(moments.norm_I, x_TI.norm(dim=0))
            close(hessian.matrix_II, x_TI.T @ x_TI)
            if CrossHessian in probe.found:
                cross = probe.found[CrossHessian][name]
                close(cross.matrix_II, dense_inputs[name].T @ x_TI)
            assert moments.tokens == hessian.tokens == len(x_TI) == TEXT.numel()
            assert moments.windows == len(TEXT)
    assert count == len(probe.found[Moments]) == len(results) > 0


def close(found: Tensor, expected: Tensor, share: float = 1e-5) -> None:
    """Equal but for a share of the largest value."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=share * float(expected.abs().max())
    )


@pytest.mark.parametrize("activations", ["pruned", "dense"])
@pytest.mark.parametrize("update", [False, True], ids=["masks", "updates"])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_model_with_all_earlier_blocks_pruned(
    family: str, update: bool, activations: Any
) -> None:
    probe = Probe(Moments, Hessian, CrossHessian, update=update)
    settings = Calibration(cache=False, activations=activations)
    results = calibrated(FAMILIES[family](), probe, settings=settings)
    check(FAMILIES[family], probe, results, activations == "dense")


def test_what_the_caller_does_with_results_does_not_matter() -> None:
    kept, applied = (Probe(Moments, Hessian, CrossHessian, update=True) for _ in range(2))
    results = calibrated(FAMILIES["llama"](), kept)
    model = FAMILIES["llama"]()
    apply(masked(model), model, applied)
    for name in results:
        assert torch.equal(kept.found[Moments][name].sum_I, applied.found[Moments][name].sum_I)
    check(FAMILIES["llama"], applied, results, dense=False)


@pytest.mark.parametrize("exclude", ["*.layers.0.*", "*.layers.1.*"])
def test_a_block_without_masked_layers_runs_too(exclude: str) -> None:
    probe = Probe(Moments, Hessian)
    results = calibrated(FAMILIES["gemma3"](), probe, exclude=[exclude])
    assert len(results) == 14
    check(FAMILIES["gemma3"], probe, results, dense=False)


class NotTheFirst(Probe):
    """Passes over the first block."""

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        blocks = iter(blocks)
        next(blocks)
        yield from super().calibrate(blocks)


def test_a_strategy_may_begin_with_a_later_block() -> None:
    probe = NotTheFirst(Moments, Hessian, CrossHessian)
    results = calibrated(FAMILIES["gemma3"](), probe)
    assert {name.split(".")[2] for name in results} == {"1", "2"}
    check(FAMILIES["gemma3"], probe, results, dense=False)


def test_layers_with_the_same_input_share_one_object() -> None:
    for family, groups in (
        ("llama", [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}]),
        ("opt", [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}]),
        ("gpt2", [{"attn.c_attn"}, {"attn.c_proj"}, {"c_fc"}, {"mlp.c_proj"}]),
    ):
        probe = Probe(Hessian)
        calibrated(FAMILIES[family](), probe)
        owners: dict[int, set[str]] = {}
        for name, hessian in probe.found[Hessian].items():
            owners.setdefault(id(hessian), set()).add(name)
        for block in (0, 1):
            found = [{n for n in names if f".{block}." in n} for names in owners.values()]
            assert sum(map(bool, found)) == len(groups) + (family == "llama")  # and down_proj
            for group in groups:
                [own] = [names for names in found if any(n.endswith(tuple(group)) for n in names)]
                assert len(own) == len(group), own
        assert all(len({name.split(".")[2] for name in names}) == 1 for names in owners.values())


def test_activations_in_main_memory_change_nothing() -> None:
    probes = []
    for offload in (False, True):
        probes.append(Probe(Moments, Hessian, gradients=True, update=True))
        settings = Calibration(cache=False, offload=offload)
        calibrated(FAMILIES["gemma3"](), probes[-1], settings=settings)
    first, second = (probe.found for probe in probes)
    assert len(first[Moments]) == 21
    for name, moments in first[Moments].items():
        assert torch.equal(moments.square_I, second[Moments][name].square_I), name
        assert torch.equal(first[Hessian][name].matrix_II, second[Hessian][name].matrix_II), name
        assert torch.equal(first["gradients"][name], second["gradients"][name]), name


# -- gradients -------------------------------------------------------------------------------------


def gradients_by_hand(model: PreTrainedModel) -> dict[str, Tensor]:
    """The l2 norm over windows of each weight's gradient, by autograd on the plain model."""
    squares: dict[str, Tensor] = {}
    for tokens in TEXT:
        model.zero_grad()
        logits = model(input_ids=tokens[None], use_cache=False).logits[0]
        F.cross_entropy(logits[:-1], tokens[1:]).backward()
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear | Conv1D):
                grad = layer.weight.grad.T if isinstance(layer, Conv1D) else layer.weight.grad
                squares[name] = squares.get(name, 0) + grad.double().square()
    return {name: square.sqrt() for name, square in squares.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_norms_are_of_the_dense_model_window_by_window(family: str) -> None:
    probe = Probe(Moments, gradients=True, update=True)
    model = FAMILIES[family]()
    apply(masked(model), model, probe)
    expected = gradients_by_hand(FAMILIES[family]())
    found = probe.found["gradients"]
    assert len(found) >= 8
    for name, norm_OI in found.items():
        assert float(expected[name].max()) > 1e-3
        close(norm_OI, expected[name], 1e-4)


def test_gradients_leave_no_trace_in_the_model(model: LlamaForCausalLM) -> None:
    engine = masked(model)
    model.lm_head.weight.requires_grad_(True)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    before = {n: (p.requires_grad, p.grad, p.clone()) for n, p in model.named_parameters()}
    probe = Probe(gradients=True)
    dict(engine.run(probe))
    assert len(probe.found["gradients"]) == 14
    for name, (requires_grad, grad, value) in before.items():
        parameter = model.get_parameter(name)
        assert parameter.requires_grad == requires_grad, name
        assert parameter.grad is grad, name
        assert torch.equal(parameter, value), name
    assert bool((model.lm_head.weight.grad == 1).all())
    logits = model(input_ids=TEXT[:1]).logits  # no hook is left
    logits.sum().backward()
    assert model.model.layers[1].mlp.up_proj.weight.grad is not None


def test_a_gradient_from_before_neither_counts_nor_is_lost(model: LlamaForCausalLM) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.grad = torch.full_like(weight, 100.0)
    probe = Probe(gradients=True)
    calibrated(model, probe)
    expected = gradients_by_hand(FAMILIES["llama"]())
    name = "model.layers.0.mlp.up_proj"
    close(probe.found["gradients"][name], expected[name], 1e-4)
    assert weight.grad is not None
    assert bool((weight.grad == 100).all())


def test_a_layer_outside_the_blocks_has_gradients_and_no_activations(
    model: LlamaForCausalLM,
) -> None:
    results = calibrated(model, PrunerZero(), include=["*"])
    assert list(results)[-1] == "lm_head"
    with pytest.raises(SparsifyError, match=r"^lm_head lies outside the decoder blocks.*dense"):
        calibrated(FAMILIES["llama"](), Wanda(), include=["*"])


# -- what costs a pass, and the order --------------------------------------------------------------


def test_a_strategy_that_asks_for_nothing_costs_no_pass_and_no_text(
    model: LlamaForCausalLM,
) -> None:
    def read() -> Tensor:
        raise AssertionError("text was read")

    engine, passes = masked(model, text=read), count_passes(model)
    results = dict(engine.run(Magnitude()))
    assert len(results) == 14
    assert passes == []
    assert engine.record is None


def test_each_kind_of_statistic_is_one_pass_and_the_block_one_more(
    model: LlamaForCausalLM,
) -> None:
    engine, passes = masked(model), count_passes(model)
    list(engine.run(Probe(Moments, Hessian)))
    first, second = decoder_blocks(model)
    # One window shows what the blocks return; one runs in the model and twice block by block.
    assert passes.count(second) in (3 * len(TEXT) + 4, 2 * len(TEXT) + 4)
    assert passes.count(first) == 3 * len(TEXT) + 4
    assert engine.record is not None
    assert (engine.record["samples"], engine.record["block_size"]) == TEXT.shape


def test_results_come_in_order_and_not_before_their_block_is_finished(
    model: LlamaForCausalLM,
) -> None:
    engine = masked(model)
    asked: list[str] = []

    class Order(Probe):
        def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
            for name, result in super().calibrate(blocks):
                asked.append(name)
                yield name, result

    order = []
    for name, _ in engine.run(Order(Moments)):
        block = name.rpartition(".self_attn")[0] or name.rpartition(".mlp")[0]
        assert len([done for done in asked if done.startswith(block)]) == 7
        order.append(name)
    assert order == asked
    assert len(order) == 14


def test_the_models_masks_are_in_use_again_afterwards(model: LlamaForCausalLM) -> None:
    engine = masked(model)
    list(engine.run(Wanda()))
    assert engine._scope.masking == "hard"


# -- errors ----------------------------------------------------------------------------------------


class Late(SparsityStrategy):
    """Gives results for the first block before it asks for something."""

    def __init__(self, early: list[Any], late: Any) -> None:
        super().__init__()
        self.early, self.late = early, late

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        blocks = iter(blocks)
        first = next(blocks)
        for kind in self.early:
            first.collect(kind)
        yield from Magnitude().calibrate([first])
        for block in blocks:
            block.collect(self.late)


@pytest.mark.parametrize(
    ("early", "late", "what"),
    [([], Moments, "statistics"), ([Moments], CrossHessian, "paired statistics")],
)
def test_a_strategy_that_asks_late_is_an_error(
    model: LlamaForCausalLM, early: list[Any], late: Any, what: str
) -> None:
    message = f"asks for {what} after .* first request must come before the first result"
    with pytest.raises(SparsifyError, match=message):
        calibrated(model, Late(early, late))


def test_a_layer_that_no_token_reaches_is_an_error(model: LlamaForCausalLM) -> None:
    model.model.layers[1].spare = nn.Linear(32, 32)
    message = r"no calibration token reached model\.layers\.1\.spare;.*exclude"
    with pytest.raises(SparsifyError, match=message):
        calibrated(model, Wanda())
    again = FAMILIES["llama"]()
    again.model.layers[1].spare = nn.Linear(32, 32)
    assert len(calibrated(again, Wanda(), exclude=["*spare"])) == 14


class Part(nn.Module):
    """A block of one linear layer, which returns what it is told to."""

    def __init__(self, returns: str) -> None:
        super().__init__()
        self.linear, self.returns = nn.Linear(8, 8), returns

    def forward(self, hidden_states: Tensor) -> Any:
        hidden_states = hidden_states + self.linear(hidden_states)
        returned: dict[str, Any] = {
            "tensor": hidden_states,
            "tuple": (hidden_states, None),
            "dict": {"hidden": hidden_states},
        }
        return returned[self.returns]


class Chain(nn.Module):
    """Three blocks, each given what the one before returned, unless it is told otherwise."""

    def __init__(
        self, returns: str = "tensor", between: float = 0.0, skip: int = -1, call: str = "position"
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(64, 8)
            self.blocks = nn.ModuleList([Part(returns) for _ in range(3)])
        self.between, self.skip, self.call = between, skip, call

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        hidden = self.embed(input_ids)
        for i, block in enumerate(self.blocks):
            if i == self.skip:
                continue
            if self.call == "list":
                block.forward = lambda x, forward=type(block).forward, block=block: forward(
                    block, x[0]
                )
            given = {"keyword": hidden, "list": [hidden], "position": hidden}[self.call]
            out = block(hidden_states=given) if self.call == "keyword" else block(given)
            hidden = out[0] if isinstance(out, tuple) else out
            hidden = hidden["hidden"] if isinstance(hidden, dict) else hidden
            hidden = hidden + self.between if self.between else hidden
        return hidden

    def get_output_embeddings(self) -> None:
        """It has no head."""

    def results(
        self, strategy: SparsityStrategy, activations: Any = "pruned"
    ) -> dict[str, LayerResult]:
        """Calibrate its three layers."""
        layers = {f"blocks.{i}.linear": block.linear for i, block in enumerate(self.blocks)}
        scope = inject(self, layers, Selection(TWO_FOUR), FixedMasker)
        made: Any = SimpleNamespace(
            model=self, scope=scope, layers=masked_layers(self), base=SimpleNamespace(hash="")
        )
        settings = Calibration(cache=False, activations=activations)
        self.device = torch.device("cpu")
        return dict(Layerwise(made, lambda: TEXT, settings, self.device).run(strategy))


@pytest.mark.parametrize(
    "options", [{}, {"returns": "tuple"}, {"call": "keyword"}], ids=["tensor", "tuple", "keyword"]
)
def test_blocks_may_return_tuples_and_be_called_by_keyword(options: dict[str, Any]) -> None:
    found, expected = Chain(**options).results(Wanda()), Chain().results(Wanda())
    assert len(found) == 3
    assert all(torch.equal(found[name].mask, expected[name].mask) for name in expected)


@pytest.mark.parametrize("activations", ["pruned", "dense"])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"between": 1.0}, "what enters blocks.1 is not what the block before it returned"),
        ({"returns": "dict"}, "blocks.0 returns dict, which is no tensor"),
        ({"call": "list"}, "they fail when they run by themselves"),
    ],
    ids=["between", "dict", "list"],
)
def test_blocks_that_cannot_run_by_themselves_run_in_the_whole_model(
    options: dict[str, Any], reason: str, activations: Any, caplog: pytest.LogCaptureFixture
) -> None:
    probe = Probe(Moments, Hessian)
    results = Chain(**options).results(probe, activations)
    assert f"which is slow: {reason}" in caplog.text
    check(lambda: Chain(**options), probe, results, activations == "dense")


@pytest.mark.parametrize("skip", [1, 2])
def test_a_block_that_the_model_does_not_call_is_an_error(skip: int) -> None:
    with pytest.raises(SparsifyError, match=rf"no calibration token reached blocks\.{skip}"):
        Chain(skip=skip).results(Wanda())
    assert len(Chain(skip=skip).results(Magnitude())) == 3


def test_samples_must_be_at_least_one() -> None:
    with pytest.raises(SparsifyError, match="samples=0; it must be at least 1"):
        Calibration(samples=0)
