"""Experts under masks: numbers and gradients against plain autograd, and what is left afterwards.

Shapes: E experts, O out and I in of one expert, R rows of all experts.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from sparsify import Draw, LayerResult, NMPattern, SparsifyError, SparsityStrategy
from sparsify.masking.experts import MaskedExperts, matrices
from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.overrides import Overrides
from sparsify.masking.select import Selection
from sparsify.strategies.fixed_mask import FixedMask
from sparsify.strategies.logit_masker import MeanMask
from sparsify.strategies.maskllm import MaskLLM
from sparsify.strategies.maskpro import MaskPro
from sparsify.strategies.selfmask import SelfMask
from sparsify.strategies.sr_ste import SRSTE
from sparsify.training.step import checkpoint_activations
from tests.architectures import tiny
from tests.conftest import masked_model, tiny_llama

TEXT = torch.randint(2, 64, (2, 6), generator=torch.Generator().manual_seed(0))
TRANSPOSED = ("gpt_oss", "llama4_text")
KINDS = [
    *("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text"),
    *("jetmoe", "nemotron_h", "qwen3_next", "glm_moe_dsa", "zaya"),
]
INITIALIZED = "_is_hf_initialized"  # a mark of Transformers, which plain layers lose
EXPERTS = Selection(include=["*.experts.*"])
DRAW = Draw(0, 3, 5)
LEARNERS: dict[str, tuple[Callable[[], SparsityStrategy], Draw]] = {
    "maskllm": (lambda: MaskLLM(prior=None), DRAW),
    "maskpro": (lambda: MaskPro(prior=None, estimator="mean_gradient"), MeanMask(0, 3, 5)),
    "selfmask": (lambda: SelfMask(prior=None), DRAW),
    "sr_ste": (SRSTE, DRAW),
    "fixed_mask": (lambda: FixedMask("magnitude", lora_rank=2), DRAW),
}


def eager(model: PreTrainedModel) -> PreTrainedModel:
    """Computing expert by expert, as under masks: other ways add in another order."""
    if model.config._experts_implementation != "eager":
        model.set_experts_implementation("eager")
    return model


def logits(model: PreTrainedModel, text: Tensor = TEXT) -> Tensor:
    return model(input_ids=text, use_cache=False).logits


def random_masks(
    kind: str, selection: Selection = Selection()
) -> tuple[MaskedModel, dict[str, Tensor]]:
    """A model under fixed masks of random candidates, and these."""
    generator = torch.Generator().manual_seed(1)
    masked = masked_model(tiny(kind), SparsityStrategy(), selection)
    masked.check_called()
    for masker in masked.maskers:
        masker.set_mask(masker.pattern.top(torch.rand(masker.shape, generator=generator)))
    return masked, masked.hard_masks()


@torch.no_grad()
def pruned(kind: str, masks: dict[str, Tensor]) -> PreTrainedModel:
    """The plain model with zeros in its Parameters."""
    model = eager(tiny(kind))
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name in parameters:
            mask_EOI = mask.view(len(parameters[name]), -1, mask.shape[1])
            parameters[name][~(mask_EOI.mT if kind in TRANSPOSED else mask_EOI)] = 0
        else:
            parameters[f"{name}.weight"][~mask] = 0
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_hard_masks_compute_what_zeros_do(kind: str) -> None:
    masked, masks = random_masks(kind)
    stacks = [layer for layer in masked.layers.values() if layer.experts is not None]
    assert {layer.experts for layer in stacks} == {4}
    expected = pruned(kind, masks)
    before = tiny(kind).config._experts_implementation
    with masked.hard(), torch.no_grad():
        assert torch.equal(logits(masked.model), logits(expected))
    with masked.scope.use("dense"), torch.no_grad():
        assert torch.equal(logits(masked.model), logits(eager(tiny(kind))))
    masked.fold()
    assert masked.model.config._experts_implementation == before
    assert_plain(masked.model, expected)
    with torch.no_grad():
        assert torch.equal(logits(eager(masked.model)), logits(expected))


def assert_plain(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    """Nothing of the masked layers is left, and every tensor is as expected, to the bit."""
    assert not [m for m in model.modules() if isinstance(m, MaskedExperts)]
    found, wanted = model.state_dict(), expected.state_dict()
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
        assert not found[name][value == 0].signbit().logical_xor(value[value == 0].signbit()).any()
        assert found[name].is_contiguous(), name
    for (name, module), plain in zip(model.named_modules(), expected.modules(), strict=True):
        assert type(module) is type(plain)
        assert not module._forward_pre_hooks.keys() ^ plain._forward_pre_hooks.keys(), name
        assert not module._forward_hooks.keys() ^ plain._forward_hooks.keys(), name
        assert vars(module).keys() | {INITIALIZED} == vars(plain).keys() | {INITIALIZED}, name
        assert module._modules.keys() == plain._modules.keys(), name


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4_text", "jetmoe"])
def test_a_layer_that_leaves_takes_nothing_along(kind: str) -> None:
    masked, _ = random_masks(kind)
    before = tiny(kind).config._experts_implementation
    for name, layer in masked.layers.items():
        assert (masked.model.config._experts_implementation == "eager") or kind in (
            "llama4_text",
            "jetmoe",
        )
        layer.leave(masked.model, name)
    assert_plain(masked.model, tiny(kind))
    assert masked.model.config._experts_implementation == before


def test_layers_are_chosen_by_the_names_of_parameters() -> None:
    chosen = {
        "down_proj": Selection(include=["*.experts.down_proj"]),
        "gate_up_proj": Selection(include=["*.experts.*"], exclude=["*.experts.down_proj"]),
    }
    for key, selection in chosen.items():
        masked, masks = random_masks("mixtral", selection)
        assert set(masks) == {f"model.layers.{i}.mlp.experts.{key}" for i in (0, 1)}
        with masked.hard(), torch.no_grad():
            assert torch.equal(logits(masked.model), logits(pruned("mixtral", masks)))
    overrides = Overrides.parse({"*.1.mlp.experts.down_proj": "1:4", "*.0.*.gate_up_proj": "dense"})
    masked, masks = random_masks("gpt_oss", Selection(overrides=overrides))
    assert "model.layers.0.mlp.experts.gate_up_proj" not in masks
    kept = {name: mask.unflatten(1, (-1, 4)).sum(-1) for name, mask in masks.items()}
    assert {int(count.max()) for count in kept.values()} == {1, 2}
    assert set(kept.pop("model.layers.1.mlp.experts.down_proj").flatten().tolist()) == {1}
    assert all(set(count.flatten().tolist()) == {2} for count in kept.values())
    with masked.hard(), torch.no_grad():
        assert torch.equal(logits(masked.model), logits(pruned("gpt_oss", masks)))


# -- learning --------------------------------------------------------------------------------------


def learning(kind: str, learner: str) -> MaskedModel:
    """A model whose experts' masks are learned, with random values of all that is."""
    generator = torch.Generator().manual_seed(2)
    masked = masked_model(tiny(kind), LEARNERS[learner][0](), EXPERTS)
    masked.calibrate(
        (name, LayerResult(NMPattern(2, 4).top(matrix.weight_OI.abs())))
        for name, matrix in matrices(masked.layers).items()
    )
    for masker in masked.maskers:
        for parameter in masker.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(generator=generator)
        if isinstance(masked.strategy, SelfMask):
            masker.refresh()
    return masked


def loss(masked: MaskedModel, draw: Draw, text: Tensor = TEXT) -> Tensor:
    with masked.scope.use(draw) as penalties:
        found = logits(masked.model, text)
    return found.sin().mean() + 0.01 * sum(penalties)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {name: grad.clone() for name, grad in found.items()}


def routers_of(model: PreTrainedModel, chosen: dict[str, Tensor]) -> None:
    """Have the routers note the experts that they choose, by the name of the mixture."""
    for name, module in model.named_modules():
        if name.endswith((".mlp.gate", ".mlp.router")):
            owner = name.rpartition(".")[0]
            module.register_forward_hook(
                lambda *a, owner=owner: chosen.update({owner: a[2][2].unique()})
            )


def reference(masked: MaskedModel, kind: str, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
    """The same loss of a plain model whose masked stacks are made whole, expert by expert; and all
    gradients, by the names in the masked model.
    """
    plain = eager(tiny(kind)).requires_grad_(masked.strategy.effect.trains_base)
    values = dict(plain.named_parameters())
    leaves: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    penalties: dict[str, list[Tensor]] = {}
    for name, layer in masked.layers.items():
        stack_EOI = values[name].mT if kind in TRANSPOSED else values[name]
        own = {n: p.detach().clone() for n, p in layer.masker.named_parameters()}
        for n, p in layer.masker.named_parameters():
            leaves[f"{name}.masker.{n}"] = own[n].requires_grad_(p.requires_grad)
        made, penalties[name] = [], []
        experts, rows = stack_EOI.shape[:2]
        for e, weight_OI in enumerate(stack_EOI):
            part = slice(e * rows, (e + 1) * rows)
            tensors = {n: t[part] if len(t) == experts * rows else t for n, t in own.items()}
            masked_OI, penalty = functional_call(
                copy.deepcopy(layer.masker), tensors, (weight_OI, draw, e * rows)
            )
            made.append(masked_OI)
            penalties[name].append(penalty)
        # No expert's draw depends on where the others are.
        with torch.no_grad():
            whole, _ = functional_call(layer.masker, own, (stack_EOI.flatten(0, 1), draw, 0))
        assert torch.equal(torch.cat(made), whole)
        weights[name] = torch.stack([w.T for w in made] if kind in TRANSPOSED else made)
    chosen: dict[str, Tensor] = {}
    routers_of(plain, chosen)
    kwargs = {"input_ids": TEXT, "use_cache": False}
    found = functional_call(plain, weights, (), kwargs).logits
    total = found.sin().mean()
    for name, terms in penalties.items():
        used = range(4) if kind == "llama4_text" else chosen[name.rsplit(".", 2)[0]].tolist()
        total = total + 0.01 * sum(terms[e] for e in used)
    total.backward()
    every = leaves | values
    return total.detach(), {n: t.grad for n, t in every.items() if t.grad is not None}


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("learner", LEARNERS)
def test_gradients_are_those_of_masked_stacks(learner: str, kind: str) -> None:
    masked, draw = learning(kind, learner), LEARNERS[learner][1]
    value = loss(masked, draw)
    value.backward()
    found = gradients(masked.model)
    expected_value, expected = reference(masked, kind, draw)
    torch.testing.assert_close(value.detach(), expected_value, rtol=1e-5, atol=1e-6)
    assert found.keys() == expected.keys()
    stacks = [name for name in masked.layers if learner == "sr_ste"]
    assert all(bool(expected[name].any()) for name in stacks)
    a_layer = {"sr_ste": 0, "fixed_mask": 2}.get(learner, 1)
    assert sum(".masker." in name for name in found) == a_layer * len(masked.layers)
    for name, grad in expected.items():
        size = float(grad.abs().max())
        torch.testing.assert_close(found[name], grad, rtol=0, atol=2e-5 * size, msg=name)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("learner", ["maskllm", "sr_ste"])
def test_experts_without_tokens_get_no_gradient(learner: str, kind: str) -> None:
    masked, chosen = learning(kind, learner), dict[str, Tensor]()
    routers_of(masked.model, chosen)
    loss(masked, DRAW, TEXT[:1, :1]).backward()
    found = gradients(masked.model)
    for name, layer in masked.layers.items():
        grad = found[name] if learner == "sr_ste" else found[f"{name}.masker.logits_OKG"]
        by_expert = grad if learner == "sr_ste" else grad.unflatten(0, (4, -1))
        used = set(chosen[name.rsplit(".", 2)[0]].tolist())
        assert len(used) == 2
        assert {e for e in range(4) if bool(by_expert[e].any())} == used
        assert layer._rows is None  # nothing is held between two passes


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("learner", ["maskllm", "sr_ste"])
def test_activation_checkpointing_changes_no_bit(learner: str, kind: str) -> None:
    found, calls = [], [0, 0]
    for checkpointed in (False, True):

        def count(*_: Any, which: bool = checkpointed) -> None:
            calls[which] += 1

        masked = learning(kind, learner)
        if checkpointed:
            checkpoint_activations(masked.model, masked.scope)
        for layer in masked.layers.values():
            layer.register_forward_pre_hook(count)
        loss(masked, DRAW).backward()
        found.append(gradients(masked.model))
    assert calls[1] > calls[0]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][name], grad) for name, grad in found[0].items())


def test_two_passes_forward_and_then_two_back_are_two_passes() -> None:
    masked, draws = learning("mixtral", "maskllm"), [DRAW, Draw(0, 4, 5)]
    alone = []
    for draw in draws:
        loss(masked, draw).backward()
        alone.append(gradients(masked.model))
    assert any(not torch.equal(grad, alone[1][name]) for name, grad in alone[0].items())
    first, second = (loss(masked, draw) for draw in draws)
    first.backward()
    second.backward()
    for name, grad in gradients(masked.model).items():
        assert torch.equal(grad, alone[0][name] + alone[1][name]), name


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_copy_is_a_model_of_its_own(kind: str) -> None:
    masked, masks = random_masks(kind)
    twin = copy.deepcopy(masked)
    own = {id(m) for m in masked.model.modules()}
    for layer in twin.layers.values():
        if isinstance(layer, MaskedExperts):
            assert id(layer.stack.owner) not in own
            assert layer.stack.owner._modules[layer.stack.key] is layer
        layer.weight.data.mul_(2)
    expected = pruned(kind, masks)
    with masked.hard(), twin.hard(), torch.no_grad():
        assert torch.equal(logits(masked.model), logits(expected))
        assert not torch.equal(logits(twin.model), logits(expected))
    twin.fold()
    for name in masks:
        found, own_value = dict(twin.model.named_parameters()), dict(expected.named_parameters())
        key = name if name in found else f"{name}.weight"
        assert torch.equal(found[key], 2 * own_value[key])
    assert any(isinstance(layer, MaskedExperts) for layer in masked.layers.values())
    masked.fold()
    assert_plain(masked.model, expected)


# -- what blocks do with the matrices --------------------------------------------------------------


class Uses(nn.Module):
    """Experts whose block does with them what it likes."""

    def __init__(self, use: Callable[[Tensor, Any], Tensor], transposed: bool) -> None:
        super().__init__()
        self.is_transposed, self.use = transposed, use
        generator = torch.Generator().manual_seed(3)
        self.w = nn.Parameter(torch.randn(2, 32, 32, generator=generator) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.w)


def using(use: Callable[[Tensor, Any], Tensor], transposed: bool) -> MaskedModel:
    model = tiny_llama()
    model.model.layers[0].mlp = Uses(use, transposed)
    return masked_model(model, SparsityStrategy(), Selection(include=["*.mlp.w"]))


@pytest.mark.parametrize(
    ("use", "transposed", "what"),
    [
        (lambda x, w: torch.einsum("bti,eoi->bto", x, w), False, "einsum"),
        (lambda x, w: x @ w[0].T, False, "T"),
        (lambda x, w: F.linear(x, w.transpose(1, 2)[0]), True, "transpose"),
        (lambda x, w: F.linear(x, w[[0, 1]].sum(0)), False, "a selection of several"),
        (lambda x, w: F.linear(x, w[0:2][0]), False, "a selection of several"),
        (lambda x, w: F.linear(x, w[0].float()), False, "float"),
        (lambda x, w: x * w[0], False, "mul"),
        (lambda x, w: x @ w[0], False, "a product in the other layout"),
        (lambda x, w: F.linear(x, w[0]), True, "a product in the other layout"),
        (lambda x, w: torch.bmm(x, w), False, "a product in the other layout"),
    ],
)
def test_another_use_of_the_matrices_is_named_with_its_fix(
    use: Callable[..., Tensor], transposed: bool, what: str
) -> None:
    masked = using(use, transposed)
    with pytest.raises(SparsifyError, match=r"--model.exclude '\*.w'") as error:
        masked.check_called()
    start = f"model.layers.0.mlp.w: Uses uses its experts' matrices in {what}"
    assert str(error.value).startswith(start)


@pytest.mark.parametrize(
    ("use", "transposed"),
    [
        (lambda x, w: sum(F.linear(x, matrix) for matrix in w), False),
        (lambda x, w: F.linear(input=x, weight=w[-1], bias=torch.ones(32)), False),
        (lambda x, w: F.linear(x, w[torch.tensor(1)]), False),
        (lambda x, w: x.matmul(w[1]) + torch.matmul(x, w[0]), True),
        (lambda x, w: torch.bmm(x, w), True),
    ],
)
def test_what_blocks_may_do(use: Callable[..., Tensor], transposed: bool) -> None:
    masked = using(use, transposed)
    [layer] = masked.layers.values()
    mask = NMPattern(2, 4).top(torch.rand(64, 32, generator=torch.Generator().manual_seed(4)))
    layer.masker.set_mask(mask)
    masked.check_called()
    plain = tiny_llama()
    plain.model.layers[0].mlp = experts = Uses(use, transposed)
    mask_EOI = mask.view(2, 32, 32)
    experts.w.data[~(mask_EOI.mT if transposed else mask_EOI)] = 0
    with masked.hard(), torch.no_grad():
        assert torch.equal(logits(masked.model), logits(plain))
    assert not hasattr(layer, "T")
    with pytest.raises(AttributeError, match="nothing"):
        layer.nothing  # noqa: B018
