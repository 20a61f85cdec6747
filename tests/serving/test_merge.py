"""Merging adapters under masks, against a slow loop and against PEFT; and what is refused.

Shapes: O out, I in, R rank.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparsify import SparsifyError
from sparsify.cli.main import main
from sparsify.export.card import CARD, is_of_others
from sparsify.export.folder import export
from sparsify.export.manifest import MANIFEST, read_manifest
from sparsify.export.mask_file.file import read_masks
from sparsify.models.stored_weights import INDEX, SINGLE, StoredWeights
from sparsify.serving.adapters import MaskAdapters
from sparsify.serving.lora import CONFIG, WEIGHTS
from sparsify.serving.merge import merge
from sparsify.serving.verify import verify
from tests.conftest import tiny_llama, word_tokenizer
from tests.export.test_folder import TOKENS, masked_module
from tests.tiny_models import tied_llama, tiny_gpt2, tiny_mixtral

UP, Q = "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"
SHAPES = {UP: (64, 32), Q: (32, 32), "lm_head": (64, 32)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with magnitude masks; nothing writes to it."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    record = {"scores": {"overall": 1.0}, "protocol": {"split": "test"}}
    export(masked_module(tiny_llama(), word_tokenizer()).masked, folder, record)
    return folder


def adapter(place: Path, base: Path, *layers: str, rank: int = 4, **settings: Any) -> Path:
    """A random adapter of the Llama, in the files that PEFT writes."""
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name in layers or (UP, Q):
        rows, columns = SHAPES[name]
        own = settings.get("rank_pattern", {}).get(name.split(".")[-1], rank)
        for side, shape in {"A": (own, columns), "B": (rows, own)}.items():
            key = f"base_model.model.{name}.lora_{side}.weight"
            tensors[key] = torch.randn(shape, generator=draw)
    place.mkdir()
    save_file(tensors, place / WEIGHTS)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none"}
    config |= {"base_model_name_or_path": str(base), "target_modules": ["up_proj"], **settings}
    (place / CONFIG).write_text(json.dumps(config))
    return place


def slow(weight_OI: Tensor, mask_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """One weight after the other."""
    merged_OI = weight_OI.double().clone()
    for o, row in enumerate(mask_OI.tolist()):
        for i, kept in enumerate(row):
            if kept:
                merged_OI[o, i] += scale * float(b_OR[o].double() @ a_RI[:, i].double())
    return merged_OI


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, {UP: 2.0, Q: 2.0}),
        ({"use_rslora": True}, {UP: 4.0, Q: 4.0}),
        (
            {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 6}},
            {UP: 1.5, Q: 4.0},
        ),
    ],
)
def test_it_adds_the_product_where_weights_are_kept(
    settings: Any, scales: dict[str, float], exported: Path, tmp_path: Path
) -> None:
    lora = adapter(tmp_path / "lora", exported, **settings)
    report = merge(exported, lora, tmp_path / "out")
    before, after, own = (
        load_file(file) for file in (exported / SINGLE, tmp_path / "out" / SINGLE, lora / WEIGHTS)
    )
    masks = read_masks(exported)
    for name, scale in scales.items():
        a_RI, b_OR = (own[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        wanted = slow(before[f"{name}.weight"], masks[name], a_RI, b_OR, scale)
        torch.testing.assert_close(after[f"{name}.weight"].double(), wanted, rtol=1e-5, atol=1e-5)
        product = scale * b_OR @ a_RI
        lost = 1 - float(product[masks[name]].square().sum() / product.square().sum())
        row = report[re.sub(r"\.\d\.", ".*.", name)]
        assert math.isclose(row.taken, lost, abs_tol=1e-6)
    assert 0.4 < report.whole.taken < 0.6
    others = before.keys() - {f"{name}.weight" for name in scales}
    assert all(torch.equal(before[name], after[name]) for name in others)


def test_what_it_writes_is_an_export(exported: Path, tmp_path: Path) -> None:
    merge(exported, adapter(tmp_path / "lora", exported), tmp_path / "out")
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    report = verify(tmp_path / "out", str(base))
    assert report.ok, report.problems
    assert sum("strategy changed" in note for note in report.notes) <= 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    former = AutoModelForCausalLM.from_pretrained(exported)
    assert not torch.equal(model(TOKENS).logits, former(TOKENS).logits)
    manifest = read_manifest(tmp_path / "out")
    assert manifest["strategy"]["weights"] == "adapted"
    [merged] = manifest["merged"]
    assert merged["adapter"] == "lora"
    assert merged["export"]["scores"] == {"overall": 1.0}
    assert "scores" not in manifest
    # Its masks over the dense weights do not make this model.
    assert read_masks(tmp_path / "out").digest == read_masks(exported).digest
    with pytest.raises(SparsifyError, match="their strategy changed .adapted."):
        MaskAdapters(tiny_llama()).add("merged", tmp_path / "out")
    # And another adapter can be merged into it.
    second = adapter(tmp_path / "second", tmp_path / "out", "lm_head")
    report_2 = merge(tmp_path / "out", second, tmp_path / "out2")
    assert report_2.whole.taken == 0
    assert read_manifest(tmp_path / "out2")["strategy"]["weights"] == "trained"
    assert len(read_manifest(tmp_path / "out2")["merged"]) == 2
    assert verify(tmp_path / "out2", str(base)).ok


def test_its_card_is_of_the_merged_model(exported: Path, tmp_path: Path) -> None:
    """Not of the export that it replaces, and not of the one that was merged."""
    lora, out = adapter(tmp_path / "lora", exported), tmp_path / "out"
    merge(exported, lora, out)
    text = (out / CARD).read_text()
    assert not is_of_others(out / CARD)
    assert "the kept weights of these layers were trained" in text
    former = masked_module(tiny_llama(), word_tokenizer(), pattern="1:4").masked
    export(former, tmp_path / "former", {})
    merge(exported, lora, tmp_path / "former", overwrite=True)
    assert (tmp_path / "former" / CARD).read_text() == text
    (out / CARD).write_text("# mine\n")
    merge(exported, lora, out, overwrite=True)
    assert (out / CARD).read_text() == "# mine\n"


def test_shards_and_bfloat16(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    out = tmp_path / "sharded"
    export(masked_module(model, word_tokenizer()).masked, out, {})
    plain = AutoModelForCausalLM.from_pretrained(out)
    (out / SINGLE).unlink()
    plain.save_pretrained(out, max_shard_size="10KB")
    manifest = read_manifest(out)
    del manifest["files"]  # as of version 0.1.0
    (out / MANIFEST).write_text(json.dumps(manifest))
    lora = adapter(tmp_path / "lora", out)
    merge(out, lora, tmp_path / "merged")
    assert (tmp_path / "merged" / INDEX).is_file()
    before, after = StoredWeights(out).get(f"{UP}.weight"), StoredWeights(tmp_path / "merged")
    own = load_file(lora / WEIGHTS)
    a_RI, b_OR = (own[f"base_model.model.{UP}.lora_{side}.weight"] for side in "AB")
    wanted = slow(before, read_masks(out)[UP], a_RI, b_OR, 2.0)
    merged = after.get(f"{UP}.weight")
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged.double(), wanted, rtol=0.005, atol=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_is_what_peft_merges_but_for_the_zeros(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    make, targets, ranks, alphas = {
        "llama": (
            tiny_llama,
            ["up_proj", "q_proj", "down_proj"],
            {"q_proj": 2},
            {r"layers\.0\..*up_proj": 3},
        ),
        "gpt2": (tiny_gpt2, ["c_attn", "c_proj"], {"attn.c_proj": 2}, {}),
    }[family]
    module = masked_module(make(), word_tokenizer(), exclude=[f"*.{targets[-1]}"])
    export(module.masked, tmp_path / "base", {})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=targets,
        fan_in_fan_out=family == "gpt2",
        rank_pattern=ranks,
        alpha_pattern=alphas,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    tuned = peft.get_peft_model(model, config)
    tuned.save_pretrained(tmp_path / "lora")
    whole = dict(tuned.merge_and_unload().named_parameters())
    merge(tmp_path / "base", tmp_path / "lora", tmp_path / "out")
    former = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    layers = read_manifest(tmp_path / "base")["layers"]
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters():
        masked = name.removesuffix(".weight") in layers
        zeros = former.get_parameter(name) == 0 if masked else torch.zeros_like(weight).bool()
        torch.testing.assert_close(weight, torch.where(zeros, 0, whole[name]))


def test_conv1d(tmp_path: Path) -> None:
    """Stored as [in, out], square ones too."""
    export(masked_module(tiny_gpt2(), word_tokenizer()).masked, tmp_path / "base", {})
    name, draw = "transformer.h.0.attn.c_proj", torch.Generator().manual_seed(0)
    a_RI, b_OR = torch.randn(4, 32, generator=draw), torch.randn(32, 4, generator=draw)
    lora = adapter(tmp_path / "lora", tmp_path / "base", fan_in_fan_out=True)
    key = f"base_model.model.{name}.lora_"
    save_file({f"{key}A.weight": a_RI, f"{key}B.weight": b_OR}, lora / WEIGHTS)
    merge(tmp_path / "base", lora, tmp_path / "out")
    before, after = (load_file(tmp_path / f / SINGLE)[f"{name}.weight"] for f in ("base", "out"))
    wanted = slow(before.T, read_masks(tmp_path / "base")[name], a_RI, b_OR, 2.0)
    torch.testing.assert_close(after.T.double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_command(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["merge", str(exported), str(adapter(tmp_path / "lora", exported))]
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "name the folder to write with --output FOLDER" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--output", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert re.search(r"model.layers.\*.mlp.up_proj +1 +\d+", shown)
    assert re.search(r"all +2 .* \d\d\.\d%", shown)
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--output", str(tmp_path / "out")])
    assert "holds an earlier export" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--output", str(tmp_path / "out"), "--overwrite", "--format", "json"])
    assert json.loads(capsys.readouterr().out)["all"]["layers"] == 2


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"bias": "lora_only"}, "bias is 'lora_only'; biases are not merged"),
        ({"use_dora": True}, "use_dora is True; .* train without it"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is .* train without it"),
        ({"target_parameters": ["experts.w1"]}, "target_parameters is .* train without it"),
        ({"future": {"x": 1}}, "future is .* does not know what that adds"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'; it changes the base"),
        ({"r": 8}, "has rank 4, and adapter_config.json says 8"),
        ({"r": None}, "r is None; it must be a positive number"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern is .* save the adapter again"),
        ({"alpha_pattern": {"q": -2}}, "it must give a positive number to each name"),
        ({"base_model_name_or_path": "other/model"}, "trained on 'other/model', which is not"),
    ],
)
def test_adapters_of_other_kinds_are_refused(
    settings: Any, message: str, exported: Path, tmp_path: Path
) -> None:
    lora = adapter(tmp_path / "lora", exported, **settings)
    with pytest.raises(SparsifyError, match=message):
        merge(exported, lora, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("up_proj", "w1"): tensor for name, tensor in tensors.items()}


def _embedding(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 64)}


def _half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "lora_B" not in name}


def _narrow(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t[:, :16].clone() if "lora_A" in n else t for n, t in tensors.items()}


def _not_finite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor / 0 for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_rename, "the adapter changes model.layers.1.mlp.w1, which is no linear layer"),
        (_embedding, "lora_embedding_A, which is no LoRA matrix of a linear layer"),
        (_half, "there is only lora_A"),
        (_narrow, r"the adapter adds \(\d+, 16\) to a weight of \(\d+, 32\)"),
        (_not_finite, "holds values that are not finite"),
    ],
)
def test_other_tensors_are_refused(
    damage: Any, message: str, exported: Path, tmp_path: Path
) -> None:
    lora = adapter(tmp_path / "lora", exported)
    save_file(damage(load_file(lora / WEIGHTS)), lora / WEIGHTS)
    with pytest.raises(SparsifyError, match=message):
        merge(exported, lora, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_name_of_the_base_can_be_given(exported: Path, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", Path("me/sparse"))
    with pytest.raises(SparsifyError, match="--base 'you/sparse': the adapter says .* 'me/sparse'"):
        merge(exported, lora, tmp_path / "out", base="you/sparse")
    merge(exported, lora, tmp_path / "out", base="me/sparse")
    moved = adapter(tmp_path / "moved", tmp_path / "copy")
    export(masked_module(tiny_llama(), word_tokenizer()).masked, tmp_path / "copy", {})
    merge(exported, moved, tmp_path / "out", overwrite=True)  # the same weights elsewhere
    other = adapter(tmp_path / "other", tmp_path / "seed")
    export(masked_module(tiny_llama(seed=1), word_tokenizer()).masked, tmp_path / "seed", {})
    with pytest.raises(SparsifyError, match="seed', which is not"):
        merge(exported, other, tmp_path / "more")


def test_weights_that_are_shared_or_changed_are_refused(tmp_path: Path) -> None:
    export(masked_module(tied_llama(), word_tokenizer()).masked, tmp_path / "tied", {})
    lora = adapter(tmp_path / "head", tmp_path / "tied", "lm_head")
    with pytest.raises(
        SparsifyError, match="lm_head: its weight, model.embed_tokens.weight, is th"
    ):
        merge(tmp_path / "tied", lora, tmp_path / "out")
    lora = adapter(tmp_path / "lora", tmp_path / "tied")
    tensors = load_file(tmp_path / "tied" / SINGLE)
    tensors["model.norm.weight"] += 1
    save_file(tensors, tmp_path / "tied" / SINGLE, {"format": "pt"})
    with pytest.raises(SparsifyError, match=r"not written: .*model.norm.weight.*SHA-256 differs"):
        merge(tmp_path / "tied", lora, tmp_path / "out")
    tensors[f"{UP}.weight"] += 1
    save_file(tensors, tmp_path / "tied" / SINGLE, {"format": "pt"})
    with pytest.raises(SparsifyError, match="up_proj.weight was changed since the export"):
        merge(tmp_path / "tied", lora, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_are_refused(tmp_path: Path) -> None:
    export(masked_module(tiny_mixtral(), word_tokenizer()).masked, tmp_path / "base", {})
    lora = adapter(tmp_path / "lora", tmp_path / "base")
    key = "base_model.model.model.layers.0.mlp.experts.gate_up_proj.lora_"
    tensors = {f"{key}A.weight": torch.ones(4, 32), f"{key}B.weight": torch.ones(512, 4)}
    save_file(tensors, lora / WEIGHTS)
    with pytest.raises(SparsifyError, match="experts.gate_up_proj, which is no linear layer"):
        merge(tmp_path / "base", lora, tmp_path / "out")
