"""Vision-language models: the text decoder is masked, and all of the model is exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    Blip2Config,
    Florence2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen3_5ForCausalLM,
)

from sparsify import LayerResult, SparsifyError, TextDataModule, sparsify
from sparsify.calibration import Calibration
from sparsify.cli.main import main
from sparsify.export.exchange.zeros import read_zero_pattern
from sparsify.export.folder import export
from sparsify.export.mask_file.file import read_masks, write_masks
from sparsify.masking.layer import layer_patterns
from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.select import Selection, decoder_blocks, select
from sparsify.models.base import load_base, load_model, load_skeleton, stored_dtype
from sparsify.models.positions import check_positions
from sparsify.serving import load
from sparsify.serving.adapters import MaskAdapters
from sparsify.serving.verify import verify
from sparsify.strategies.magnitude import Magnitude
from tests.conftest import Cli, masked_model, word_tokenizer
from tests.vision import VISION, image_inputs, tiny_vision

TOKENS = torch.arange(2, 26).view(2, 12)
PROCESSOR = {
    "preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor", "do_resize": True},
    "processor_config.json": {"processor_class": "LlavaProcessor", "patch_size": 8},
    "video_preprocessor_config.json": {"video_processor_type": "Qwen2VLVideoProcessor"},
    "chat_template.json": {"chat_template": "{{ messages }}"},
}


def save(kind: str, folder: Path) -> Path:
    """A model with its tokenizer and processor."""
    tiny_vision(kind).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    for name, content in PROCESSOR.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@torch.no_grad()
def logits(model: PreTrainedModel, kind: str) -> list[Tensor]:
    """For text, and for text with an image."""
    return [model(input_ids=TOKENS).logits, model(**image_inputs(kind)).logits]


def by_hand(kind: str, export: Path) -> PreTrainedModel:
    """The dense model, whose weights were multiplied with the masks of an export."""
    model = tiny_vision(kind)
    for name, mask_OI in read_masks(export).items():
        model.get_submodule(name).weight.data.mul_(mask_OI)
    return model


def by_magnitude(model: PreTrainedModel) -> MaskedModel:
    masked = masked_model(model, Magnitude())
    layers = masked.layers.items()
    masked.calibrate(
        (name, LayerResult(x.masker.pattern.top(x.weight_OI.abs()))) for name, x in layers
    )
    return masked


def by_name(coverage: dict[str, Any]) -> dict[str, Any]:
    return coverage | {"dense": sorted(coverage["dense"], key=lambda kind: kind["name"])}


@pytest.mark.parametrize("kind", VISION)
def test_calibrated_learned_exported_and_read_by_transformers(
    kind: str, cli: Cli, tmp_path: Path
) -> None:
    folder = save(kind, tmp_path / "base")
    cli.model = [f"--model.name_or_path={folder}"]
    words = ["--strategy=maskllm", "--model.calibration.samples=4"]
    words += ["--model.gradient_checkpointing=true", "--model.distillation.hidden=0.1"]
    cli("fit", *words)
    [run] = cli.runs()
    out = run / "export"
    loaded = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    dense, found = logits(tiny_vision(kind), kind), logits(loaded, kind)
    for one, other, before in zip(found, logits(by_hand(kind, out), kind), dense, strict=True):
        assert torch.equal(one, other)
        assert not torch.allclose(one, before, atol=0.05)
    assert len(read_masks(out)) == 14
    report = verify(out, str(folder))
    assert report.ok, report.problems
    assert report.base is not None
    assert len(report.base.kept) == 14
    assert report.base.left == {}
    manifest = json.loads((out / "sparsity_manifest.json").read_text())
    assert report.coverage is not None
    assert by_name(report.coverage.describe()) == by_name(manifest["coverage"])
    assert report.coverage.blocks == 1
    for name, content in PROCESSOR.items():
        assert json.loads((out / name).read_text()) == content
        assert name in manifest["files"]


def test_blocks_are_found_by_the_models_accessor_and_not_by_size() -> None:
    model = tiny_vision("llava")
    tower = sum(p.numel() for p in model.model.vision_tower.parameters())
    assert tower > sum(p.numel() for p in model.model.language_model.parameters())
    assert list(decoder_blocks(model)) == [f"model.language_model.layers.{i}" for i in (0, 1)]
    chosen, dense = select(model, Selection())
    assert all(name.startswith("model.language_model.layers.") for name in chosen)
    assert dense == {
        "model.vision_tower": "CLIPVisionModel, outside the text decoder",
        "model.multi_modal_projector": "LlavaMultiModalProjector, outside the text decoder",
        "model.language_model.embed_tokens": "Embedding is not a plain linear layer",
        "lm_head": "output head",
    }
    chosen, _ = select(model, Selection(include=["*.vision_tower.*q_proj"]))
    assert len(chosen) == 6
    covered = masked_model(tiny_vision("llava"), Magnitude()).coverage()
    assert covered.blocks == 1
    assert {kind.name: kind.weights for kind in covered.dense}["model.vision_tower"] == sum(
        p.numel() for p in model.model.vision_tower.parameters() if p.ndim > 1
    )


def test_blocks_that_run_only_with_images_stay_dense() -> None:
    masked = masked_model(tiny_vision("mllama"), Magnitude())
    masked.check_called()
    numbers = {name.split(".")[3] for name in masked.layers}
    assert numbers == {"0", "2"}
    assert masked.dense["model.language_model.layers.1.cross_attn.q_proj"].startswith("never")


class TextProcessor(ProcessorMixin):
    """A processor that needs no package for images."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, **options: object) -> None:
        super().__init__(tokenizer, **options)


def test_objects(tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path) -> None:
    model = tiny_vision("gemma3")
    data = TextDataModule(train=text / "train.txt", block_size=16, batch_size=4)
    quiet = {"enable_progress_bar": False, "accelerator": "cpu"}
    processor = TextProcessor(tokenizer)
    options = {"trainer": quiet, "calibration": Calibration(samples=4)}
    result = sparsify(model, "wanda", data, processor, **options)
    result.export(tmp_path / "out")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    for one, other in zip(logits(loaded, "gemma3"), logits(model, "gemma3"), strict=True):
        assert torch.equal(one, other)
    assert (tmp_path / "out" / "processor_config.json").is_file()
    assert TextProcessor.from_pretrained(tmp_path / "out").tokenizer("w3 w5")["input_ids"]
    with pytest.raises(SparsifyError, match="tokenizer is 'None'; it must be an object of"):
        sparsify(tiny_vision("gemma3"), "wanda", data, None)  # type: ignore[arg-type]


def test_a_model_object_takes_the_processor_of_its_folder(
    tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(save("llava", tmp_path / "base"))
    data = TextDataModule(train=text / "train.txt", block_size=16, batch_size=4)
    quiet = {"enable_progress_bar": False, "accelerator": "cpu"}
    sparsify(model, "magnitude", data, tokenizer, trainer=quiet).export(tmp_path / "out")
    for name in PROCESSOR:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])  # stored under other names, and the same
def test_masks_as_files_adapters_and_serving(kind: str, tmp_path: Path) -> None:
    base, out = save(kind, tmp_path / "base"), tmp_path / "out"
    masked = by_magnitude(load_model(str(base)))
    masks = tmp_path / "masks.nmask"
    write_masks(masks, masked.hard_masks(), layer_patterns(masked.model), masked.base.hash)
    with pytest.raises(SystemExit, match="0"):
        main(["mask", "export", str(masks), str(out), "--base", str(base)])
    expected = logits(by_hand(kind, out), kind)
    adapted = load_model(str(base))
    adapters = MaskAdapters(adapted)
    adapters.add("one", masks)
    adapters.use("one")
    for model in (adapted, load(out, device="cpu", dtype=torch.float32)):
        for one, other in zip(logits(model, kind), expected, strict=True):
            assert torch.equal(one, other)
    found = {layer.name: layer.mask for layer in read_zero_pattern(out) if layer.mask is not None}
    assert found.keys() == masked.layers.keys()
    for name, mask_OI in masked.hard_masks().items():
        assert torch.equal(found[name], mask_OI)


def test_tensors_of_equal_values_are_known_by_their_names(tmp_path: Path) -> None:
    base, out = save("llava", tmp_path / "base"), tmp_path / "out"
    masked = by_magnitude(load_model(str(base)))
    masked.base.own_tokenizer = word_tokenizer()
    export(masked, out, {})
    stored = json.loads((out / "sparsity_manifest.json").read_text())["stored_as"]
    norms = ("input_layernorm", "post_attention_layernorm")
    for name in (f"layers.{i}.{norm}.weight" for i in (0, 1) for norm in norms):
        assert stored[f"model.language_model.{name}"] == f"language_model.model.{name}"


def test_the_class_of_the_text_decoder_alone_is_taken_only_where_it_was_saved(
    tmp_path: Path,
) -> None:
    model = tiny_vision("qwen3_5")
    model.save_pretrained(tmp_path / "whole")
    for loaded in (load_model(str(tmp_path / "whole")), load_skeleton(str(tmp_path / "whole"))):
        assert type(loaded) is type(model)
    text = Qwen3_5ForCausalLM(model.config.get_text_config())
    text.save_pretrained(tmp_path / "text")
    assert type(load_model(str(tmp_path / "text"))) is Qwen3_5ForCausalLM


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Blip2Config(), "a model that needs pixel_values beside text"),
        (Florence2Config(), "an encoder-decoder"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_does_not_predict_from_text_alone_is_refused(
    config: Blip2Config, message: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    for read in (load_model, load_skeleton):
        with pytest.raises(SparsifyError, match=message):
            read(str(tmp_path))


def test_positions_and_stored_type_are_those_of_the_text_decoder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_vision("llava")
    table = model.model.vision_tower.embeddings.position_embedding
    model.config.text_config.max_position_embeddings = table.num_embeddings
    check_positions(model, 32)
    assert f"longer than the {table.num_embeddings} positions" in caplog.text
    model.config.dtype, model.config.text_config.dtype = None, torch.bfloat16
    model.config.save_pretrained(tmp_path)
    assert stored_dtype(str(tmp_path)) == torch.bfloat16


def test_without_a_processor_this_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_vision("llava").save_pretrained(tmp_path)
    assert load_base(str(tmp_path)).processor == {}
    assert "holds no processor" in caplog.text
