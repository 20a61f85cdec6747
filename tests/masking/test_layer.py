"""The masked layer: its numbers against plain autograd, and what it keeps for backward.

Shapes: O out, I in, B any leading dimensions, G groups, M group size, K candidates.
"""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsify import Draw, FixedMasker, Masker, NMPattern
from sparsify.masking import noise
from sparsify.masking.experts import masked
from sparsify.masking.inject import inject
from sparsify.masking.layer import MaskedConv1D, MaskedLinear, MaskScope
from sparsify.masking.linear import linear_shape
from sparsify.masking.masker import Masking
from sparsify.masking.select import Selection, select
from sparsify.strategies.maskllm import CandidateMasker
from sparsify.training.step import checkpoint_activations

ROWS, COLUMNS = 12, 16
DRAW = Draw(0, 3, 5)
VALUES = {"kappa": 3.0, "tau": 0.7}
KINDS = ["linear", "linear without bias", "conv1d"]


def plain_layer(kind: str, rows: int = ROWS, columns: int = COLUMNS) -> nn.Module:
    """A layer with random weights and bias."""
    layer = (
        Conv1D(rows, columns)
        if kind == "conv1d"
        else nn.Linear(columns, rows, bias=kind == "linear")
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    return layer


def candidate_layer(
    layer: nn.Module, hard: bool = False, train_weight: bool = True
) -> MaskedLinear:
    """The layer under MaskLLM's masker with random logits."""
    layer.requires_grad_(train_weight)
    masker = CandidateMasker("layer", linear_shape(layer), NMPattern(2, 4), VALUES, hard)
    masker.logits_OKG.data.normal_(generator=torch.Generator().manual_seed(2))
    return masked(layer, masker, MaskScope())


def fixed_layer(layer: nn.Module, train_weight: bool = False) -> MaskedLinear:
    """The layer under a mask that keeps its largest weights."""
    layer.requires_grad_(train_weight)
    masker = FixedMasker("layer", linear_shape(layer), NMPattern(2, 4))
    new = masked(layer, masker, MaskScope())
    masker.set_mask(NMPattern(2, 4).top(new.weight_OI.detach().abs()))
    return new


def soft_mask(layer: MaskedLinear, logits_OKG: Tensor) -> Tensor:
    """Equations 4 to 6 written out per group, candidates last."""
    rows, candidates, groups = logits_OKG.shape
    u = noise.uniform(DRAW.key("layer"), rows, candidates * groups).view_as(logits_OKG)
    scores = (VALUES["kappa"] * logits_OKG - torch.log(-torch.log(u))) / VALUES["tau"]
    soft_OGK = torch.softmax(scores.transpose(1, 2), dim=-1)
    return (soft_OGK @ layer.masker.pattern.table().to(soft_OGK.dtype)).flatten(1)


def reference(layer: MaskedLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and penalty by plain autograd, which keeps what it likes."""
    masked_OI = layer.weight_OI * soft_mask(layer, layer.masker.logits_OKG)
    y = x @ masked_OI.T
    return (y if layer.bias is None else y + layer.bias), masked_OI.square().sum()


def inputs(shape: tuple[int, ...] = (2, 5, COLUMNS), dtype: torch.dtype = torch.float32) -> Tensor:
    """Random inputs that need a gradient."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    return x.requires_grad_()


def run(layer: MaskedLinear, x: Tensor, masking: Masking = DRAW) -> tuple[Tensor, Tensor]:
    """Output and penalty of the layer."""
    with layer.scope.use(masking) as penalties:
        y = layer(x)
    return y, penalties[0] if penalties else y.new_zeros(())


def gradients(layer: MaskedLinear, x: Tensor, forward: Callable[..., Any]) -> dict[str, Tensor]:
    """All gradients of one nonlinear function of output and penalty."""
    layer.zero_grad()
    x.grad = None
    y, penalty = forward(layer, x)
    (y.float().sin().sum() + 0.3 * penalty).backward()
    found = {"x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def assert_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6
) -> None:
    """The same gradients, each to within the tolerance of its largest entry."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= tolerance * max(
            1, float(value.abs().max())
        ), name


@pytest.mark.parametrize("train_weight", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_and_gradients_are_those_of_plain_autograd(kind: str, train_weight: bool) -> None:
    layer = candidate_layer(plain_layer(kind), train_weight=train_weight)
    assert type(layer) is (MaskedConv1D if kind == "conv1d" else MaskedLinear)
    if not train_weight and layer.bias is not None:
        layer.bias.requires_grad_()
    x = inputs()
    y, penalty = run(layer, x)
    y_expected, penalty_expected = reference(layer, x)
    torch.testing.assert_close(y, y_expected, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(penalty, penalty_expected, atol=0, rtol=1e-6)
    found, expected = gradients(layer, x, run), gradients(layer, x, reference)
    names = {"x", "masker.logits_OKG"} | ({"weight"} if train_weight else set())
    assert found.keys() == names | ({"bias"} if layer.bias is not None else set())
    assert_close(found, expected)


def test_the_penalty_alone_reaches_the_logits() -> None:
    layer = candidate_layer(plain_layer("linear"), train_weight=False)
    x = inputs().detach()
    _, penalty = run(layer, x)
    penalty.backward()
    found = layer.masker.logits_OKG.grad
    layer.zero_grad()
    reference(layer, x)[1].backward()
    assert float(found.abs().max()) > 0.01
    torch.testing.assert_close(found, layer.masker.logits_OKG.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_differences(kind: str) -> None:
    layer = candidate_layer(plain_layer(kind, 3, 8)).double()
    x = inputs((4, 8), torch.float64)
    names, tensors = zip(*layer.named_parameters(), strict=True)

    def value(x: Tensor, *values: Tensor) -> float:
        with torch.no_grad():
            for tensor, new in zip(tensors, values, strict=True):
                tensor.copy_(new)
            y, _ = run(layer, x)
        return float(y.sin().sum())

    found = gradients(layer, x, lambda layer, x: (run(layer, x)[0], torch.zeros(())))
    start = [t.detach().clone() for t in tensors]
    point = dict(zip(names, start, strict=True)) | {"x": x.detach().clone()}
    for name, grad in found.items():
        for index in range(0, point[name].numel(), 5):
            ends = []
            for step in (1e-4, -1e-4):
                moved = {n: v.clone() for n, v in point.items()}
                moved[name].view(-1)[index] += step
                ends.append(value(moved["x"], *(moved[n] for n in names)))
            slope = (ends[0] - ends[1]) / 2e-4
            assert grad.reshape(-1)[index].item() == pytest.approx(slope, abs=1e-6, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_hard_mask_leaves_positive_zeros(kind: str) -> None:
    layer = fixed_layer(plain_layer(kind))
    mask = layer.masker.hard_mask(layer.weight_OI)
    weight, _ = layer.masker(layer.weight_OI, "hard")
    assert bool((layer.weight_OI[~mask] < 0).any())  # a product would leave -0.0 there
    assert not bool(weight[~mask].signbit().any())
    assert torch.equal(weight[~mask], torch.zeros(int((~mask).sum())))
    assert torch.equal(weight[mask], layer.weight_OI[mask])
    x = inputs()
    y, penalty = run(layer, x, "hard")
    torch.testing.assert_close(
        y, F.linear(x, layer.weight_OI * mask, layer.bias), atol=1e-5, rtol=1e-6
    )
    assert float(penalty) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_dense_is_the_layer_that_was_replaced(kind: str) -> None:
    plain = plain_layer(kind)
    layer, x = fixed_layer(plain), inputs()
    torch.testing.assert_close(run(layer, x, "dense")[0], plain(x), atol=1e-5, rtol=1e-6)
    assert torch.equal(run(layer, x, "dense")[0], F.linear(x, layer.weight_OI, layer.bias))
    back = layer.plain()
    assert type(back) is type(plain)
    assert all(dict(back.named_parameters())[name] is p for name, p in plain.named_parameters())
    assert torch.equal(back(x), plain(x))


def test_frozen_weights_under_a_fixed_mask_still_pass_the_gradient_on() -> None:
    layer, x = fixed_layer(plain_layer("linear without bias")), inputs()
    y, _ = run(layer, x)
    assert y.requires_grad
    y.backward(torch.ones_like(y))
    expected = torch.ones_like(y) @ (layer.weight_OI * layer.masker.hard_mask(layer.weight_OI))
    torch.testing.assert_close(x.grad, expected)


def kept_bytes(
    layer: MaskedLinear, forward: Callable[..., Any], x: Tensor, autocast: bool = False
) -> int:
    """Bytes of the storages kept for backward, but for the input's and the Parameters'."""
    own = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        result = forward(layer, x)
    assert result[0].requires_grad
    return sum(kept.values())


def naive_fixed(layer: MaskedLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """The masked product as plain autograd has it."""
    weight = layer.weight_OI * layer.masker.hard_mask(layer.weight_OI)
    return F.linear(x, weight, layer.bias), weight.new_zeros(())


@pytest.mark.parametrize("train_weight", [True, False])
@pytest.mark.parametrize(
    ("make", "naive"),
    [(candidate_layer, reference), (fixed_layer, naive_fixed)],
    ids=["maskllm", "fixed"],
)
def test_nothing_of_the_weights_size_is_kept_for_backward(
    make: Callable[..., MaskedLinear], naive: Callable[..., Any], train_weight: bool
) -> None:
    layer = make(plain_layer("linear", 64, 128), train_weight=train_weight)
    weights = layer.weight.numel()
    x = inputs((2, 128))
    assert kept_bytes(layer, run, x) < 0.1 * weights
    assert kept_bytes(layer, naive, x) > 1.0 * weights  # the measurement sees what autograd keeps
    # Under autocast the input is kept in bf16: its size, and nothing of the weight's.
    assert kept_bytes(layer, run, x, autocast=True) - 2 * x.numel() < 0.1 * weights


@pytest.mark.parametrize("kind", KINDS)
def test_under_bf16_autocast_the_numbers_are_near(kind: str) -> None:
    layer, x = candidate_layer(plain_layer(kind)), inputs()

    def autocast(layer: MaskedLinear, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y, penalty = run(layer, x)
        assert y.dtype == torch.bfloat16
        assert penalty.dtype == torch.float32
        return y, penalty

    exact, near = run(layer, x)[0], autocast(layer, x)[0]
    assert float(((near - exact).norm() / exact.norm()).detach()) < 0.01
    linear = {}
    for name, forward in (("fp32", run), ("bf16", autocast)):
        layer.zero_grad()
        x.grad = None
        y, penalty = forward(layer, x)
        (y.float().sum() + 0.3 * penalty).backward()
        linear[name] = {"x": x.grad} | {n: p.grad for n, p in layer.named_parameters()}
    for name, grad in linear["bf16"].items():
        assert grad.dtype == torch.float32, name
        assert bool(grad.isfinite().all()), name
        expected = linear["fp32"][name]
        assert float((grad - expected).norm() / expected.norm()) < 0.02, name


def test_the_straight_through_sample_is_hard_and_its_gradient_soft() -> None:
    layer = candidate_layer(plain_layer("linear"), hard=True)
    weight, penalty = layer.masker(layer.weight_OI, DRAW)
    assert NMPattern(2, 4).holds(weight)
    kept = weight != 0
    assert torch.equal(weight[kept], layer.weight_OI[kept])
    torch.testing.assert_close(penalty, weight.square().sum())


class Doubling(Masker):
    """Keeps everything, and counts how often it is asked."""

    calls = 0

    def sample(self, weight_OI: Tensor, draw: Draw, row0: int = 0) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return 2 * weight_OI, weight_OI.new_zeros(())


def test_the_masker_runs_once_forward_and_once_backward() -> None:
    plain = plain_layer("linear")
    layer = masked(plain, Doubling("layer", (ROWS, COLUMNS), NMPattern(2, 4)), MaskScope())
    x = inputs()
    y, _ = run(layer, x)
    assert layer.masker.calls == 1
    y.sum().backward()
    assert layer.masker.calls == 2
    torch.testing.assert_close(x.grad, torch.ones(2, 5, ROWS) @ (2 * plain.weight))


def test_scopes_nest_and_restore() -> None:
    scope = MaskScope()
    assert scope.masking == "hard"
    with scope.use(DRAW) as outer:
        outer.append(torch.zeros(()))
        with contextlib.suppress(KeyError), scope.use("dense") as inner:
            assert scope.masking == "dense"
            assert inner == []
            raise KeyError
        assert scope.masking == DRAW
        assert scope.penalties is outer
    assert scope.masking == "hard"


def test_two_draws_in_flight_survive_activation_checkpointing(model: Any) -> None:
    tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(4))

    def logit_gradients(checkpointed: bool, order: int) -> tuple[list[Tensor], Tensor]:
        lm = copy.deepcopy(model).requires_grad_(False)
        pattern = NMPattern(2, 4)
        scope = inject(
            lm,
            select(lm, Selection(pattern))[0],
            Selection(pattern),
            lambda *args: CandidateMasker(*args, VALUES, False),
        )
        if checkpointed:
            checkpoint_activations(lm, scope)
        generator = torch.Generator().manual_seed(5)
        logits = [p for p in lm.parameters() if p.requires_grad]
        for p in logits:
            p.data.normal_(generator=generator)
        losses, total = [], torch.zeros(())
        for index in (0, 1):
            with scope.use(Draw(0, 0, index)) as penalties:
                out = lm(input_ids=tokens, use_cache=False).logits
            assert len(penalties) == 14
            losses.append(out.float().logsumexp(-1).mean() + 1e-3 * torch.stack(penalties).sum())
            total = total + losses[-1] * (index + 1)
        assert losses[0].item() != losses[1].item()
        if order:
            losses[1].backward(torch.tensor(2.0))
            losses[0].backward()
        else:
            total.backward()
        assert scope.masking == "hard"
        return [p.grad for p in logits], total.detach()

    expected, loss = logit_gradients(False, 0)
    assert len(expected) == 14
    for order in (0, 1):
        found, loss_found = logit_gradients(True, order)
        assert torch.equal(loss_found, loss)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
