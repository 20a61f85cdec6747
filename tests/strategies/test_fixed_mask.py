"""Training under a mask that stays: whole weights, and a low-rank addition.

Shapes: O out, I in, R rank.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsify import Draw, LayerResult, NMPattern, SparsifyError
from sparsify.export.folder import export
from sparsify.export.mask_file.file import write_masks
from sparsify.masking import noise
from sparsify.masking.inject import fold, hard_masks, inject
from sparsify.masking.layer import MaskedLinear, MaskScope, base_parameters, masked_layers
from sparsify.masking.select import Selection, select
from sparsify.models.hashes import hash_parameters
from sparsify.strategies.fixed_mask import AdaptedMasker, FixedMask
from sparsify.strategies.sparsegpt import SparseGPT
from tests.conftest import tiny_llama
from tests.strategies.training import HandAdamW, adamw, built, rate, train
from tests.tiny_models import tiny_gpt2

TWO_FOUR = NMPattern(2, 4)
TOKENS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
DRAW = Draw(0, 0, 0)


def adapted(
    rows: int = 8, columns: int = 16, rank: int = 3, dtype: torch.dtype = torch.float32
) -> tuple[MaskedLinear, Tensor]:
    """A layer with an addition that is not zero, and its mask."""
    generator = torch.Generator().manual_seed(0)
    strategy = FixedMask(prior="magnitude", lora_rank=rank, lora_alpha=6.0)
    linear = nn.Linear(columns, rows, bias=False)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    masker = strategy.make_masker("layer", (rows, columns), TWO_FOUR)
    mask = TWO_FOUR.unrank(torch.randint(6, (rows, columns // 4), generator=generator))
    strategy.init_masker(masker, weight, LayerResult(mask))
    masker.lora_B_OR.data.normal_(generator=generator)
    return MaskedLinear(linear, masker, MaskScope()), mask


@pytest.mark.parametrize("updated", [False, True])
def test_full_steps_are_adamws_on_kept_weights(
    updated: bool, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    prior = SparseGPT(update_weights=updated)
    module = built(FixedMask(prior=prior), tokenizer, optimizer=adamw(0.003))
    one_shot = built(SparseGPT(update_weights=updated), tokenizer)
    first = dict(hard_masks(module.lm))
    assert first.keys() == masked_layers(one_shot.lm).keys()
    changed = False
    for name, layer in masked_layers(one_shot.lm).items():
        weight = masked_layers(module.lm)[name].weight
        assert torch.equal(first[name], layer.masker.hard_mask(layer.weight_OI)), name
        assert torch.equal(weight, layer.weight), name
        changed |= not torch.equal(weight, tiny_llama().get_submodule(name).weight)
    assert changed == updated
    steps = train(module, text, tmp_path)
    for parameter in steps.gradients[0]:
        adam = HandAdamW()
        mask = first.get(parameter.removeprefix("model.").removesuffix(".weight"))
        for t, gradients in enumerate(steps.gradients):
            if mask is not None:
                assert not gradients[parameter][~mask.numpy()].any()
                assert gradients[parameter][mask.numpy()].all()
            expected = adam.step(steps.values[t][parameter], gradients[parameter], rate(0.003, t))
            np.testing.assert_allclose(
                steps.values[t + 1][parameter], expected, rtol=2e-5, atol=2e-7, err_msg=parameter
            )
    for name, mask in hard_masks(module.lm):
        assert torch.equal(mask, first[name]), name
    export(module.masked, tmp_path / "out", {})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, mask in first.items():
        shipped = plain.get_parameter(f"{name}.weight").detach()
        assert torch.equal(shipped, torch.where(mask, module.lm.get_submodule(name).weight, 0))


@pytest.mark.parametrize("masking", [DRAW, "hard"])
def test_the_addition_is_masked_with_the_weight(masking: Draw | str) -> None:
    layer, mask = adapted()
    weight = layer.weight.double().numpy()
    a = layer.masker.lora_A_RI.detach().double().numpy()
    b = layer.masker.lora_B_OR.detach().double().numpy()
    found = layer.masker(layer.weight_OI, masking)[0].detach()
    for row in range(8):
        for column in range(16):
            if mask[row, column]:
                added = sum(b[row, r] * a[r, column] for r in range(3)) * 6.0 / 3
                expected = weight[row, column] + added
                assert float(found[row, column]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert not bool(found[~mask].any() | found[~mask].signbit().any())
    assert torch.equal(layer.masker.hard_mask(layer.weight_OI), mask)


def test_its_gradients_are_those_of_the_formula() -> None:
    layer, mask = adapted()
    generator = torch.Generator().manual_seed(1)
    x, upstream = torch.randn(5, 16, generator=generator), torch.randn(5, 8, generator=generator)
    with layer.scope.use(DRAW):
        layer(x).backward(upstream)
    a, b = (
        p.detach().double().requires_grad_()
        for p in (layer.masker.lora_A_RI, layer.masker.lora_B_OR)
    )
    plain = mask * (layer.weight.double() + 2.0 * (b @ a))
    ((x.double() @ plain.T) * upstream.double()).sum().backward()
    for found, expected in ((layer.masker.lora_A_RI, a), (layer.masker.lora_B_OR, b)):
        torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-5, atol=1e-5)
    assert layer.weight.grad is None


def test_the_addition_starts_as_kaimings_and_as_nothing() -> None:
    strategy = FixedMask(lora_rank=64)
    strategy.seed = 3
    mask = TWO_FOUR.top(torch.rand(8, 512))
    made = []
    for name in ("layer", "layer", "other"):
        masker = strategy.make_masker(name, (8, 512), TWO_FOUR)
        torch.manual_seed(len(made))  # the global generator does not matter
        strategy.init_masker(masker, torch.ones(8, 512), LayerResult(mask))
        assert not bool(masker.lora_B_OR.any())
        made.append(masker.lora_A_RI.detach())
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    strategy.seed = 4
    masker = strategy.make_masker("layer", (8, 512), TWO_FOUR)
    strategy.init_masker(masker, torch.ones(8, 512), LayerResult(mask))
    assert not torch.equal(made[0], masker.lora_A_RI)
    bound = 1 / math.sqrt(512)
    a = made[0].double()
    n = a.numel()
    assert 0.999 * bound < float(a.abs().max()) < bound
    assert abs(float(a.mean())) < 4 * bound / math.sqrt(3 * n)
    variance = bound**2 / 3  # of a uniform number; that of its square is bound^4 * 4 / 45
    assert abs(float(a.square().mean()) - variance) < 4 * bound**2 * math.sqrt(4 / 45 / n)
    u = noise.uniform(noise.fold("lora_A", 3, "layer"), 64, 512)
    torch.testing.assert_close(made[0], ((2 * u - 1) * bound), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_what_is_trained_is_what_ships(
    make: type,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerFast,
    text: Path,
    tmp_path: Path,
) -> None:
    strategy = FixedMask(prior=SparseGPT(update_weights=True), lora_rank=4)
    models = [make(), make()]
    for parameter in (p for model in models for p in model.parameters()):
        parameter.data = parameter.data.to(dtype)
    module = built(strategy, tokenizer, models[0], optimizer=adamw(0.01))
    dense = dict(models[1].named_parameters())
    masks = dict(hard_masks(module.lm))
    before = module.window_losses(TOKENS)
    for name, layer in masked_layers(module.lm).items():  # it starts as the base under the mask
        assert torch.equal(layer.weight, dense[f"{name}.weight"]), name
        start = torch.where(masks[name], layer.weight_OI, 0)
        assert torch.equal(layer.masker.harden(layer.weight_OI), start), name
    taken = train(module, text, tmp_path)
    assert all(".masker.lora_" in name for name in taken.gradients[0])
    with module.masked.scope.use(DRAW), torch.no_grad():
        trained = module.lm(input_ids=TOKENS).logits
    assert not torch.equal(module.window_losses(TOKENS), before)
    assert hash_parameters(base_parameters(module.lm)) == module.masked.base.hash
    export(module.masked, tmp_path / "out", {})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=TOKENS).logits, trained)
    for name, mask in masks.items():
        layer = masked_layers(module.lm)[name]
        shipped = plain.get_parameter(f"{name}.weight").detach()
        shipped = shipped if make is tiny_llama else shipped.T
        assert torch.equal(masks[name], layer.masker.hard_mask(layer.weight_OI)), name
        assert not bool(shipped[~mask].any() | shipped[~mask].signbit().any()), name
        assert float((shipped != layer.weight_OI)[mask].float().mean()) > 0.5, name
    assert hash_parameters(base_parameters(module.lm)) == module.masked.base.hash
    fold(module.lm)
    for name, parameter in plain.named_parameters():
        assert torch.equal(module.lm.get_parameter(name), parameter), name


def test_the_base_that_an_addition_is_to_stays(tokenizer: PreTrainedTokenizerFast) -> None:
    prior = SparseGPT(update_weights=True)
    module = built(FixedMask(prior=prior, lora_rank=2), tokenizer)
    assert hash_parameters(base_parameters(module.lm)) == module.masked.base.hash
    full = built(FixedMask(prior=prior), tokenizer)
    assert hash_parameters(base_parameters(full.lm)) != full.masked.base.hash


def test_a_shared_weight_gets_its_addition_once(model: LlamaForCausalLM) -> None:
    first, second = (block.mlp.up_proj for block in model.model.layers)
    second.weight = first.weight
    strategy = FixedMask(lora_rank=2)
    inject(model, select(model, Selection(TWO_FOUR))[0], Selection(TWO_FOUR), strategy.make_masker)
    for layer in masked_layers(model).values():
        mask = TWO_FOUR.top(layer.weight_OI.abs())
        strategy.init_masker(layer.masker, layer.weight_OI, LayerResult(mask))
    layer = masked_layers(model)["model.layers.0.mlp.up_proj"]
    layer.masker.lora_B_OR.data.fill_(0.3)
    expected = layer.masker.harden(layer.weight_OI).detach().clone()
    fold(model)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, expected)


def test_gradients_do_not_need_the_base_in_fp32() -> None:
    layer, mask = adapted(dtype=torch.bfloat16)
    assert isinstance(layer.masker, AdaptedMasker)
    with layer.scope.use(DRAW):
        layer(torch.ones(2, 16, dtype=torch.bfloat16)).sum().backward()
    for parameter in (layer.masker.lora_A_RI, layer.masker.lora_B_OR):
        assert parameter.grad.dtype == torch.float32
        assert bool(parameter.grad.any())
    exact = layer.weight.float() + 2 * layer.masker.lora_B_OR @ layer.masker.lora_A_RI
    found = layer.masker.sample(layer.weight_OI, DRAW)[0]
    assert torch.equal(found, torch.where(mask, exact.bfloat16(), 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": None}, "prior=None; there must be a mask"),
        ({"lora_rank": -1}, "lora_rank=-1.*must not be negative"),
        ({"lora_alpha": 0.0}, "lora_alpha=0.0.*must be positive"),
        ({"prior": "nothing"}, "there is no strategy 'nothing'"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(SparsifyError, match=message):
        FixedMask(**options)  # type: ignore[arg-type]


def test_every_layer_needs_a_mask(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    masks = {
        name: TWO_FOUR.top(module.weight.abs())
        for name, module in tiny_llama().named_modules()
        if name.endswith("_proj") and name != "model.layers.1.mlp.up_proj"
    }
    write_masks(tmp_path / "m.nmask", masks, TWO_FOUR, "h")
    with pytest.raises(SparsifyError, match=r"1\.mlp\.up_proj: the prior .* holds no mask of it"):
        built(FixedMask(prior=str(tmp_path / "m.nmask")), tokenizer)


def test_full_training_of_a_bf16_base_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SparsifyError, match="bfloat16: FixedMask trains weights.*float32"):
        built(FixedMask(), tokenizer, tiny_llama().to(torch.bfloat16))
