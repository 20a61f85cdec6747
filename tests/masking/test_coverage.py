"""Which share of a model is N:M, counted by hand, in a run, its records and its export."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sparsify import NMPattern
from sparsify.masking.coverage import VECTORS, coverage, largest_list
from sparsify.masking.overrides import Overrides
from sparsify.masking.select import Selection
from sparsify.results.compare.comparison import compare
from sparsify.results.compare.report import render
from sparsify.serving.verify import verify
from sparsify.strategies.dense import Dense
from sparsify.strategies.magnitude import Magnitude
from tests.conftest import Cli, masked_model, tiny_llama
from tests.tiny_models import (
    tied_llama,
    tiny_dbrx,
    tiny_falcon,
    tiny_gpt2,
    tiny_gpt_oss,
    tiny_mamba,
    tiny_mixtral,
    tiny_qwen2_moe,
)

ATTENTION = 32 * 32 + 2 * 16 * 32 + 32 * 32
MLP = 3 * 32 * 64
TABLE = 64 * 32  # embedding or head
NORMS = 5 * 32
EXPERTS = 4 * MLP
MIXTRAL = 2 * (ATTENTION + EXPERTS + 4 * 32)
EXCLUDED = "excluded by '*experts*'"


def told(model: PreTrainedModel, **options: Any) -> tuple[float, float, dict[str, Any]]:
    """Both shares, and the dense kinds by name."""
    found = masked_model(model, Magnitude(), Selection(**options)).coverage()
    return found.model, found.blocks, {kind.name: kind for kind in found.dense}


def test_a_llama_is_sparse_but_for_its_tables_and_norms() -> None:
    model, blocks, dense = told(tiny_llama())
    assert blocks == 1
    assert model == 2 * (ATTENTION + MLP) / (2 * (ATTENTION + MLP) + 2 * TABLE + NORMS)
    assert {name: kind.weights for name, kind in dense.items()} == {
        "model.embed_tokens": TABLE,
        "lm_head": TABLE,
        VECTORS: NORMS,
    }
    assert dense[VECTORS].count == 5


def test_a_tied_head_counts_once() -> None:
    model, _, dense = told(tied_llama())
    assert model == 2 * (ATTENTION + MLP) / (2 * (ATTENTION + MLP) + TABLE + NORMS)
    assert "lm_head" not in dense


def test_experts_are_most_of_mixtral() -> None:
    model, blocks, dense = told(tiny_mixtral())
    assert blocks == 2 * (ATTENTION + EXPERTS) / MIXTRAL
    assert model == 2 * (ATTENTION + EXPERTS) / (MIXTRAL + 2 * TABLE + NORMS)
    assert {name: kind.weights for name, kind in dense.items() if "layers" in name} == {
        "model.layers.*.mlp.gate": 2 * 4 * 32
    }


def test_experts_that_are_left_dense() -> None:
    _, blocks, dense = told(tiny_mixtral(), exclude=["*experts*"])
    assert blocks == 2 * ATTENTION / MIXTRAL
    both = {name: kind for name, kind in dense.items() if "experts" in name}
    assert {(name, kind.count, kind.weights, kind.reason) for name, kind in both.items()} == {
        ("model.layers.*.mlp.experts.gate_up_proj", 2, 2 * EXPERTS * 2 // 3, EXCLUDED),
        ("model.layers.*.mlp.experts.down_proj", 2, 2 * EXPERTS // 3, EXCLUDED),
    }


def test_experts_that_are_no_stacks_stay_dense() -> None:
    _, blocks, dense = told(tiny_dbrx())
    assert blocks == 2 * ATTENTION / MIXTRAL  # its blocks have the same sizes
    experts = dense["transformer.blocks.*.ffn.experts.mlp"]
    assert (experts.count, experts.weights) == (2, 2 * EXPERTS)
    assert experts.reason == "experts: 2-D parameter of DbrxExpertGLU"


@pytest.mark.parametrize(
    "make",
    [
        *(tiny_gpt2, tiny_falcon, tiny_mamba, tied_llama),
        *(tiny_mixtral, tiny_qwen2_moe, tiny_gpt_oss, tiny_dbrx),
    ],
)
def test_what_is_sparse_and_what_is_told_dense_are_the_whole_model(
    make: Callable[[], PreTrainedModel],
) -> None:
    whole = sum(p.numel() for p in make().parameters())
    masked = masked_model(make(), Magnitude(), Selection())
    found = masked.coverage()
    sparse = sum(layer.weight.numel() for layer in masked.layers.values())
    assert sparse + sum(kind.weights for kind in found.dense) == whole
    assert found.model == sparse / whole
    assert [kind.weights for kind in found.dense] == sorted(
        (kind.weights for kind in found.dense), reverse=True
    )
    # Without masks outside the blocks, zeros are the pattern's share of what is covered.
    assert masked.sparsity() == pytest.approx(found.blocks / 2)


def test_one_kind_for_each_reason() -> None:
    overrides = Overrides.parse({"*.1.mlp.*": "dense"})
    _, blocks, dense = told(tiny_llama(), exclude=["*.0.mlp.up_proj"], overrides=overrides)
    assert blocks == (2 * ATTENTION + MLP * 2 / 3) / (2 * (ATTENTION + MLP))
    reasons = {name: kind.reason for name, kind in dense.items() if "mlp" in name}
    assert reasons == {
        f"model.layers.*.mlp.{kind}_proj": "dense by override '*.1.mlp.*'"
        for kind in ("gate", "up", "down")
    }
    both = masked_model(
        tiny_llama(), Magnitude(), Selection(exclude=["*.0.mlp.up_proj"], overrides=overrides)
    ).coverage()
    kinds = [kind for kind in both.dense if kind.name == "model.layers.*.mlp.up_proj"]
    assert {(kind.count, kind.reason) for kind in kinds} == {
        (1, "dense by override '*.1.mlp.*'"),
        (1, "excluded by '*.0.mlp.up_proj'"),
    }


def test_a_warning_below_half_names_the_largest_and_the_fix() -> None:
    none = masked_model(tiny_llama(), Magnitude(), Selection()).coverage()
    assert none.warning() is None
    assert masked_model(tiny_mixtral(), Magnitude(), Selection()).coverage().warning() is None
    dbrx = masked_model(tiny_dbrx(), Magnitude(), Selection()).coverage().warning()
    assert dbrx is not None
    assert dbrx.startswith("only 11.1% of the block weights are N:M")
    assert "transformer.blocks.*.ffn.experts.mlp (2), 49,152 weights" in dbrx
    assert "take a model without such layers" in dbrx
    excluded = masked_model(tiny_llama(), Magnitude(), Selection(exclude=["*mlp*"])).coverage()
    assert "excluded by '*mlp*'; change that setting" in str(excluded.warning())


def test_a_strategy_without_masks_covers_nothing() -> None:
    found = masked_model(tiny_llama(), Dense(), Selection(NMPattern(2, 4))).coverage()
    assert (found.model, found.blocks) == (0, 0)
    assert "Dense masks nothing" in {kind.reason for kind in found.dense}


def test_lines_are_few() -> None:
    sizes = {f"model.layers.0.part{i}.weight": (8, 8) for i in range(9)}
    lines = coverage(sizes, set(), "model.layers", {}).lines()
    assert len(lines) == 7
    assert lines[-1] == "  dense: 4 more kinds, 256 weights"


def test_the_blocks_of_a_folder_are_its_largest_list() -> None:
    sizes = {
        "vision.layers.0.w.weight": (4, 4),
        "model.layers.0.mlp.experts.0.w1.weight": (4, 8),
        "lm_head.weight": (64, 64),
    }
    assert largest_list(sizes) == "model.layers"
    assert largest_list({"lm_head.weight": (4, 4)}) == ""


def test_a_run_its_records_and_its_export_tell_it(
    cli: Cli,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    tiny_mixtral().save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    words = [f"--model.name_or_path={tmp_path / 'moe'}", "--trainer.enable_progress_bar=true"]
    words += ["--model.exclude=*experts*"]
    with caplog.at_level(logging.WARNING, "sparsify"):
        cli("fit", "--strategy=magnitude", *words)
    said = capsys.readouterr().out
    assert "N:M in 11.1% of the block weights, 10.3% of all parameters" in said
    gate_up = "model.layers.*.mlp.experts.gate_up_proj"
    assert f"dense: {gate_up} (2), 32,768 weights: {EXCLUDED}" in said
    assert "only 11.1% of the block weights are N:M" in caplog.text
    run = cli.runs()[-1]
    told = json.loads((run / "result.json").read_text())["run"]["coverage"]
    assert told["blocks"] == round(2 * ATTENTION / MIXTRAL, 6)
    assert told["dense"][0]["name"] == gate_up
    assert json.loads((run / "export/sparsity_manifest.json").read_text())["coverage"] == told
    found = verify(run / "export")
    assert found.ok
    assert found.coverage is not None
    assert found.coverage.blocks == 2 * ATTENTION / MIXTRAL
    assert (
        sum(kind.weights for kind in found.coverage.dense) == 2 * (EXPERTS + 4 * 32 + TABLE) + NORMS
    )
    comparison = compare([run])
    assert "only 11.1% of its block weights" in comparison.remarks[-1]
    assert "<td>11.1%</td>" in render(comparison, "title")
