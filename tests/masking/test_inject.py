"""Which layers are masked, and what the model is before, under and after its masks."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsify import FixedMasker, Masker, NMPattern, SparsifyError
from sparsify.masking.inject import fold, hard_masks, inject
from sparsify.masking.layer import MaskScope, layer_patterns, masked_layers
from sparsify.masking.overrides import Overrides
from sparsify.masking.select import Selection, decoder_blocks, select
from tests.tiny_models import FAMILIES, tied_llama, tiny_falcon, tiny_gpt2, tiny_qwen2

TWO_FOUR = NMPattern(2, 4)
TOKENS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
LAYERS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LAYERS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def mask_by_magnitude(model: PreTrainedModel, **globs: list[str]) -> MaskScope:
    """Mask the selected layers and keep their largest weights."""
    layers, _ = select(model, Selection(TWO_FOUR, **globs))
    scope = inject(model, layers, Selection(TWO_FOUR), FixedMasker)
    for layer in masked_layers(model).values():
        layer.masker.set_mask(TWO_FOUR.top(layer.weight_OI.detach().abs()))
    return scope


def test_the_default_is_every_linear_layer_of_the_blocks(model: PreTrainedModel) -> None:
    chosen, dense = select(model, Selection(TWO_FOUR))
    assert list(chosen) == [f"model.layers.{i}.{layer}" for i in (0, 1) for layer in LAYERS]
    assert dense == {
        "lm_head": "output head",
        "model.embed_tokens": "Embedding is not a plain linear layer",
    }
    assert list(decoder_blocks(model)) == ["model.layers.0", "model.layers.1"]


def test_gpt2_layers_are_chosen_and_its_tables_named() -> None:
    chosen, dense = select(tiny_gpt2(), Selection(TWO_FOUR))
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert list(chosen) == [f"transformer.h.{i}.{name}" for i in (0, 1) for name in names]
    assert set(dense) == {"lm_head", "transformer.wte", "transformer.wpe"}


def test_include_and_exclude_are_globs_on_names(model: PreTrainedModel) -> None:
    chosen, dense = select(
        model, Selection(TWO_FOUR, include=["*.0.mlp.*", "*q_proj"], exclude=["*down*"])
    )
    assert set(chosen) == {
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    }
    assert dense["model.layers.0.mlp.down_proj"] == "excluded by '*down*'"
    assert dense["model.layers.1.mlp.up_proj"] == "not in include"
    assert dense["lm_head"] == "not in include"
    assert len(chosen) + len(dense) == 16


def test_an_untied_head_is_masked_if_it_is_named(model: PreTrainedModel) -> None:
    assert set(select(model, Selection(TWO_FOUR, include=["lm_head"]))[0]) == {"lm_head"}
    assert len(select(model, Selection(TWO_FOUR, include=["*"]))[0]) == 15


@pytest.mark.parametrize("globs", [{"include": ["*w1*"]}, {"exclude": ["*w1*"]}])
def test_a_glob_that_matches_nothing_lists_what_there_is(
    model: PreTrainedModel, globs: dict[str, list[str]]
) -> None:
    with pytest.raises(SparsifyError, match=r"'\*w1\*' matches no linear layer") as error:
        select(model, Selection(TWO_FOUR, **globs))
    for layer in LAYERS:
        assert f"model.layers.*.{layer}" in str(error.value)
    assert "lm_head" in str(error.value)


def test_nothing_left_to_mask_is_an_error(model: PreTrainedModel) -> None:
    with pytest.raises(SparsifyError, match="no layer is left to mask; there are model.layers"):
        select(model, Selection(TWO_FOUR, exclude=["*"]))


def test_inputs_that_do_not_divide_are_named_with_the_fix(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.down_proj = nn.Linear(30, 32)
    fix = r"leave it dense with --model\.exclude '\*down_proj'"
    with pytest.raises(
        SparsifyError,
        match=rf"layers\.1\.mlp\.down_proj: in_features=30.*\(2, 3, 5, 6, 10, 15\), or {fix}",
    ):
        select(model, Selection(TWO_FOUR))
    assert len(select(model, Selection(TWO_FOUR, exclude=["*down_proj"]))[0]) == 12
    assert len(select(model, Selection(NMPattern(1, 2)))[0]) == 14  # 30 divides by 2


def test_conv1d_counts_its_inputs_not_its_outputs() -> None:
    gpt2 = tiny_gpt2()
    gpt2.transformer.h[0].mlp.c_fc = Conv1D(128, 30)
    with pytest.raises(SparsifyError, match="in_features=30 is not a multiple"):
        select(gpt2, Selection(TWO_FOUR))
    gpt2.transformer.h[0].mlp.c_fc = Conv1D(30, 32)
    assert "transformer.h.0.mlp.c_fc" in select(gpt2, Selection(TWO_FOUR))[0]


@pytest.mark.parametrize("make", [tied_llama, tiny_gpt2])
@pytest.mark.parametrize("include", ["lm_head", "*"])
def test_a_tied_head_is_refused(make: Callable[[], PreTrainedModel], include: str) -> None:
    with pytest.raises(SparsifyError, match=r"lm_head: its weight is tied to .*(embed_tokens|wte)"):
        select(make(), Selection(TWO_FOUR, include=[include]))
    select(make(), Selection())  # by default it stays dense


def test_layers_that_share_a_weight_share_the_masker(model: PreTrainedModel) -> None:
    first, second = (block.mlp.up_proj for block in model.model.layers)
    second.weight = first.weight
    made = []

    def make(name: str, shape: tuple[int, int], pattern: NMPattern) -> Masker:
        made.append(name)
        return FixedMasker(name, shape, pattern)

    inject(model, select(model, Selection(TWO_FOUR))[0], Selection(TWO_FOUR), make)
    layers = masked_layers(model)
    a, b = (layers[f"model.layers.{i}.mlp.up_proj"] for i in (0, 1))
    assert a.masker is b.masker
    assert a.weight is b.weight
    assert len(made) == len(set(made)) == 13
    masks = dict(hard_masks(model))
    assert torch.equal(masks["model.layers.0.mlp.up_proj"], masks["model.layers.1.mlp.up_proj"])
    fold(model)
    up = [block.mlp.up_proj for block in model.model.layers]
    assert up[0].weight is up[1].weight


def test_overrides_by_glob_the_last_wins(model: PreTrainedModel) -> None:
    overrides = Overrides.parse(
        {"*.mlp.*": "1:4", "*.down_proj": "4:8", "*.1.*": "dense", "*.1.mlp.up_proj": "2:8"}
    )
    layers, dense = select(model, Selection(TWO_FOUR, exclude=["*k_proj"], overrides=overrides))
    inject(model, layers, Selection(TWO_FOUR, overrides=overrides), FixedMasker)
    found = {name: str(pattern) for name, pattern in layer_patterns(model).items()}
    assert found == {
        **{f"model.layers.0.self_attn.{kind}_proj": "2:4" for kind in "qvo"},
        "model.layers.0.mlp.gate_proj": "1:4",
        "model.layers.0.mlp.up_proj": "1:4",
        "model.layers.0.mlp.down_proj": "4:8",
        "model.layers.1.mlp.up_proj": "2:8",
    }
    assert dense["model.layers.1.mlp.down_proj"] == "dense by override '*.1.*'"
    assert dense["model.layers.1.self_attn.k_proj"] == "excluded by '*k_proj'"
    assert len(found) + len(dense) == 16


@pytest.mark.parametrize("glob", ["*w1*", "*k_proj", "lm_head"])
def test_an_override_of_no_masked_layer_lists_what_there_is(
    model: PreTrainedModel, glob: str
) -> None:
    overrides = Overrides.parse({"*q_proj": "1:4", glob: "dense"})
    with pytest.raises(SparsifyError, match="matches no layer that would be masked") as error:
        select(model, Selection(TWO_FOUR, exclude=["*k_proj"], overrides=overrides))
    assert repr(glob) in str(error.value)
    assert "model.layers.*.self_attn.q_proj, model.layers.*.self_attn.v_proj" in str(error.value)
    assert "model.layers.*.self_attn.k_proj" not in str(error.value)


@pytest.mark.parametrize("pattern", ["4:2", "x", "Dense", ""])
def test_a_bad_pattern_is_named_with_its_glob(pattern: str) -> None:
    with pytest.raises(SparsifyError, match=rf"overrides '\*q_proj'.*'{pattern}'.*or 'dense'"):
        Overrides.parse({"*": "2:4", "*q_proj": pattern})


def test_inputs_divide_by_the_layers_own_pattern(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.down_proj = nn.Linear(36, 32)
    select(model, Selection(TWO_FOUR))
    for overrides, m in (({"*down_proj": "4:8"}, 8), ({"*.1.*": "3:5"}, 5)):
        with pytest.raises(
            SparsifyError,
            match=f"in_features=.* is not a multiple of m={m}; take an M that divides it",
        ):
            select(model, Selection(TWO_FOUR, overrides=Overrides.parse(overrides)))
    eight = NMPattern(4, 8)
    for overrides in ({"*.1.*down_proj": "2:4"}, {"*.1.*down_proj": "dense"}):
        select(model, Selection(eight, overrides=Overrides.parse(overrides)))


def test_all_dense_by_override_is_an_error(model: PreTrainedModel) -> None:
    with pytest.raises(SparsifyError, match="no layer is left to mask"):
        select(model, Selection(TWO_FOUR, overrides=Overrides.parse({"*": "dense"})))


@pytest.mark.parametrize("pattern", ["1:4", "dense"])
def test_layers_that_share_a_weight_have_one_pattern(model: PreTrainedModel, pattern: str) -> None:
    first, second = (block.mlp.up_proj for block in model.model.layers)
    second.weight = first.weight
    with pytest.raises(
        SparsifyError,
        match=rf"layers\.1\.mlp\.up_proj is {pattern} and model\.layers\.0\.mlp\.up_proj, whose "
        r"weight it shares, is 2:4; .*--model\.overrides",
    ):
        select(model, Selection(TWO_FOUR, overrides=Overrides.parse({"*.1.mlp.up_proj": pattern})))
    chosen, _ = select(
        model, Selection(TWO_FOUR, overrides=Overrides.parse({"*.mlp.up_proj": pattern}))
    )
    assert len(chosen) == (14 if pattern == "1:4" else 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_masking_keeps_parameters_and_keys(family: str) -> None:
    model = FAMILIES[family]()
    before = dict(model.named_parameters())
    keys = set(model.state_dict())
    dense = model(input_ids=TOKENS).logits
    scope = mask_by_magnitude(model)
    after = dict(model.named_parameters())
    assert {name for name in after if ".masker." not in name} == set(before)
    assert all(after[name] is parameter for name, parameter in before.items())
    assert {key for key in model.state_dict() if ".masker." not in key} == keys
    assert len([key for key in model.state_dict() if ".masker." in key]) == len(
        masked_layers(model)
    )
    with scope.use("dense"):
        assert torch.allclose(model(input_ids=TOKENS).logits, dense, atol=1e-5)
    assert float((model(input_ids=TOKENS).logits - dense).detach().abs().max()) > 0.05


def test_a_subclass_that_computes_the_same_is_masked_to_the_bit() -> None:
    model = tiny_falcon()
    kinds = {name: type(module) for name, module in model.named_modules()}
    dense = model(input_ids=TOKENS).logits
    scope = mask_by_magnitude(model)
    assert len(masked_layers(model)) == 8
    with scope.use("dense"):
        assert torch.equal(model(input_ids=TOKENS).logits, dense)
    under_masks = model(input_ids=TOKENS).logits
    assert not torch.allclose(under_masks, dense, atol=0.05)
    fold(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert torch.equal(model(input_ids=TOKENS).logits, under_masks)


class Scaled(nn.Linear):
    """Computes something else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Counting(nn.Linear):
    """Keeps more than a weight and a bias."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.calls = 0


@pytest.mark.parametrize("kind", [Scaled, Counting])
def test_other_subclasses_stay_dense_and_are_named(
    kind: type[nn.Linear], model: PreTrainedModel
) -> None:
    for block in model.model.layers:
        block.mlp.up_proj = kind(32, 64)
    chosen, dense = select(model, Selection(TWO_FOUR))
    assert len(chosen) == 12
    assert f"{kind.__name__} is a subclass of Linear" in dense["model.layers.0.mlp.up_proj"]
    for globs in ({"include": ["*up_proj"]}, {"exclude": ["*"]}):
        with pytest.raises(SparsifyError, match=rf"\*\.mlp\.up_proj \({kind.__name__}\)"):
            select(model, Selection(TWO_FOUR, **globs))


@pytest.mark.parametrize("family", FAMILIES)
def test_fold_gives_the_plain_model_with_exact_zeros(family: str) -> None:
    model = FAMILIES[family]()
    classes = {name: type(module) for name, module in model.named_modules()}
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    mask_by_magnitude(model)
    masks = dict(hard_masks(model))
    under_masks = model(input_ids=TOKENS).logits
    fold(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    if family == "gpt2":  # Conv1D is another matmul than F.linear
        torch.testing.assert_close(model(input_ids=TOKENS).logits, under_masks, atol=1e-5, rtol=0)
    else:
        assert torch.equal(model(input_ids=TOKENS).logits, under_masks)
    assert dict(model.named_parameters()).keys() == values.keys()
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        if layer not in masks:
            assert torch.equal(parameter, values[name]), name  # biases, norms, embeddings
            continue
        conv = isinstance(model.get_submodule(layer), Conv1D)
        weight, old = (v.detach().T if conv else v.detach() for v in (parameter, values[name]))
        assert torch.equal(weight[masks[layer]], old[masks[layer]]), name
        dropped = weight[~masks[layer]]
        assert not bool(dropped.any()), name
        assert not bool(dropped.signbit().any()), name
        assert TWO_FOUR.holds(weight), name


def test_biases_survive_masking() -> None:
    model = tiny_qwen2()
    biases = {name: p.clone() for name, p in model.named_parameters() if name.endswith("bias")}
    assert len(biases) == 6
    mask_by_magnitude(model)
    with_biases = model(input_ids=TOKENS).logits
    for name in biases:
        assert float(biases[name].detach().abs().max()) > 0.1
        model.get_parameter(name).data.zero_()
    assert not torch.allclose(model(input_ids=TOKENS).logits, with_biases, atol=1e-3)


def test_a_model_without_blocks_is_told_to_name_its_layers() -> None:
    with pytest.raises(SparsifyError, match="holds no list of decoder blocks"):
        decoder_blocks(nn.Sequential(nn.Linear(4, 4)))
