"""The NumPy archive, against a slow writer, and what damaged files do."""

import io
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsify import SparsifyError
from sparsify.export.exchange.layers import LayerShape, stored_shapes
from sparsify.export.exchange.npz import read_npz, write_npz
from sparsify.models.base import load_skeleton
from tests.export.mask_file.cases import EXPORTS, equal, exported, random_mask

SHAPES = {"a.q": LayerShape(6, 8), "a.k": LayerShape(3, 4)}
MASKS = {"a.q": random_mask(6, 8), "a.k": random_mask(3, 4)}
KEY = "a.q.weight.mask"


def slow_bits(mask: Tensor) -> np.ndarray:
    """Bit by bit, the first in the highest place."""
    values = [int(value) for row in mask.tolist() for value in row]
    values += [0] * (-len(values) % 8)
    return np.array(
        [
            sum(bit << (7 - i) for i, bit in enumerate(values[at : at + 8]))
            for at in range(0, len(values), 8)
        ],
        dtype=np.uint8,
    )


def slow_write(path: Path, **changed: object) -> Path:
    """An archive of ``MASKS`` with some entries changed; None leaves one out."""
    entries: dict[str, object] = {f"{n}.weight.mask": slow_bits(mask) for n, mask in MASKS.items()}
    entries |= changed
    np.savez_compressed(path, **{k: v for k, v in entries.items() if v is not None})  # type: ignore[arg-type]
    return path


def raw(path: Path, data: bytes, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """An archive with one entry of these bytes."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(f"{KEY}.npy", data)
    return path


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize("suffix", [".weight.mask", ".mask"])
def test_reads_what_a_slow_writer_wrote(suffix: str, tmp_path: Path) -> None:
    entries = {name + suffix: slow_bits(mask) for name, mask in MASKS.items()}
    np.savez_compressed(tmp_path / "m.npz", **entries)  # type: ignore[arg-type]
    assert equal(dict(read_npz(tmp_path / "m.npz", SHAPES)), MASKS)


def test_a_transposed_weight_has_its_mask_transposed(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", **{KEY: slow_bits(MASKS["a.q"].T)})
    found = dict(read_npz(tmp_path / "m.npz", {"a.q": LayerShape(6, 8, transposed=True)}))
    assert equal(found, {"a.q": MASKS["a.q"]})


def test_writes_what_numpy_reads(tmp_path: Path) -> None:
    write_npz(tmp_path / "m.npz", MASKS, {"a.k": LayerShape(3, 4, transposed=True)})
    with np.load(tmp_path / "m.npz", allow_pickle=False) as found:
        assert sorted(found) == ["a.k.weight.mask", "a.q.weight.mask"]
        assert np.array_equal(found[KEY], slow_bits(MASKS["a.q"]))
        assert np.array_equal(found["a.k.weight.mask"], slow_bits(MASKS["a.k"].T))
    assert [path.name for path in tmp_path.iterdir()] == ["m.npz"]


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_are_one_mask_under_the_name_of_their_parameter(
    transposed: bool, tmp_path: Path
) -> None:
    masks, shapes = {"a.q": MASKS["a.q"]}, {"a.q": LayerShape(6, 8, transposed, experts=2)}
    write_npz(tmp_path / "m.npz", masks, shapes)
    first, second = MASKS["a.q"][:3], MASKS["a.q"][3:]
    stored = torch.cat([first.T, second.T] if transposed else [first, second])
    with np.load(tmp_path / "m.npz", allow_pickle=False) as found:
        assert list(found) == ["a.q.mask"]
        assert np.array_equal(found["a.q.mask"], slow_bits(stored))
    assert equal(dict(read_npz(tmp_path / "m.npz", shapes)), masks)


def test_a_failed_write_leaves_the_former_file(tmp_path: Path) -> None:
    write_npz(tmp_path / "m.npz", MASKS)
    before = (tmp_path / "m.npz").read_bytes()
    with pytest.raises(AttributeError):
        write_npz(tmp_path / "m.npz", {**MASKS, "a.v": None})  # type: ignore[dict-item]
    assert [path.name for path in tmp_path.iterdir()] == ["m.npz"]
    assert (tmp_path / "m.npz").read_bytes() == before
    write_npz(tmp_path / "m.npz", MASKS)
    assert (tmp_path / "m.npz").read_bytes() == before  # equal masks make equal files


@pytest.mark.parametrize(("family", "pattern"), EXPORTS)
def test_exports_come_back(family: str, pattern: str, tmp_path: Path) -> None:
    masks = exported(family, pattern, tmp_path)
    shapes = stored_shapes(load_skeleton(str(tmp_path / "base")))
    write_npz(tmp_path / "m.npz", masks, shapes)
    assert equal(dict(read_npz(tmp_path / "m.npz", shapes)), masks)
    with np.load(tmp_path / "m.npz") as found:
        for name, shape in shapes.items():
            if name in masks:  # what the authors' loader does with every entry
                bits = np.unpackbits(found[f"{name}.weight.mask"])
                assert torch.equal(
                    shape.from_stored(torch.tensor(bits).view(shape.stored)),
                    masks[name].to(torch.uint8),
                )


def test_only_one_mask_is_read_at_a_time(tmp_path: Path) -> None:
    slow_write(tmp_path / "m.npz", **{"a.k.weight.mask": np.zeros(3, np.uint8)})
    found = read_npz(tmp_path / "m.npz", SHAPES)
    assert torch.equal(next(found)[1], MASKS["a.q"])
    with pytest.raises(SparsifyError, match=r"an array \(3,\) of uint8"):
        next(found)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({KEY: np.zeros(7, np.uint8)}, r"'a.q.weight.mask': it is an array \(7,\) of uint8"),
        ({KEY: np.zeros((6, 8), np.bool_)}, r"an array \(6, 8\) of bool; .* 6 x 8 are 6 uint8"),
        ({KEY: np.zeros(6, np.int8)}, "of int8"),
        ({KEY: np.array([{}] * 6, dtype=object)}, "of object"),
        ({KEY: np.zeros(5000, np.uint8)}, "unpacks to 5128 bytes"),
        ({"a.k.weight.mask": slow_bits(MASKS["a.k"]) | np.uint8(1)}, "behind the last weight"),
        ({"a.v.weight.mask": np.zeros(6, np.uint8)}, "'a.v.weight.mask' names no linear layer"),
        ({"a.q.weight": np.zeros(6, np.uint8)}, "'a.q.weight' does not name a mask"),
        ({"a.q.mask": slow_bits(MASKS["a.q"])}, "a second mask of a.q"),
        (dict.fromkeys(f"{name}.weight.mask" for name in MASKS), "the archive holds no masks"),
    ],
)
def test_wrong_contents_are_named(changed: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(SparsifyError, match=f"m.npz.*{message}"):
        list(read_npz(slow_write(tmp_path / "m.npz", **changed), SHAPES))


BITS = npy(slow_bits(MASKS["a.q"]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (BITS[:-1], "its array holds 5 bytes"),
        (BITS + b"\0", "its array holds 6 bytes"),
        (b"\x93NUMPX" + BITS[6:], "damaged .*magic"),
        (BITS[:6] + b"\3\0" + BITS[8:], r"damaged \(npy version \(3, 0\)\)"),
        (BITS[:10] + b"-" * 100 + BITS[110:], "damaged"),
        (BITS[:10] + b"{" * 118 + BITS[128:], "damaged"),
        (BITS[:8] + b"\xff\xff" + BITS[10:], "damaged"),
        (b"", "damaged"),
    ],
)
def test_wrong_arrays_are_named(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(SparsifyError, match=f"m.npz: '{KEY}'.*{message}"):
        list(read_npz(raw(tmp_path / "m.npz", data), SHAPES))


def test_only_the_methods_of_numpy_are_unpacked(tmp_path: Path) -> None:
    path = raw(tmp_path / "m.npz", BITS, zipfile.ZIP_BZIP2)
    with pytest.raises(SparsifyError, match="compressed by method 12"):
        list(read_npz(path, SHAPES))


def test_a_bomb_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = raw(tmp_path / "m.npz", npy(np.zeros(2**24, np.uint8)))
    assert path.stat().st_size < 2**16

    def unpacked(*args: object, **kwargs: object) -> None:
        raise AssertionError("an entry was opened")

    monkeypatch.setattr(zipfile.ZipFile, "open", unpacked)
    with pytest.raises(SparsifyError, match="unpacks to 16777344 bytes"):
        list(read_npz(path, SHAPES))


def test_a_bomb_that_lies_about_its_size_is_not_unpacked_further(tmp_path: Path) -> None:
    data = npy(np.zeros(2**20, np.uint8)).replace(b"(1048576,)", b"(6,)      ")
    path = raw(tmp_path / "m.npz", data)
    size = len(data).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(size, (134).to_bytes(4, "little")))
    with pytest.raises(SparsifyError, match="m.npz"):
        list(read_npz(path, SHAPES))


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"not a zip" * 100])
def test_what_is_no_archive_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.npz").write_bytes(data)
    with pytest.raises(SparsifyError, match="not a readable npz archive"):
        list(read_npz(tmp_path / "m.npz", SHAPES))
    with pytest.raises(SparsifyError, match="nothing.npz: not a readable npz archive"):
        list(read_npz(tmp_path / "nothing.npz", SHAPES))


def test_no_damage_is_read_as_another_mask(tmp_path: Path) -> None:
    path, whole = tmp_path / "m.npz", slow_write(tmp_path / "whole.npz").read_bytes()
    rng = random.Random(0)  # noqa: S311
    refused = 0
    for trial in range(600):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data if trial % 4 else whole[: rng.randrange(len(whole))])
        try:
            found = dict(read_npz(path, SHAPES))
        except SparsifyError:
            refused += 1
        else:  # the bit meant nothing: a time, a system
            assert equal(found, MASKS)
    assert refused > 300
