"""The model with masks as one object, where layers share a weight."""

from torch import Tensor
from transformers import LlamaForCausalLM

from sparsify import LayerResult, NMPattern, SparsityStrategy
from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.masker import FixedMasker
from tests.conftest import masked_model

TWO_FOUR = NMPattern(2, 4)
FIRST, SECOND = (f"model.layers.{block}.mlp.up_proj" for block in (0, 1))


class Noting(SparsityStrategy[FixedMasker]):
    """Notes which maskers are started, and from what."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[tuple[str, bool]] = []

    def init_masker(
        self, masker: FixedMasker, weight_OI: Tensor, result: LayerResult | None, row0: int = 0
    ) -> None:
        self.started.append((masker.name, result is not None))
        if result is not None:
            masker.set_mask(result.mask)


def shared(model: LlamaForCausalLM) -> MaskedModel:
    """Two of its layers have one weight."""
    first, second = (block.mlp.up_proj for block in model.model.layers)
    second.weight = first.weight
    return masked_model(model, Noting())


def test_each_masker_comes_once_with_its_weight(model: LlamaForCausalLM) -> None:
    masked = shared(model)
    assert len(masked.layers) == 14
    assert len(masked.maskers) == 13
    assert masked.layers[FIRST].masker is masked.layers[SECOND].masker
    assert all(masked.maskers[x.masker] is x.weight for x in masked.layers.values())


def test_each_masker_is_started_once(model: LlamaForCausalLM) -> None:
    masked = shared(model)
    masked.calibrate()
    assert masked.strategy.started == [(masker.name, False) for masker in masked.maskers]


def test_of_two_results_for_one_weight_the_last_holds(model: LlamaForCausalLM) -> None:
    masked = shared(model)
    weight_OI = masked.layers[FIRST].weight_OI
    masks = [TWO_FOUR.top(weight_OI.abs()), TWO_FOUR.top(-weight_OI.abs())]
    masked.calibrate((n, LayerResult(m)) for n, m in zip((FIRST, SECOND), masks, strict=True))
    assert masked.strategy.started[:2] == [(FIRST, True), (FIRST, True)]
    assert sum(result for _, result in masked.strategy.started) == 2
    assert len(masked.strategy.started) == 14
    assert bool((masked.hard_masks()[FIRST] == masks[1]).all())
