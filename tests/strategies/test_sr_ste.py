"""SR-STE, STE and ASP, against steps that are taken by hand.

Shapes: O out, I in.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sparsify import Draw, LayerResult, NMPattern, SparsifyError
from sparsify.masking.inject import hard_masks, inject
from sparsify.masking.layer import MaskedLinear, MaskScope, masked_layers, maskers
from sparsify.masking.select import Selection, select
from sparsify.strategies.magnitude import Magnitude
from sparsify.strategies.sparsegpt import SparseGPT
from sparsify.strategies.sr_ste import SRSTE, MagnitudeMasker
from sparsify.training.step import BatchRun
from tests.conftest import tiny_llama
from tests.strategies.training import HandAdamW, adamw, built, largest, rate, sgd, train
from tests.tiny_models import tiny_gpt2

TWO_FOUR = NMPattern(2, 4)
TOKENS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
DRAW = Draw(0, 0, 0)


def layer_of(weight: torch.Tensor, strategy: SRSTE | None = None) -> MaskedLinear:
    """One masked layer over a weight."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight)
    masker = (strategy or SRSTE()).make_masker("layer", (rows, columns), TWO_FOUR)
    return MaskedLinear(linear, masker, MaskScope())


def test_what_runs_forward_is_the_largest_of_now_to_the_last_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (4 * torch.randn(16, 32, generator=generator)).round() / 4  # with ties and zeros
    masker = MagnitudeMasker("layer", (16, 32), TWO_FOUR)
    for _ in range(2):
        mask = torch.from_numpy(largest(weight.numpy()))
        assert torch.equal(masker.hard_mask(weight), mask)
        sampled, penalty = masker.sample(weight, DRAW)
        assert torch.equal(sampled, torch.where(mask, weight, 0))
        assert torch.equal(sampled, masker.harden(weight))
        assert not bool(sampled[~mask].signbit().any())
        assert float(penalty) == 0
        weight = weight.roll(1, 1)  # another weight, another mask: nothing is remembered
    powers = torch.randint(-38, 37, (16, 32), generator=generator)
    odd = torch.randn(16, 32, generator=generator) * 10.0**powers
    assert torch.equal(masker.sample(odd, DRAW)[0], masker.harden(odd))


def test_the_gradient_goes_straight_through_to_all_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 16, generator=generator), torch.randn(5, 16, generator=generator)
    upstream = torch.randn(5, 8, generator=generator)
    layer = layer_of(weight.clone())
    with layer.scope.use(DRAW):
        layer(x).backward(upstream)
    plain = torch.where(torch.from_numpy(largest(weight.numpy())), weight, 0).requires_grad_()
    F.linear(x, plain).backward(upstream)
    assert torch.equal(layer.weight.grad, plain.grad)
    assert bool((layer.weight.grad != 0).all())


def test_asp_gives_dropped_weights_no_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 16, generator=generator), torch.randn(5, 16, generator=generator)
    strategy = SRSTE(refresh="never")
    layer = layer_of(weight.clone(), strategy)
    strategy.init_masker(layer.masker, layer.weight_OI, None)
    mask = torch.from_numpy(largest(weight.numpy()))
    assert torch.equal(layer.masker.hard_mask(weight), mask)
    assert torch.equal(layer.masker.hard_mask(weight.flip(1)), mask)
    with layer.scope.use(DRAW):
        layer(x).sum().backward()
    assert torch.equal(layer.weight.grad != 0, mask)
    before = layer.weight.detach().clone()
    strategy.after_step({layer.masker: layer.weight_OI}, 0.1)
    assert torch.equal(layer.weight, before)


def test_under_sgd_a_small_step_is_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    gradient = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    lr, decay = 1e-7, 3.0
    layer = layer_of(weight - lr * gradient)
    SRSTE(decay=decay).after_step({layer.masker: layer.weight_OI}, lr)
    dropped = torch.from_numpy(~largest(weight.numpy()))
    expected = gradient + decay * dropped * weight
    torch.testing.assert_close((weight - layer.weight) / lr, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("decay", [0.0, 20.0])
def test_steps_are_the_optimizers_and_then_the_decay(
    name: str, decay: float, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    lr = {"sgd": 0.03, "adamw": 0.003}[name]
    make = {"sgd": sgd, "adamw": adamw}[name](lr)
    module = built(SRSTE(decay=decay), tokenizer, optimizer=make)
    layers = {f"model.{layer}.weight" for layer in masked_layers(module.lm)}
    assert len(layers) == 14
    steps = train(module, text, tmp_path)
    flips, moved = 0, 0
    for parameter in steps.values[0]:
        adam = HandAdamW()
        for t, gradients in enumerate(steps.gradients):
            now, gradient = steps.values[t][parameter], gradients[parameter]
            rate_t = rate(lr, t)
            if name == "sgd":
                expected = now - rate_t * gradient
            else:
                expected = adam.step(now, gradient, rate_t)
            if parameter in layers:
                mask = largest(expected)
                moved += np.abs(gradient[~largest(now)]).min() > 0
                flips += int((mask != largest(now)).sum())
                expected = expected - rate_t * decay * ~mask * expected
            np.testing.assert_allclose(
                steps.values[t + 1][parameter], expected, rtol=2e-5, atol=2e-7, err_msg=parameter
            )
    assert flips > 20
    assert moved > 40  # dropped weights learn


def test_a_gradient_is_that_of_the_plain_model_with_masked_weights(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    strategy = SRSTE()
    module = built(strategy, tokenizer)
    strategy.loss(BatchRun(module.masked, TOKENS, DRAW)).backward()
    plain = model.requires_grad_()
    for name in masked_layers(module.lm):
        weight = plain.get_parameter(f"{name}.weight")
        weight.data *= torch.from_numpy(largest(weight.detach().numpy()))
    logits = plain(input_ids=TOKENS).logits[:, :-1].flatten(0, 1)
    F.cross_entropy(logits, TOKENS[:, 1:].flatten()).backward()
    for name, parameter in plain.named_parameters():
        found = module.lm.get_parameter(name).grad
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_a_weight_under_two_names_decays_once(model: LlamaForCausalLM) -> None:
    first, second = (block.mlp.up_proj for block in model.model.layers)
    second.weight = first.weight
    strategy = SRSTE(decay=2.0)
    inject(model, select(model, Selection(TWO_FOUR))[0], Selection(TWO_FOUR), strategy.make_masker)
    before = first.weight.detach().clone()
    strategy.after_step(maskers(masked_layers(model)), 0.1)
    mask = TWO_FOUR.top(before.abs())
    after = first.weight.detach()
    assert torch.equal(after[mask], before[mask])
    torch.testing.assert_close(after[~mask], 0.8 * before[~mask])


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_prior_is_the_first_mask(make: type, tokenizer: PreTrainedTokenizerFast) -> None:
    expected = dict(hard_masks(built(SparseGPT(), tokenizer, make()).lm))
    dense = masked_layers(built(Magnitude(), tokenizer, make()).lm)
    module = built(SRSTE(prior=SparseGPT()), tokenizer, make())
    assert len(expected) >= 8
    for name, layer in masked_layers(module.lm).items():
        weight, old = layer.weight_OI.detach(), dense[name].weight_OI.detach()
        mask = layer.masker.hard_mask(layer.weight_OI)
        assert torch.equal(mask, expected[name]), name
        assert torch.equal(weight[mask], old[mask]), name
        assert not torch.equal(weight, old), name
        assert bool((weight.abs() <= old.abs()).all()), name
    kept = built(SRSTE(prior=SparseGPT(), refresh="never"), tokenizer, make())
    for name, layer in masked_layers(kept.lm).items():
        assert torch.equal(layer.masker.hard_mask(layer.weight_OI), expected[name]), name
        assert torch.equal(layer.weight_OI, dense[name].weight_OI), name


def test_asps_mask_stays_and_dropped_masters_do_too(
    tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    module = built(SRSTE(refresh="never"), tokenizer, optimizer=sgd(0.3))
    first = dict(hard_masks(module.lm))
    steps = train(module, text, tmp_path)
    changed = 0
    for name, mask in hard_masks(module.lm):
        assert torch.equal(mask, first[name])
        before, after = (steps.values[t][f"model.{name}.weight"] for t in (0, -1))
        assert np.array_equal(before[~mask.numpy()], after[~mask.numpy()])
        assert float((before != after)[mask.numpy()].mean()) > 0.9
        changed += int((largest(after) != mask.numpy()).sum())
    assert changed > 20  # magnitudes no longer say the same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": -1.0}, "decay=-1.0.*must not be negative"),
        ({"refresh": "often"}, "refresh='often'.*'every_step' or 'never'"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(SparsifyError, match=message):
        SRSTE(**options)  # type: ignore[arg-type]


def test_a_decay_of_more_than_the_weight_is_an_error() -> None:
    layer = layer_of(torch.randn(8, 16))
    SRSTE(decay=10.0).after_step({layer.masker: layer.weight_OI}, 0.1)
    assert torch.equal(layer.weight != 0, layer.masker.hard_mask(layer.weight))
    with pytest.raises(SparsifyError, match=r"decay=10 at a learning rate of 0\.2 .*decay 5 or"):
        SRSTE(decay=10.0).after_step({layer.masker: layer.weight_OI}, 0.2)


def test_a_bf16_base_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SparsifyError, match="bfloat16: SRSTE trains weights.*float32"):
        built(SRSTE(), tokenizer, tiny_llama().to(torch.bfloat16))


def test_a_prior_without_a_layer_is_an_error() -> None:
    strategy = SRSTE(prior="magnitude")
    masker = strategy.make_masker("layer", (8, 16), TWO_FOUR)
    with pytest.raises(SparsifyError, match="layer: the prior Magnitude holds no mask of it"):
        strategy.init_masker(masker, torch.ones(8, 16), None)
    odd = LayerResult(torch.ones(8, 16, dtype=torch.bool))
    with pytest.raises(SparsifyError, match="does not keep 2 weights of every 4"):
        strategy.init_masker(masker, torch.ones(8, 16), odd)
