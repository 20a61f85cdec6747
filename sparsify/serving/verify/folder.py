"""Check that a folder of sparse weights is what it says, to the bit, without loading its model.

Every tensor is read once, checked by itself, and forgotten.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsify.common.errors import SparsifyError
from sparsify.common.files import read_json
from sparsify.export.manifest import MANIFEST, Manifest, parse_manifest
from sparsify.export.mask_file.file import MaskFile, read_masks
from sparsify.export.mask_file.index import FILE_NAME
from sparsify.masking.coverage import coverage, largest_list
from sparsify.masking.pattern import NMPattern
from sparsify.models.permutation_file import FILE as PERMUTATION
from sparsify.models.permutation_file import Permutation, check_same_order, permutation_of
from sparsify.models.stored_weights import StoredWeights
from sparsify.serving.device_check import cuda_check
from sparsify.serving.verify.base_check import BaseCheck
from sparsify.serving.verify.blocks import matrices_of_blocks
from sparsify.serving.verify.files import check_files
from sparsify.serving.verify.report import BaseReport, Report, unchecked
from sparsify.serving.verify.tensor_check import TensorCheck
from sparsify.serving.verify.text_files import check_text_files


def verify(
    folder: Path, base: str | None = None, pattern: str | None = None, device: str = "cpu"
) -> Report:
    """Check a folder of sparse weights.

    With a manifest: files, manifest, masks and tensors against each other, and every tensor against
    the hash that the export recorded. Without one, but with a pattern: a matrix of the decoder
    blocks counts as dense if the pattern holds in less than half of its groups; all others must
    hold it, and one at least must.

    Args:
        folder: what ``sparsify export`` wrote, or any folder of safetensors files.
        base: the dense model, to compare kept weights and dense tensors with bit by bit.
        pattern: what every masked layer must hold; needed where there is no manifest.
        device: a CUDA device on which to run and time the layers' sparse products; ``cpu`` runs
            none.

    Raises:
        SparsifyError: there is nothing to verify, nothing says the pattern, or there is no such
            base or device.
    """
    folder = Path(folder)
    asked = None if pattern is None else NMPattern.parse(pattern)
    check = None if device == "cpu" else cuda_check(device)
    # Where a manifest says what should be there, what is not is a problem among others.
    weights = StoredWeights(folder, may_lack=(folder / MANIFEST).exists())
    report = Report(
        str(folder), list(weights.damaged), device=None if check is None else check.report
    )
    manifest = _manifest(folder, asked, report)
    known = manifest or Manifest()
    # Somebody else's weights may well come without a tokenizer, or with others beside them.
    found = report.problems if manifest else report.notes
    with _goes_on(report, "configuration and tokenizer"):
        found += check_text_files(folder, known.files or ())
    found += [
        f"{name} is none of the files that a loader reads; some servers read every such file: "
        "remove it"
        for name in weights.others
    ]
    with _goes_on(report, "the folder's files"):
        wrong, notes = check_files(folder, known.files)
        found += wrong
        report.notes += notes
    layers = known.layers
    if asked is not None and not layers:
        with _goes_on(report, "the decoder blocks"):
            layers = matrices_of_blocks(folder, weights, asked)
    permutation = None
    with _goes_on(report, PERMUTATION):
        permutation = _permutation(folder, known, report)
    base_check = None if base is None else BaseCheck(base, manifest, weights, permutation)
    if base_check is not None:
        report.base = BaseReport(str(base))
        report.problems += base_check.problems
        report.notes += base_check.notes
    masks = None
    with _goes_on(report, FILE_NAME):
        masks = _masks(folder, known, permutation, report)
    tensors = TensorCheck(known, asked, masks, base_check, check)
    tensors.run(weights, layers, report)
    held = {row.name for row in report.layers if row.pattern and not row.problems}
    with _goes_on(report, "the share of N:M weights"):
        own = known.own_names()
        sizes = {own.get(name, name): shape for name, shape in tensors.sizes.items()}
        stored = {t for name, layer in layers.items() if name in held for t in layer.tensors}
        masked = {own.get(name, name) for name in stored}
        blocks = largest_list({name: sizes[name] for name in masked} or sizes)
        report.coverage = coverage(sizes, masked, blocks, known.dense)
    if not known.layers and asked is not None and not any(row.pattern for row in report.layers):
        report.problems.append(f"no matrix of the decoder blocks holds {asked}")
    return report


@contextmanager
def _goes_on(report: Report, what: str) -> Iterator[None]:
    """Report whatever fails in one check as a problem, so that the next one is made."""
    try:
        yield
    except Exception as error:
        report.problems.append(unchecked(what, error))


def _manifest(folder: Path, asked: NMPattern | None, report: Report) -> Manifest | None:
    if not (folder / MANIFEST).exists():
        if asked is None:
            raise SparsifyError(
                f"{folder} holds no {MANIFEST}, so nothing says what it should hold; "
                "give a pattern, for instance --pattern 2:4"
            )
        report.notes.append(f"there is no {MANIFEST}: only the pattern and the files are checked")
        return None
    try:
        content = read_json(folder / MANIFEST)
    except SparsifyError as error:
        report.problems.append(str(error))
        return Manifest()
    manifest = parse_manifest(content)
    report.problems += manifest.problems
    stated = content if isinstance(content, dict) else {}
    if claims := [name for name in ("run", "protocol", "scores") if name in stated]:
        report.notes.append(
            f"{MANIFEST}: {', '.join(claims)} are its writer's claims, and are not checked"
        )
    if manifest.files is None:
        report.notes.append(
            f"{MANIFEST} lists no files, as those of older exports: configuration and tokenizer "
            "may have changed since; export again to have them checked"
        )
    if manifest.changes != "nothing":
        report.notes.append(
            f"changed by the strategy ({manifest.weights}): {manifest.changes}; these are compared "
            "with what the export wrote, not with the base"
        )
    return manifest


def _permutation(folder: Path, manifest: Manifest, report: Report) -> Permutation | None:
    """The orders of channels in which the folder's weights are stored."""
    found = permutation_of(folder)
    digest = "" if found is None else found.digest
    if digest != manifest.permutation:
        stated = manifest.permutation[:12] or "no orders of channels"
        report.problems.append(
            f"{PERMUTATION} holds {digest[:12] or 'nothing'}, and {MANIFEST} says {stated}"
        )
    elif found is not None and manifest.base_hash and found.base_hash != manifest.base_hash:
        report.problems.append(
            f"{PERMUTATION} is for base {found.base_hash[:12]}, and {MANIFEST} says "
            f"{manifest.base_hash[:12]}"
        )
    return found


def _masks(
    folder: Path, manifest: Manifest, permutation: Permutation | None, report: Report
) -> MaskFile | None:
    """The stored masks, None where there are none to compare with."""
    if not manifest.layers and not (manifest.tensors and (folder / FILE_NAME).exists()):
        return None
    masks = read_masks(folder)
    wanted = manifest.base_hash if permutation is None else permutation.permuted_hash
    if wanted and masks.base_hash != wanted:
        report.problems.append(
            f"{FILE_NAME} is for base {masks.base_hash[:12]}, and the folder says {wanted[:12]}"
        )
    with _goes_on(report, FILE_NAME):
        check_same_order(masks.permutation, permutation, FILE_NAME, PERMUTATION)
    for name, pattern in masks.patterns.items():
        if name not in manifest.layers:
            report.problems.append(f"{name}: {FILE_NAME} masks it, and {MANIFEST} does not")
        elif pattern != (stated := manifest.layers[name].pattern):
            report.problems.append(f"{name}: {FILE_NAME} holds {pattern}, and {MANIFEST} {stated}")
    return masks
