"""Weights that start from a prior's mask, and priors that bring weights.

Shapes: O out, I in.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsify import Block, NMPattern, SparsifyError, SparsityStrategy
from sparsify.calibration import Calibration
from sparsify.calibration.prior import MasksOnly, SavedMasks, WithInputs, favour, make_prior
from sparsify.export.mask_file.file import read_masks, write_masks
from sparsify.strategies.magnitude import Magnitude
from sparsify.strategies.sparsegpt import SparseGPT
from tests.calibration.engine import TEXT, masked
from tests.conftest import tiny_llama


def random_case(pattern: NMPattern, seed: int = 0, columns: int = 64) -> tuple[Tensor, Tensor]:
    """A weight with zeros and ties in it, and a prior of random candidates, in some rows of the
    largest.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(33, columns, generator=generator)
    coarse = torch.rand(33, 1, generator=generator) < 0.5
    weight = torch.where(coarse, (2 * weight).round() / 2, weight)  # many ties, and zeros
    ranks = torch.randint(
        pattern.candidates, (33, columns // pattern.m), generator=generator, dtype=torch.int16
    )
    prior = pattern.unrank(ranks)
    prior[:4] = pattern.top(weight[:4].abs())
    return weight, prior


def slow(weight: Tensor, prior: Tensor, m: int) -> Tensor:
    """Group by group."""
    tiny = np.float32(2.0**-126)
    out = weight.numpy().copy()
    for row in range(out.shape[0]):
        for start in range(0, out.shape[1], m):
            w, kept = out[row, start : start + m], prior[row, start : start + m].numpy()
            order = sorted(range(m), key=lambda i: (-abs(w[i]), i))
            if set(order[: kept.sum()]) == set(np.flatnonzero(kept)):
                continue
            size = np.where(kept, np.maximum(abs(w), tiny), abs(w)).astype(np.float32)
            least = size[kept].min()
            below = np.nextafter(least, np.float32(0))
            below = below if below >= tiny else np.float32(0)
            size[~kept] = np.minimum(size[~kept], below)
            out[row, start : start + m] = np.copysign(size, w)
    return torch.from_numpy(out)


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "8:16"])
def test_the_priors_choice_becomes_the_largest(text: str) -> None:
    pattern = NMPattern.parse(text)
    weight, prior = random_case(pattern)
    before = weight.clone()
    found = favour(weight, prior, pattern)
    assert torch.equal(weight, before)
    assert torch.equal(pattern.top(found.abs()), prior)
    expected = slow(weight, prior, pattern.m)
    assert torch.equal(found, expected)
    assert torch.equal(found.signbit(), weight.signbit())
    kept = prior & (weight != 0)
    assert torch.equal(found[kept], weight[kept])
    assert bool((found.abs() <= weight.abs())[~prior].all())
    agree = pattern.groups(pattern.top(weight.abs()) == prior).all(-1, keepdim=True)
    assert bool(agree.any())
    agree = agree.expand_as(pattern.groups(weight)).flatten(-2)
    assert torch.equal(found[agree], weight[agree])
    assert torch.equal(favour(found, prior, pattern), found)  # nothing is left to do


@pytest.mark.parametrize(
    "values",
    [
        [1.0, 2.0, 0.0, 0.0],  # the prior keeps zeros alone
        [0.0, 0.0, 0.0, 0.0],
        [1.0, 1.0, 1.0, 1.0],
        [-3.0, 2.0, -1e-40, 1e-38],  # numbers that are not normal
        [1.0, 2.0, 1.2e-38, -0.0],
        [2.0, 2.0, -2.0, 2.0],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zeros_and_ties_are_decided_as_the_prior_says(
    values: list[float], dtype: torch.dtype
) -> None:
    pattern = NMPattern(2, 4)
    weight = torch.tensor([values], dtype=dtype)
    prior = torch.tensor([[False, False, True, True]])
    found = favour(weight, prior, pattern)
    assert found.dtype == dtype
    assert torch.equal(pattern.top(found.abs()), prior)
    assert torch.equal(found.signbit(), weight.signbit())
    assert float((found - weight).abs()[prior].max()) <= torch.finfo(dtype).tiny


def test_a_prior_brings_weights_only_where_they_are_wanted() -> None:
    updating, plain = SparseGPT(update_weights=True), SparseGPT()
    assert isinstance(make_prior(updating), MasksOnly)
    assert make_prior(updating, weights=True) is updating
    assert make_prior(plain) is make_prior(plain, weights=True) is plain


@pytest.mark.parametrize("strategy", [Magnitude(), SparseGPT()])
def test_results_can_tell_how_large_inputs_are(strategy: SparsityStrategy) -> None:
    found = dict(masked(tiny_llama(), Calibration(cache=False)).run(WithInputs(strategy)))
    plain = dict(masked(tiny_llama(), Calibration(cache=False)).run(strategy))
    assert list(found) == list(plain)
    assert all(torch.equal(found[name].mask, plain[name].mask) for name in found)
    assert all(result.inputs is None for result in plain.values())
    # The first block sees the dense model's inputs.
    model, squares = tiny_llama(), dict[str, Tensor]()
    for name in (first := [name for name in found if ".layers.0." in name]):

        def hook(_: object, inputs: tuple[Tensor], name: str = name) -> None:
            squares[name] = squares.get(name, torch.zeros(())) + inputs[0].square().sum((0, 1))

        model.get_submodule(name).register_forward_pre_hook(hook)
    for window in TEXT:
        model(input_ids=window[None])
    assert len(first) == 7
    for name in first:
        inputs = found[name].inputs
        assert inputs is not None
        torch.testing.assert_close(inputs, squares[name].sqrt(), rtol=1e-4, atol=1e-5)


def test_a_strategy_that_is_only_named_runs_as_the_prior_that_it_advises() -> None:
    named = make_prior("sparsegpt")
    assert isinstance(named, MasksOnly)
    assert named.describe()["settings"]["strategy"]["settings"]["update_weights"] is True
    # Where its weights would be taken over too, it runs as it is.
    assert make_prior("sparsegpt", weights=True).effect.weights == "frozen"
    assert type(make_prior("magnitude")).__name__ == "Magnitude"


@pytest.mark.parametrize("learner", ["maskllm", "MaskPro", "sr_ste"])
def test_a_prior_that_would_have_to_learn_is_refused(learner: str) -> None:
    with pytest.raises(SparsifyError, match="learns its masks, which takes a run of its own; name"):
        make_prior(learner)


@pytest.mark.parametrize("path", ["gone/export", "../gone", "/gone/masks.nmask", "m.nmask"])
def test_a_path_is_one_whether_or_not_there_is_a_file(path: str) -> None:
    prior = make_prior(path)
    assert isinstance(prior, SavedMasks)
    assert prior.describe()["settings"] == {"seed": 0, "path": Path(path).name, "digest": ""}
    block = Block("block", {})
    with pytest.raises(SparsifyError, match="not a readable mask file"):
        list(prior.calibrate([block]))


def test_a_folder_of_a_strategys_name_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wanda").mkdir()
    assert not isinstance(make_prior("wanda"), SavedMasks)


def test_saved_masks_tell_which_they_are(tmp_path: Path) -> None:
    file = tmp_path / "masks.nmask"
    write_masks(file, {"a": torch.tensor([[True, False]])}, NMPattern(1, 2), "h")
    settings = make_prior(str(file)).describe()["settings"]
    assert settings["digest"] == read_masks(file).digest
    assert str(tmp_path) not in str(settings)
    file.write_bytes(b"content")
    with pytest.raises(SparsifyError, match="not a readable mask file"):
        make_prior(str(file))
