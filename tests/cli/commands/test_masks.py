"""``sparsify mask``: what it writes, and what it leaves alone."""

from pathlib import Path

import pytest
import torch

from sparsify import SparsifyError
from sparsify.cli.commands import masks
from sparsify.cli.main import main
from sparsify.export.mask_file import write_masks
from sparsify.masking.pattern import NMPattern

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ("mask export a.nmask out.npz --base {}", "--base takes 'embedded', a folder that save"),
        ("mask export a.nmask out --base {}", "--base takes 'embedded', a folder that save"),
        ("mask import a.npz out.nmask --base {}", "--base takes 'embedded', a folder that save"),
        ("verify model --pattern 2:4 --base {}", "--base takes 'embedded', a folder that save"),
        ("mask import {} out.nmask", "name a folder that save_pretrained or sparsify export wrote"),
    ],
)
def test_a_model_that_cannot_be_loaded_names_the_commands_own_option(
    words: str,
    fix: str,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(model_folder)
    Path("bad").mkdir()
    Path("bad/config.json").write_text('{"model_type": "none"}')
    mask_OI = torch.arange(32).expand(32, 32) % 2 == 0
    write_masks(Path("a.nmask"), {LAYER: mask_OI}, NMPattern(2, 4), "")
    Path("a.npz").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        main(words.format("bad").split())
    message = capsys.readouterr().err
    assert stop.value.code
    assert fix in message
    assert "name_or_path" not in message


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
