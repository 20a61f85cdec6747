"""The mask file: its bytes, its round trip, and what is refused."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsify import NMPattern, SparsifyError
from sparsify.mask_file import (
    FILE_NAME,
    FORMAT,
    pack_ranks,
    packed_bytes,
    read_masks,
    unpack_ranks,
    write_masks,
)

TWO_FOUR = NMPattern(2, 4)
#: pattern, candidates, ranks that fit a byte (0: two bytes a rank)
SIZES = [
    ("1:2", 2, 8),
    ("1:4", 4, 4),
    ("2:4", 6, 3),
    ("1:16", 16, 2),
    ("2:6", 15, 2),
    ("2:8", 28, 1),
]
SIZES += [("4:8", 70, 1), ("5:10", 252, 1), ("3:13", 286, 0), ("8:16", 12870, 0)]

MIXED = ("2:4", "1:4", "4:8")


def random_masks(pattern: NMPattern, shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """A random candidate for every group."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: pattern.unrank(torch.randint(pattern.candidates, (rows, groups), generator=generator))
        for name, (rows, groups) in shapes.items()
    }


def header(
    shape: list[int], pattern: str = "2:4", fmt: str = FORMAT, name: str = "a"
) -> dict[str, str]:
    """Metadata of a file of one layer."""
    return {
        "format": fmt,
        "base_hash": "h",
        "layers": json.dumps({name: {"shape": shape, "pattern": pattern}}),
    }


@pytest.mark.parametrize(("text", "candidates", "digits"), SIZES)
def test_ranks_come_back_from_their_bytes(text: str, candidates: int, digits: int) -> None:
    pattern = NMPattern.parse(text)
    assert pattern.candidates == candidates
    rng = random.Random(0)  # noqa: S311
    for groups in (1, 2, 3, 4, 5, 7, 8, 9, 301):
        ranks = [rng.randrange(candidates) for _ in range(groups)]
        ranks[-1] = candidates - 1
        packed = pack_ranks(torch.tensor(ranks), pattern)
        assert packed.dtype == torch.uint8
        assert (
            len(packed)
            == packed_bytes(groups, pattern)
            == (-(-groups // digits) if digits else 2 * groups)
        )
        assert unpack_ranks(packed, groups, pattern).tolist() == ranks
        # By hand: digits of base K, the first lowest; else two bytes, the low one first.
        for i, rank in enumerate(ranks):
            if digits:
                assert packed[i // digits].item() // candidates ** (i % digits) % candidates == rank
            else:
                assert packed[2 * i].item() + 256 * packed[2 * i + 1].item() == rank


def test_three_groups_of_2_4_share_a_byte_by_eye() -> None:
    assert pack_ranks(torch.tensor([[1, 2], [3, 4]]), TWO_FOUR).tolist() == [1 + 2 * 6 + 3 * 36, 4]
    assert pack_ranks(torch.tensor([5, 5, 5]), TWO_FOUR).tolist() == [215]
    assert packed_bytes(4096 * 1024, TWO_FOUR) * 8 / (4096 * 4096) == pytest.approx(0.667, abs=1e-3)


@pytest.mark.parametrize("text", [size[0] for size in SIZES])
def test_masks_come_back_from_the_file(text: str, tmp_path: Path) -> None:
    pattern = NMPattern.parse(text)
    masks = random_masks(pattern, {"model.a": (3, 5), "model.b.c": (7, 1), "d": (2, 3)})
    write_masks(tmp_path / FILE_NAME, masks, pattern, "abc")
    for path in (tmp_path / FILE_NAME, tmp_path):  # the file, or the folder that holds it
        found = read_masks(path)
        assert found.base_hash == "abc"
        assert found.masks.keys() == masks.keys()
        for name, mask in masks.items():
            assert found.masks[name].dtype == torch.bool
            assert torch.equal(found.masks[name], mask)


def test_masks_of_several_patterns_come_back(tmp_path: Path) -> None:
    patterns = {name: NMPattern.parse(text) for name, text in zip("abc", MIXED, strict=True)}
    masks = {n: random_masks(p, {n: (3, 4)})[n] for n, p in patterns.items()}
    write_masks(tmp_path / FILE_NAME, masks, patterns, "abc")
    found = read_masks(tmp_path).masks
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    with safe_open(tmp_path / FILE_NAME, framework="pt") as file:
        layers = json.loads(file.metadata()["layers"])
    assert {name: layer["pattern"] for name, layer in layers.items()} == dict(
        zip("abc", MIXED, strict=True)
    )
    with pytest.raises(SparsifyError, match="keeps 2 weights; a 1:4 mask"):
        write_masks(tmp_path / "no", masks, patterns | {"a": NMPattern(1, 4)}, "abc")


def test_the_file_is_plain_safetensors_of_small_size(tmp_path: Path) -> None:
    masks = random_masks(TWO_FOUR, {"a": (64, 32)})
    write_masks(tmp_path / FILE_NAME, masks, TWO_FOUR, "abc")
    with safe_open(tmp_path / FILE_NAME, framework="pt") as file:
        assert file.metadata()["format"] == "sparsify.masks/1"
        assert json.loads(file.metadata()["layers"]) == {
            "a": {"shape": [64, 128], "pattern": "2:4"}
        }
        assert file.get_tensor("a").shape == (-(-64 * 32 // 3),)
    assert (tmp_path / FILE_NAME).stat().st_size < 64 * 32 / 3 + 400


def test_a_mask_that_is_not_n_of_m_is_not_written(tmp_path: Path) -> None:
    masks = random_masks(TWO_FOUR, {"a": (2, 2)})
    masks["a"][1, :4] = True
    with pytest.raises(SparsifyError, match="row 1, group 0 keeps 4 weights"):
        write_masks(tmp_path / FILE_NAME, masks, TWO_FOUR, "abc")
    assert not (tmp_path / FILE_NAME).exists()


def test_a_missing_file_is_an_error_that_says_what_writes_one(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(SparsifyError, match="not a readable mask file.*sparsify export"):
            read_masks(path)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_truncated_file_is_an_error(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_masks(path, random_masks(TWO_FOUR, {"a": (4, 8)}), TWO_FOUR, "abc")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SparsifyError, match="not a readable mask file"):
        read_masks(path)


TWELVE_GROUPS = torch.zeros(4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (
            {"a": TWELVE_GROUPS},
            header([3, 16], fmt="sparsify.masks/2"),
            "'sparsify.masks/2'.*'sparsify.masks/1'",
        ),
        ({"a": TWELVE_GROUPS}, None, "its format is None"),
        ({"a": TWELVE_GROUPS}, {"format": FORMAT}, "not a readable mask file"),
        ({"a": TWELVE_GROUPS}, header([3, 16]) | {"layers": "{"}, "not a readable mask file"),
        ({"b": TWELVE_GROUPS}, header([3, 16]), "lists other layers than it holds"),
        (
            {"a": TWELVE_GROUPS, "b": TWELVE_GROUPS.clone()},
            header([3, 16]),
            "lists other layers than it holds",
        ),
        (
            {"a": TWELVE_GROUPS},
            header([4, 16]),
            "a holds 4 bytes, which is not a 2:4 mask of 4 x 16",
        ),
        ({"a": TWELVE_GROUPS}, header([8, 6]), "not a 2:4 mask of 8 x 6"),
        ({"a": TWELVE_GROUPS}, header([3, 16], "1:4"), "not a 1:4 mask"),  # 12 groups are 3 bytes
        ({"a": TWELVE_GROUPS.int()}, header([3, 16]), "not a 2:4 mask"),
        ({"a": TWELVE_GROUPS}, header([3, 16], "4:2"), "pattern '4:2'"),
        ({"a": TWELVE_GROUPS}, header([48]), "not a readable mask file"),
        (
            {"a": torch.tensor([28], dtype=torch.uint8)},
            header([1, 8], "2:8"),
            "beyond the 28 candidates",
        ),
        (
            {"a": torch.tensor([0x46, 0x32], dtype=torch.uint8)},
            header([1, 16], "8:16"),
            "12870 candidates",
        ),
    ],
)
def test_damaged_contents_are_refused(
    tensors: dict[str, Tensor], metadata: Any, message: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "m.safetensors", metadata)
    with pytest.raises(SparsifyError, match=message) as error:
        read_masks(tmp_path / "m.safetensors")
    assert ("not a readable" in message) == ("not a readable" in str(error.value))


def test_a_byte_beyond_three_ranks_of_2_4_is_refused(tmp_path: Path) -> None:
    save_file(
        {"a": torch.tensor([216], dtype=torch.uint8)}, tmp_path / "m.safetensors", header([1, 12])
    )
    with pytest.raises(SparsifyError, match="damaged"):
        read_masks(tmp_path / "m.safetensors")
