"""Blocks whose masks did not change are skipped, and losses stay those of the whole model."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify.masking.layer import masked_layers
from sparsify.masking.masker import FixedMasker
from sparsify.masking.pattern import NMPattern
from sparsify.masking.select import decoder_blocks
from sparsify.results.budget.prefix import Prefix
from tests.conftest import SIZES
from tests.masking.test_inject import mask_by_magnitude

BLOCKS = 4


class Counted:
    """A model of four blocks, whose masks can be set; counts how often each block runs."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = LlamaConfig(**SIZES | {"num_hidden_layers": BLOCKS})
            self.model = LlamaForCausalLM(config).eval()
        mask_by_magnitude(self.model)
        self.layers = masked_layers(self.model)
        self.base = {name: layer.masker for name, layer in self.layers.items()}
        self.runs = [0] * BLOCKS
        for i, block in enumerate(self.model.model.layers):
            block.register_forward_hook(lambda *_, i=i: self.count(i))

    def count(self, block: int) -> None:
        # Skipped blocks hand on a tensor that is kept; the hook runs for them too.
        self.runs[block] += "forward" not in vars(self.model.model.layers[block])

    @torch.no_grad()
    def losses(self, batch: Tensor) -> Tensor:
        logits = self.model(input_ids=batch, use_cache=False).logits
        return logits.log_softmax(-1)[..., 0].mean(1)

    def changed(self, name: str, seed: int) -> dict[str, FixedMasker]:
        """The masks with a random one for a layer."""
        torch.manual_seed(seed)
        weight = self.layers[name].weight
        masker = FixedMasker(name, tuple(weight.shape), NMPattern(2, 4))
        masker.set_mask(masker.pattern.top(torch.rand_like(weight)))
        return {**self.base, name: masker}

    def use(self, masks: dict[str, FixedMasker]) -> None:
        for name, masker in masks.items():
            self.layers[name].masker = masker


def test_losses_stay_and_blocks_are_skipped() -> None:
    one = Counted()
    batches = list(torch.randint(0, 64, (5, 8)).split(2))
    prefix = Prefix(decoder_blocks(one.model), batches, one.losses)
    cases = [one.base]
    cases += [
        one.changed(f"model.layers.{block}.{kind}", seed)
        for block in range(BLOCKS)
        for seed, kind in enumerate(("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"))
    ]
    cases += [one.changed("model.layers.0.mlp.up_proj", 9), one.base]
    for masks in cases:
        one.use(masks)
        whole = torch.cat([one.losses(batch) for batch in batches])
        one.runs = [0] * BLOCKS
        torch.testing.assert_close(torch.cat(prefix(masks)), whole, rtol=0, atol=0)
    # Once in the last block, all blocks before it are skipped.
    one.use(cases[BLOCKS * 3])
    prefix = Prefix(decoder_blocks(one.model), batches, one.losses)
    for masks in cases[-5:-2]:
        one.use(masks)
        one.runs = [0] * BLOCKS
        prefix(masks)
    assert one.runs == [0, 0, 0, len(batches)]


def test_a_model_that_passes_values_on_in_another_way_runs_whole() -> None:
    one = Counted()
    seen: list[Tensor] = []
    first, last = one.model.model.layers[0], one.model.model.layers[-1]
    first.mlp.register_forward_hook(lambda _, __, output: seen.append(output))
    last.register_forward_hook(lambda _, __, output: output + seen.pop())
    batches = list(torch.randint(0, 64, (4, 8)).split(2))
    prefix = Prefix(decoder_blocks(one.model), batches, one.losses)
    for seed in range(4):
        masks = one.changed("model.layers.3.mlp.up_proj", seed)
        one.use(masks)
        whole = torch.cat([one.losses(batch) for batch in batches])
        one.runs = [0] * BLOCKS
        torch.testing.assert_close(torch.cat(prefix(masks)), whole, rtol=0, atol=0)
    assert one.runs == [len(batches)] * BLOCKS
