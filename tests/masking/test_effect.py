"""What a strategy says that it does to a model, and the questions that the rest asks."""

import pytest

from sparsify import Effect, SparsifyError, SparsityStrategy
from sparsify.masking.effect import Weights
from sparsify.strategies.fixed_mask import FixedMask
from sparsify.strategies.sparsegpt import SparseGPT


@pytest.mark.parametrize(
    ("weights", "only_masks", "trains_base", "trains_weights", "changes_base"),
    [
        ("frozen", True, False, False, False),
        ("updated", False, False, False, True),
        ("trained", False, True, True, True),
        ("proxy", False, False, True, False),
        ("adapted", False, False, False, False),
    ],
)
def test_what_each_word_means(
    weights: Weights, only_masks: bool, trains_base: bool, trains_weights: bool, changes_base: bool
) -> None:
    effect = Effect(weights)
    assert effect.only_masks == only_masks
    assert effect.trains_base == trains_base
    assert effect.trains_weights == trains_weights
    assert effect.changes_base == changes_base


def test_another_word_is_refused() -> None:
    with pytest.raises(SparsifyError, match="weights='train'; give one of frozen, updated, tr"):
        Effect(weights="train")  # type: ignore[arg-type]


def test_a_strategy_of_version_0_1_is_told_what_to_write_now() -> None:
    with pytest.raises(SparsifyError, match=r"Old declares prunes, weights, .* effect = Effect"):
        type("Old", (SparsityStrategy,), {"weights": "trained", "prunes": True})


def test_settings_may_decide_and_records_tell() -> None:
    assert SparseGPT().describe()["weights"] == "frozen"
    assert SparseGPT(update_weights=True).describe()["weights"] == "updated"
    assert FixedMask("magnitude").describe()["weights"] == "trained"
    adapted = FixedMask("magnitude", lora_rank=2).describe()
    assert adapted["weights"] == "adapted"
    assert "effect" not in adapted["settings"]
