"""Plans of mixtures of experts: what all experts take together, however they are run."""

from pathlib import Path

import pytest
from transformers import MixtralConfig, MixtralForCausalLM

from sparsify.common.errors import SparsifyError
from sparsify.masking.registry import make_strategy
from sparsify.training.module import SparseCausalLM
from sparsify.training.plan import DryRun, PlanSettings, dry_run
from sparsify.training.plan import experts as planned
from tests.architectures import tiny
from tests.conftest import SIZES

B, T, K, E = 4, 16, 2, 16
HIDDEN, INNER, VOCABULARY = 32, 64, 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = MixtralConfig(**SIZES, num_local_experts=E, num_experts_per_tok=K)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    return tmp_path / "moe"


def seen(folder: Path, name: str = "maskllm") -> DryRun:
    module = SparseCausalLM(make_strategy(name, prior=None), str(folder))
    return dry_run(PlanSettings(module, B, T))


def test_products_are_those_of_the_chosen_experts(folder: Path) -> None:
    attention = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2
    experts = 3 * HIDDEN * INNER
    block = 2 * B * T * (attention + HIDDEN * E + K * experts)
    scores = 2 * 2 * B * T * T * HIDDEN  # queries by keys, and their shares by values
    head = 2 * B * T * HIDDEN * VOCABULARY
    found = sum(seen(folder, "sr_ste").work["forward"].flops.values())
    assert found == 2 * (block + scores) + head


@pytest.mark.parametrize("name", [pytest.param("maskllm", marks=pytest.mark.slow), "selfmask"])
def test_groups_take_what_experts_by_themselves_take(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grouped = seen(folder, name)
    monkeypatch.setattr(planned, "GROUPS", E)
    alone = seen(folder, name)
    for phase in ("forward", "backward"):
        assert grouped.work[phase].flops == alone.work[phase].flops
    parts, expected = (run.peaks["forward"].parts for run in (grouped, alone))
    assert parts["activations"] == pytest.approx(expected["activations"], rel=0.05)
    for part in ("weights", "masker tensors", "gradients", "optimizer states"):
        assert parts[part] == expected[part]


def test_experts_whose_tokens_are_counted_by_values_are_refused(tmp_path: Path) -> None:
    tiny("jetmoe").save_pretrained(tmp_path / "moe")
    with pytest.raises(SparsifyError, match="the experts of JetMoeParallelExperts cannot be plann"):
        seen(tmp_path / "moe")
