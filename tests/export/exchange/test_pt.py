"""PyTorch files of masks, and what must not be opened."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify import SparsifyError
from sparsify.export.exchange.layers import LayerShape
from sparsify.export.exchange.pt import read_pt
from tests.export.mask_file.cases import equal, random_mask

Q, K = "model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.k_proj"
SHAPES = {
    Q: LayerShape(6, 8),
    K: LayerShape(4, 4, transposed=True),
    "layers.1.self_attn.q_proj": LayerShape(2, 4),
}
MASKS = {Q: random_mask(6, 8), K: random_mask(4, 4)}
STORED = {Q: MASKS[Q], K: MASKS[K].T.contiguous()}


def write(folder: Path, files: dict[str, Any], **options: Any) -> Path:
    for name, values in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(values, folder / name, **options)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("of_q", "of_k"),
    [
        (f"{Q}.pt", f"{K}.pt"),
        (f"{Q}.weight.mask.pt", f"{K}.mask.pt"),
        (f"mask_{Q}.pt", f"a-{K}.weight.pt"),
        ("model/layers/1/self_attn/q_proj.pt", f"learned/{K}.pt"),
    ],
)
def test_a_folder_of_layers(of_q: str, of_k: str, zipped: bool, tmp_path: Path) -> None:
    files = {of_q: STORED[Q], of_k: STORED[K]}
    write(tmp_path / "m", files, _use_new_zipfile_serialization=zipped)
    assert equal(dict(read_pt(tmp_path / "m", SHAPES)), MASKS)


def test_a_short_name_is_its_own_layer(tmp_path: Path) -> None:
    mask = random_mask(2, 4)
    write(tmp_path / "m", {"layers.1.self_attn.q_proj.pt": mask})
    assert equal(dict(read_pt(tmp_path / "m", SHAPES)), {"layers.1.self_attn.q_proj": mask})


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", ["", ".weight", ".weight.mask"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
def test_a_dictionary_of_any_zeros_and_ones(
    dtype: torch.dtype, suffix: str, zipped: bool, tmp_path: Path
) -> None:
    values = {name + suffix: mask.to(dtype) for name, mask in STORED.items()}
    write(tmp_path, {"m.pt": values}, _use_new_zipfile_serialization=zipped)
    assert equal(dict(read_pt(tmp_path / "m.pt", SHAPES)), MASKS)


def damaged_bool() -> Tensor:
    return torch.full((6, 8), 3, dtype=torch.uint8).view(torch.bool)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.full((6, 8), 0.5), f"the mask of {Q} holds other values than 0 and 1"),
        (damaged_bool(), "other values"),
        (torch.full((6, 8), torch.nan), "other values"),
        (torch.zeros(8, 6), r"is \(8, 6\), but the weight is stored as \(6, 8\)"),
        (torch.zeros(48), r"is \(48,\)"),
        (torch.zeros(6, 8).to_sparse(), "the mask of"),
        (torch.zeros(6, 8, device="meta"), "the mask of"),
        ([1, 0], "is list"),
        ({Q: STORED[Q]}, "is dict"),
    ],
)
def test_what_is_no_mask_is_refused(values: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(SparsifyError, match=message):
        list(read_pt(write(tmp_path / "m", {f"{Q}.pt": values}), SHAPES))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no .pt file in it"),
        ({"optimizer.pt": STORED[Q]}, "'optimizer' names no linear layer"),
        ({f"1{K}.pt": STORED[K]}, f"'1{K}' names no linear layer"),
        ({f"{Q}.pt": STORED[Q], f"x.{Q}.pt": STORED[Q]}, f"a second mask of {Q}, beside"),
    ],
)
def test_names_must_be_those_of_layers(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(SparsifyError, match=message):
        list(read_pt(write(tmp_path / "m", files), SHAPES))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (STORED[Q], "it holds a Tensor; a single file holds a dictionary"),
        ({}, "it holds a dict"),
        ({"x": STORED[Q]}, "'x' names no linear layer"),
        ({7: STORED[Q]}, "'7' names no linear layer"),
        ({Q: STORED[Q], f"{Q}.mask": STORED[Q]}, "a second mask"),
    ],
)
def test_dictionaries_must_be_of_layers(values: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path, {"m.pt": values})
    with pytest.raises(SparsifyError, match=message):
        list(read_pt(tmp_path / "m.pt", SHAPES))


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_no_file_can_run_code(tmp_path: Path) -> None:
    bad, trace = Malicious(tmp_path / "trace"), tmp_path / "trace"
    pickle.loads(pickle.dumps(bad))  # noqa: S301
    assert trace.is_dir()  # it works where it is unpickled
    trace.rmdir()
    write(tmp_path / "zip", {f"{Q}.pt": bad})
    write(tmp_path / "old", {f"{Q}.pt": bad}, _use_new_zipfile_serialization=False)
    write(tmp_path, {"all.pt": {Q: STORED[Q], K: bad}})
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / f"{Q}.pt").write_bytes(pickle.dumps(bad))
    for path in (tmp_path / "zip", tmp_path / "old", tmp_path / "raw", tmp_path / "all.pt"):
        with pytest.raises(SparsifyError, match="not a readable file of tensors"):
            list(read_pt(path, SHAPES))
        assert not trace.exists()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "m", {f"{Q}.pt": STORED[Q]}) / f"{Q}.pt"
    whole = file.read_bytes()
    for data in (b"", b"PK\3\4", whole[: len(whole) // 2], b"text"):
        file.write_bytes(data)
        with pytest.raises(SparsifyError, match=f"{Q}.pt: not a readable file of tensors"):
            list(read_pt(tmp_path / "m", SHAPES))
    with pytest.raises(SparsifyError, match=r"no.pt: not a readable file of tensors"):
        list(read_pt(tmp_path / "no.pt", SHAPES))


def test_a_compressed_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"m.pt": {Q: STORED[Q]}})
    with (
        zipfile.ZipFile(tmp_path / "m.pt") as old,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(SparsifyError, match="a part of it is compressed"):
        list(read_pt(tmp_path / "bomb.pt", SHAPES))
