"""Masks swapped over one model: each gives its exported folder's logits, none the dense ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from sparsify import NMPattern, SparsifyError
from sparsify.export.exchange import layers
from sparsify.export.folder import export
from sparsify.export.mask_file import read_masks, write_masks
from sparsify.masking.inject import hard_masks
from sparsify.masking.layer import masked_layers
from sparsify.serving.adapters import MaskAdapters
from tests.conftest import tiny_llama, word_tokenizer
from tests.export.mask_file.cases import random_mask
from tests.export.test_folder import MIXED, TOKENS, masked_module
from tests.tiny_models import FAMILIES, tied_llama

Q = "model.layers.0.self_attn.q_proj"
OPTIONS: dict[str, dict[str, Any]] = {
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
    "few": {"include": ["*.0.*"]},
}


def exports(family: str, folder: Path) -> dict[str, Path]:
    """Some exports of one base."""
    for name, options in OPTIONS.items():
        export(
            masked_module(FAMILIES[family](), word_tokenizer(), **options).masked, folder / name, {}
        )
    return {name: folder / name for name in OPTIONS}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.fixture
def adapters() -> MaskAdapters:
    """Two masks over the tiny model: one of all blocks, one of a layer."""
    found = MaskAdapters(tiny_llama())
    module = masked_module(tiny_llama(), word_tokenizer())
    found.add("all", dict(hard_masks(module.lm)))
    found.add("one", {Q: random_mask(32, 32, "1:4")})
    return found


@pytest.mark.parametrize("family", ["llama", "tied llama", "qwen2", "gpt2", "gemma3"])
def test_each_is_its_exported_folder_to_the_bit(family: str, tmp_path: Path) -> None:
    folders = exports(family, tmp_path)
    model = FAMILIES[family]()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    modules, dense = dict(model.named_modules()), logits(model)
    adapters = MaskAdapters(model)
    for name, folder in folders.items():
        adapters.add(name, folder)
    assert torch.equal(logits(model), dense)
    loaded = {name: AutoModelForCausalLM.from_pretrained(f) for name, f in folders.items()}
    for name in ["2:4", "few", "4:8", "2:4"]:
        adapters.use(name)
        assert torch.equal(logits(model), logits(loaded[name]))
        found, wanted = (
            m.generate(TOKENS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
            for m in (model, loaded[name])
        )
        assert torch.equal(found, wanted)
    adapters.use(None)
    assert torch.equal(logits(model), dense)
    adapters.use("2:4")
    adapters.detach()
    assert adapters.names == []
    assert adapters.active is None
    assert dict(model.named_modules()) == modules  # the very objects
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], p) for name, p in before.items())


def test_layers_that_a_mask_lacks_are_the_plain_ones(adapters: MaskAdapters) -> None:
    adapters.use("all")
    assert len(masked_layers(adapters.model)) == 14
    adapters.use("one")
    assert list(masked_layers(adapters.model)) == [Q]
    assert type(adapters.model.get_submodule("model.layers.1.self_attn.q_proj")) is torch.nn.Linear


def test_use_is_a_context_too(adapters: MaskAdapters) -> None:
    assert adapters.names == ["all", "one"]
    with adapters.use("all") as same:
        assert same is adapters
        assert adapters.active == "all"
        with adapters.use("one"):
            assert adapters.active == "one"
            with adapters.use(None):
                assert not masked_layers(adapters.model)
            assert adapters.active == "one"
        with pytest.raises(RuntimeError), adapters.use("one"):
            raise RuntimeError
        assert adapters.active == "all"
    assert adapters.active is None
    adapters.use("one")
    with adapters.use("all"):
        adapters.remove("one")
    assert adapters.active is None
    assert not masked_layers(adapters.model)


def test_a_removed_mask_is_gone(adapters: MaskAdapters) -> None:
    dense = logits(adapters.model)
    adapters.use("all")
    adapters.remove("one")
    assert adapters.active == "all"
    adapters.remove("all")
    assert adapters.names == []
    assert torch.equal(logits(adapters.model), dense)
    with pytest.raises(SparsifyError, match="there is no mask 'all'; there are none: add it"):
        adapters.use("all")


def test_fold_leaves_a_plain_model(adapters: MaskAdapters) -> None:
    with adapters.use("one"):
        masked = logits(adapters.model)
    adapters.use("all")
    model = adapters.fold("one")
    assert not masked_layers(model)
    assert torch.equal(logits(model), masked)
    dropped = model.get_submodule(Q).weight[~random_mask(32, 32, "1:4")]
    assert dropped.eq(0).all()
    assert not dropped.signbit().any()
    assert adapters.names == []


def test_a_folded_model_is_another_base(tmp_path: Path) -> None:
    folder = exports("llama", tmp_path)["2:4"]
    adapters = MaskAdapters(tiny_llama())
    adapters.add("a", folder)
    adapters.fold("a")
    with pytest.raises(SparsifyError, match="'a': made for a base model with hash"):
        adapters.add("a", folder)


class Sizes(TorchDispatchMode):
    """Records how many elements every result has that is not a view."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self.largest = max(self.largest, tensor.numel())
        return result


def test_a_mask_is_ranks_alone_and_a_swap_allocates_nothing(adapters: MaskAdapters) -> None:
    pointers = {name: p.data_ptr() for name, p in adapters.model.named_parameters()}
    with Sizes() as sizes:
        for name in ("all", "one", None, "all"):
            adapters.use(name)
    assert sizes.largest == 0
    with Sizes() as sizes:
        torch.zeros(5)
    assert sizes.largest == 5  # it does record
    found = dict(adapters.model.named_parameters())
    assert all(found[name].data_ptr() == pointer for name, pointer in pointers.items())
    held = sum(p.numel() * p.element_size() for name, p in found.items() if name not in pointers)
    weights = sum(layer.weight.numel() for layer in masked_layers(adapters.model).values())
    assert held == weights // 4


def test_masks_follow_the_model(adapters: MaskAdapters) -> None:
    adapters.use("all")
    adapters.model.to("meta")
    assert all(p.is_meta for p in adapters.model.parameters())
    adapters.use("one")
    assert {p.device.type for p in adapters.model.parameters()} == {"meta"}
    adapters.detach()
    assert {p.device.type for p in adapters.model.parameters()} == {"meta"}


def test_weights_that_are_loaded_meanwhile_stay(adapters: MaskAdapters) -> None:
    other = tiny_llama(1)
    adapters.use("all")
    adapters.model.load_state_dict(other.state_dict(), assign=True, strict=False)
    adapters.use(None)
    assert torch.equal(logits(adapters.model), logits(other))


def test_the_mode_of_training_is_kept(adapters: MaskAdapters) -> None:
    adapters.use("all")
    assert not any(m.training for m in adapters.model.modules())
    adapters.model.train()
    adapters.use("one")
    adapters.use(None)
    assert all(m.training for m in adapters.model.modules())


GOOD = random_mask(32, 32)


@pytest.mark.parametrize(
    ("name", "masks", "message"),
    [
        ("all", {Q: GOOD}, "'all' is there already"),
        ("x", {}, "'x' masks no layer"),
        ("x", {Q: GOOD, "q": GOOD}, "'q' is no linear layer of this LlamaForCausalLM"),
        ("x", {Q: GOOD, "model.norm": GOOD}, "'model.norm' is no linear layer"),
        ("x", {Q: random_mask(32, 64)}, rf"{Q}: its mask is torch.bool \(32, 64\) and the"),
        ("x", {Q: GOOD.float()}, f"{Q}: its mask is torch.float32"),
        ("x", {Q: torch.ones(32, 32, dtype=torch.bool)}, f"{Q}: a mask .* kept is N:M for no M"),
        ("x", {Q: [1]}, rf"{Q}: its mask is a list; give a bool tensor \(32, 32\)"),
        ("x", "nothing.safetensors", "not a readable mask file"),
        ("x", None, "'x': None are no masks; give bool tensors by layer name, or the path of a "),
    ],
)
def test_what_does_not_fit_changes_nothing(
    name: str, masks: Any, message: str, adapters: MaskAdapters
) -> None:
    adapters.use("all")
    before = logits(adapters.model)
    with pytest.raises(SparsifyError, match=message):
        adapters.add(name, masks)
    with pytest.raises(SparsifyError, match="there is no mask 'x'; there are 'all', 'one': add it"):
        adapters.use("x")
    assert adapters.names == ["all", "one"]
    assert adapters.active == "all"
    assert torch.equal(logits(adapters.model), before)


def test_masks_of_another_base_are_refused(tmp_path: Path) -> None:
    folder = exports("llama", tmp_path)["2:4"]
    adapters = MaskAdapters(tiny_llama(1))
    with pytest.raises(SparsifyError, match="'x': made for a base model with hash"):
        adapters.add("x", folder)
    assert adapters.names == []

    class Stating(dict[str, Tensor]):
        base_hash = "abc"

    with pytest.raises(SparsifyError, match="hash abc"):
        adapters.add("x", Stating({Q: random_mask(32, 32)}))


def test_a_base_is_known_in_the_type_of_the_masks(tmp_path: Path) -> None:
    # Made in this type: .bfloat16() would round the rotary frequencies too, as no loader does.
    base = LlamaForCausalLM._from_config(tiny_llama().config, dtype=torch.bfloat16)
    base.load_state_dict(tiny_llama().bfloat16().state_dict())
    module = masked_module(base, word_tokenizer())
    export(module.masked, tmp_path / "out", {})
    for model in (tiny_llama().bfloat16(), tiny_llama().bfloat16().float()):
        adapters = MaskAdapters(model)
        adapters.add("x", tmp_path / "out")
        adapters.use("x")
        with pytest.raises(SparsifyError, match="masked layers already"):
            MaskAdapters(model)


def test_the_base_is_hashed_once_and_only_if_masks_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, calls, real = exports("llama", tmp_path), [], layers.hash_parameters

    def counted(*args: Any) -> str:
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(layers, "hash_parameters", counted)
    adapters = MaskAdapters(tiny_llama())
    adapters.add("plain", {Q: random_mask(32, 32)})
    assert calls == []
    for name, folder in folders.items():
        adapters.add(name, folder)
    assert len(calls) == 1


@torch.no_grad()
def test_weights_that_changed_are_another_base(tmp_path: Path) -> None:
    folder, adapters = exports("llama", tmp_path)["2:4"], MaskAdapters(tiny_llama())
    adapters.add("first", folder)
    weight = adapters.model.get_submodule(Q).weight
    former = weight.clone()
    weight.add_(1)
    with pytest.raises(SparsifyError, match="'x': made for a base model with hash"):
        adapters.add("x", folder)
    weight.copy_(former)
    adapters.add("second", folder)
    weight.data = former + 1  # as .to() does
    with pytest.raises(SparsifyError, match="'x': made for a base model with hash"):
        adapters.add("x", folder)


def test_masks_are_added_to_a_model_of_inference_mode(tmp_path: Path) -> None:
    folder = exports("llama", tmp_path)["2:4"]
    with torch.inference_mode():
        model = tiny_llama()
        adapters = MaskAdapters(model)
        assert all(p.is_inference() for p in model.parameters())
        adapters.add("x", folder)
    assert adapters.names == ["x"]


def test_several_patterns_in_one_mask(tmp_path: Path) -> None:
    export(
        masked_module(tiny_llama(), word_tokenizer(), overrides=MIXED).masked, tmp_path / "out", {}
    )
    adapters = MaskAdapters(tiny_llama())
    adapters.add("x", tmp_path / "out")
    adapters.use("x")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(adapters.model), logits(loaded))


def test_masks_of_weights_that_a_strategy_changed_are_refused(tmp_path: Path) -> None:
    masks = {"model.layers.0.mlp.up_proj": random_mask(64, 32)}
    lineage = {"strategy": {"weights": "updated"}}
    write_masks(tmp_path / "m.nmask", masks, NMPattern(2, 4), "", lineage)
    adapters = MaskAdapters(tiny_llama())
    with pytest.raises(SparsifyError, match=r"weights that their strategy changed \(updated\)"):
        adapters.add("m", tmp_path / "m.nmask")
    adapters.add("m", dict(read_masks(tmp_path / "m.nmask")))
    assert adapters.names == ["m"]


def test_a_weight_that_is_tied_to_the_embedding_is_refused() -> None:
    adapters = MaskAdapters(tied_llama())
    with pytest.raises(SparsifyError, match="lm_head: its weight is tied to model.embed_tokens"):
        adapters.add("m", {"lm_head": random_mask(64, 32)})
    assert adapters.names == []
