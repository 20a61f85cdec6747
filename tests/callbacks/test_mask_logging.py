"""Numbers about masks, against a recount group by group."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sparsify.callbacks.mask_logging import MaskLogging
from sparsify.callbacks.throughput import Throughput
from sparsify.masking.layer import masked_layers
from tests.callbacks.recorder import run
from tests.conftest import tiny_llama


def changed(a: torch.Tensor, b: torch.Tensor) -> list[bool]:
    """For every group of four whether two masks differ in it."""
    pairs = zip(a.view(-1, 4).tolist(), b.view(-1, 4).tolist(), strict=True)
    return [x != y for x, y in pairs]


def test_numbers_are_those_of_a_recount(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    recorder, seen = run(model, tokenizer, text, tmp_path, [MaskLogging(every_n_steps=2)])
    logged = recorder.logged
    assert set(logged["masks/flips"]) == {2, 4, 6}
    for step in (2, 4, 6):
        now = seen.masks[step]
        for metric, other in (("flips", seen.masks[step - 2]), ("distance", seen.masks[0])):
            rows = {name: changed(now[name], other[name]) for name in now}
            for name, row in rows.items():
                assert logged[f"layers/{name}/{metric}"][step] == pytest.approx(sum(row) / len(row))
            everything = [flag for row in rows.values() for flag in row]
            assert logged[f"masks/{metric}"][step] == pytest.approx(
                sum(everything) / len(everything)
            )
        assert logged["masks/flips"][step] > 0
        entropy = largest = groups = 0.0
        for name in now:
            logits = seen.state[step][f"{name}.masker.logits_OKG"].double()
            p = torch.softmax(seen.values[step]["kappa"] * logits, dim=1)
            entropy += -(p * p.clamp_min(1e-300).log()).sum().item()
            largest += p.max(dim=1).values.sum().item()
            groups += logits[:, 0].numel()
        assert logged["masks/entropy"][step] == pytest.approx(entropy / groups, rel=1e-4)
        assert logged["masks/max_probability"][step] == pytest.approx(largest / groups, rel=1e-4)
        norms = {name: retained(mask, name) for name, mask in now.items()}
        for name, (kept, largest) in norms.items():
            assert logged[f"layers/{name}/retained_norm"][step] == pytest.approx(kept / largest)
        kept, largest = (sum(part) for part in zip(*norms.values(), strict=True))
        assert logged["masks/retained_norm"][step] == pytest.approx(kept / largest)
        assert kept < largest
    assert logged["masks/distance"][6] > logged["masks/distance"][2]


def retained(mask: torch.Tensor, name: str) -> tuple[float, float]:
    """The sum of sizes that a mask keeps, and of the two largest of every four."""
    weight = tiny_llama().get_submodule(name).weight.detach().abs()
    groups = weight.view(-1, 4).tolist()
    return float((weight * mask).sum()), sum(sum(sorted(group)[2:]) for group in groups)


def test_looks_and_the_end_are_kept_for_the_result_file(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    looking, speed = MaskLogging(every_n_steps=2, per_layer=False), Throughput()
    recorder, _ = run(model, tokenizer, text, tmp_path, [looking, speed])
    assert [look["step"] for look in looking.looks] == [2, 4, 6]
    assert [look["tokens"] for look in looking.looks] == [2 * 64, 4 * 64, 6 * 64]
    seconds = [look["seconds"] for look in looking.looks]
    assert 0 < seconds[0] <= seconds[1] <= seconds[2] <= round(speed.seconds, 2)
    for look in looking.looks:
        own = {n: v for n, v in look.items() if n not in ("step", "tokens", "seconds")}
        logged = {n: v[look["step"]] for n, v in recorder.logged.items() if n.startswith("masks/")}
        assert {f"masks/{name}": value for name, value in own.items()} == logged
    end = looking.describe(Built(model))
    assert end is not None
    layers = end.pop("layers")
    gone = {"flips", "soft_hard_gap", "step", "tokens", "seconds"}
    assert set(end) == set(looking.looks[-1]) - gone
    assert end["distance"] == looking.looks[-1]["distance"]
    assert set(layers) == set(masked_layers(model))
    assert all(set(row) == set(end) for row in layers.values())
    state = looking.state_dict()
    later = MaskLogging(every_n_steps=2)
    later.load_state_dict(state)
    run(tiny_llama(), tokenizer, text, tmp_path, [later], steps=4)
    assert [look["step"] for look in later.looks] == [2, 4], "what comes again takes its place"


class Built:
    """A module that holds a masked model."""

    def __init__(self, lm: LlamaForCausalLM) -> None:
        self.lm = lm


def test_a_strategy_that_does_not_learn_has_an_end_too(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    looking = MaskLogging()
    run(model, tokenizer, text, tmp_path, [looking], "magnitude", steps=1)
    end = looking.describe(Built(model))
    assert end is not None
    assert (end["distance"], end["retained_norm"]) == (0.0, 1.0)
    assert MaskLogging().describe(Built(tiny_llama())) is None


def test_the_gap_is_the_loss_under_the_draw_minus_the_loss_of_what_ships(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    recorder, seen = run(model, tokenizer, text, tmp_path, [MaskLogging(every_n_steps=3)], steps=3)
    hard = tiny_llama()
    with torch.no_grad():
        for name, mask in seen.masks[3].items():
            hard.get_submodule(name).weight.mul_(mask)
        tokens = seen.batches[3]
        loss = F.cross_entropy(
            hard(input_ids=tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
    gap = recorder.logged["train/task_loss"][3] - loss.item()
    assert recorder.logged["masks/soft_hard_gap"] == {3: pytest.approx(gap, abs=1e-5)}
    assert abs(gap) > 1e-3


def test_one_number_a_model_without_per_layer(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    looking = MaskLogging(every_n_steps=1, per_layer=False)
    recorder, _ = run(model, tokenizer, text, tmp_path, [looking], steps=1)
    assert "masks/distance" in recorder.logged
    assert not any(name.startswith("layers/") for name in recorder.logged)


@pytest.mark.parametrize("strategy", ["dense", "magnitude"])
def test_nothing_is_logged_where_nothing_is_learned(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: Path,
    tmp_path: Path,
    strategy: str,
) -> None:
    recorder, _ = run(
        model, tokenizer, text, tmp_path, [MaskLogging(every_n_steps=1)], strategy, steps=1
    )
    assert not [name for name in recorder.logged if name.startswith(("masks/", "layers/"))]


def test_the_state_brings_back_first_and_last_masks(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    former = MaskLogging(every_n_steps=1)
    _, before = run(model, tokenizer, text, tmp_path, [former], steps=2)
    torch.save(former.state_dict(), tmp_path / "state.pt")
    later = MaskLogging(every_n_steps=1)
    later.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    recorder, after = run(tiny_llama(), tokenizer, text, tmp_path, [later], steps=1)
    for metric, other in (("distance", before.masks[0]), ("flips", before.masks[2])):
        flags = [f for name, mask in after.masks[1].items() for f in changed(mask, other[name])]
        assert recorder.logged[f"masks/{metric}"][1] == pytest.approx(sum(flags) / len(flags))
