"""What docs/quantized.md says: which quantisation of an export keeps its zeros and its pattern.

Shapes: O out, I in, G groups.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparsify.export.folder import export
from sparsify.export.manifest import manifest_patterns
from tests.conftest import tiny_llama
from tests.export.test_folder import masked_module

GROUP = 16


@pytest.fixture(scope="module", params=["2:4", "1:4", "4:8"])
def weights(
    request: pytest.FixtureRequest,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[list[Tensor], int, int]:
    """The sparse weights ``[O, I]`` of an export, with N and M."""
    folder: Path = tmp_path_factory.mktemp("quantized") / "out"
    export(masked_module(tiny_llama(), tokenizer, pattern=request.param).masked, folder, {})
    stored = load_file(folder / "model.safetensors")
    layers = [stored[f"{name}.weight"] for name in manifest_patterns(folder)]
    assert len(layers) == 14
    n, m = map(int, request.param.split(":"))
    return layers, n, m


def int8(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round().clamp(-127, 127).to(torch.int8)


def fp8(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def most_in_a_group(codes_OI: Tensor, m: int) -> int:
    """Counted over the bits, as hardware sees them."""
    used = codes_OI.view(torch.uint8) != 0
    return int(used.unflatten(1, (-1, m)).sum(-1).max())


@pytest.mark.parametrize(("quantise", "largest"), [(int8, 127), (fp8, 448)])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("smoothed", [False, True])
def test_symmetric_codes_hold_the_pattern(
    quantise: Callable[[Tensor, Tensor], Tensor],
    largest: int,
    grouped: bool,
    smoothed: bool,
    weights: tuple[list[Tensor], int, int],
) -> None:
    layers, n, m = weights
    for weight_OI in layers:
        dropped = weight_OI == 0
        if smoothed:
            weight_OI = weight_OI * torch.linspace(0.1, 9, weight_OI.shape[1])
        parts = weight_OI.unflatten(1, (-1, GROUP)) if grouped else weight_OI
        scale = parts.abs().amax(-1, keepdim=True) / largest
        scale = scale.clamp(min=1e-12)
        codes = quantise(parts, scale)
        codes_OI = codes.flatten(1)
        assert most_in_a_group(codes_OI, m) <= n
        assert bool((codes_OI.view(torch.uint8)[dropped] == 0).all())
        back_OI = (codes.float() * scale).flatten(1)
        assert bool((back_OI[dropped] == 0).all())
        error = (back_OI - weight_OI).abs().max() / weight_OI.abs().max()
        assert 0 < error < 0.05


def test_a_zero_point_a_minimum_and_a_rotation_lose_it(
    weights: tuple[list[Tensor], int, int],
) -> None:
    layers, n, m = weights
    for weight_OI in layers:
        dropped = weight_OI == 0
        low, high = weight_OI.amin(1, keepdim=True), weight_OI.amax(1, keepdim=True)
        scale = (high - low) / 255
        zero = (-low / scale).round()
        codes_OI = ((weight_OI / scale).round() + zero).clamp(0, 255).to(torch.uint8)
        back_OI = (codes_OI.float() - zero) * scale
        assert bool((back_OI[dropped] == 0).all())
        assert most_in_a_group(codes_OI, m) == m > n

        from_minimum_OI = ((weight_OI - low) / scale).round() * scale + low
        assert not bool((from_minimum_OI[dropped] == 0).all())

        size = weight_OI.shape[1]
        rotation_II = torch.linalg.qr(
            torch.randn(size, size, generator=torch.Generator().manual_seed(0))
        )[0]
        assert bool(((weight_OI @ rotation_II) != 0).all())
