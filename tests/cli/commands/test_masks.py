"""``sparsify mask``: what it writes, and what it leaves alone."""

from pathlib import Path

import pytest
import torch

from sparsify import SparsifyError
from sparsify.cli.commands import masks
from sparsify.export.mask_file import write_masks
from sparsify.masking.pattern import NMPattern

LAYER = "model.layers.0.self_attn.q_proj"


def test_a_file_that_came_meanwhile_stays(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask_OI = torch.zeros(32, 32, dtype=torch.bool)
    mask_OI[:, ::2] = True
    file, archive = tmp_path / "a.nmask", tmp_path / "a.npz"
    write_masks(file, {LAYER: mask_OI}, NMPattern(2, 4), "")
    base = str(model_folder)
    masks.export_masks(file, archive, base)
    # As if another process wrote it after the look at the place.
    monkeypatch.setattr(masks, "check_free", lambda out: out.write_bytes(b"theirs"))
    for name, write in {
        "imported.nmask": lambda out: masks.import_masks(archive, out, base),
        "exported.npz": lambda out: masks.export_masks(file, out, base),
        "delta.nmask": lambda out: masks.delta(file, file, out),
    }.items():
        out = tmp_path / name
        with pytest.raises(SparsifyError, match=f"{out} exists, and stays; name another file"):
            write(out)
        assert out.read_bytes() == b"theirs"
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
