"""The mask file: its bytes, its round trip, and what is refused."""

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify import NMPattern, SparsifyError
from sparsify.export.mask_file.file import MaskFile, read_masks, write_masks
from sparsify.export.mask_file.index import FILE_NAME, MAGIC
from tests.export.mask_file.damage import reindexed

TWO_FOUR = NMPattern(2, 4)
BASE = "0" * 64
PATTERNS = [f"{n}:{m}" for m in range(2, 17) for n in range(1, min(m, 9))]


def random_masks(
    pattern: NMPattern, shapes: dict[str, tuple[int, int]], seed: int = 0
) -> dict[str, Tensor]:
    """A random candidate for every group; shapes are (O, G)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: pattern.unrank(torch.randint(pattern.candidates, (rows, groups), generator=generator))
        for name, (rows, groups) in shapes.items()
    }


def written(path: Path, pattern: NMPattern = TWO_FOUR, **options: Any) -> dict[str, Tensor]:
    """A file of two layers."""
    masks = random_masks(pattern, {"model.a": (3, 5), "model.b.c": (7, 6)})
    write_masks(path, masks, pattern, BASE, **options)
    return masks


def assert_holds(found: MaskFile, masks: dict[str, Tensor]) -> None:
    assert list(found) == list(masks)
    for name, mask in masks.items():
        assert found[name].dtype == torch.bool
        assert torch.equal(found[name], mask), name


def changed(mask: Tensor, share: float, seed: int = 0) -> Tensor:
    """Another 2:4 mask that differs in about this share of groups."""
    generator = torch.Generator().manual_seed(seed)
    ranks = TWO_FOUR.rank(mask)
    move = torch.randint(1, 6, ranks.shape, generator=generator)
    move = move * (torch.rand(ranks.shape, generator=generator) < share)
    return TWO_FOUR.unrank((ranks + move) % 6)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_masks_of_every_pattern_come_back(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / FILE_NAME
    pattern = NMPattern.parse(data.draw(st.sampled_from(PATTERNS)))
    printable = st.characters().filter(str.isprintable)
    name, sizes = st.text(printable, min_size=1, max_size=8), st.integers(1, 12)
    shapes = data.draw(st.dictionaries(name, st.tuples(sizes, sizes), max_size=3))
    masks = random_masks(pattern, shapes, data.draw(st.integers(0, 10**6)))
    write_masks(path, masks, pattern, BASE, {"from": "a test"})
    found = read_masks(path)
    assert found.base_hash == BASE
    assert found.index.lineage == {"from": "a test"}
    assert set(found.patterns.values()) <= {pattern}
    assert_holds(found, masks)


@pytest.mark.parametrize("text", PATTERNS)
def test_every_candidate_of_every_pattern_comes_back(text: str, tmp_path: Path) -> None:
    pattern = NMPattern.parse(text)
    masks = {"all": pattern.table().flatten()[None]}
    write_masks(tmp_path / FILE_NAME, masks, pattern, BASE)
    assert_holds(read_masks(tmp_path), masks)


def test_the_bytes_by_eye(tmp_path: Path) -> None:
    # 1100 0011 1010: ranks 0, 5, 1 are 0 + 5 * 6 + 1 * 36 = 66, in a word of 44 bits.
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 1, 0]]).bool()
    write_masks(tmp_path / "m.nmask", {"a": mask}, TWO_FOUR, BASE, {"run": 7})
    content = (tmp_path / "m.nmask").read_bytes()
    code = bytes([66, 0, 0, 0, 0, 0])
    sha = hashlib.sha256(code).hexdigest()
    index = (
        f'{{"base":"{BASE}","lineage":{{"run":7}},"prior":null,"layers":'
        f'{{"a":{{"shape":[1,12],"pattern":"2:4","sha256":"{sha}"}}}}}}'
    ).encode()
    assert MAGIC == b"nmask\x00\x00\x02"
    ends = hashlib.sha256(index).digest() + len(index).to_bytes(8, "little") + MAGIC
    assert content == MAGIC + code + index + ends


def test_a_file_is_as_small_as_promised(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.self_attn.q_proj": (256, 128) for i in range(20)}
    write_masks(tmp_path / FILE_NAME, random_masks(TWO_FOUR, shapes), TWO_FOUR, BASE)
    weights = 20 * 256 * 512
    size = (tmp_path / FILE_NAME).stat().st_size
    assert 0.6462 * weights / 8 < size < 1.01 * 0.6462 * weights / 8 + 256 * 20


def test_a_folder_stands_for_its_mask_file_and_a_layer_is_read_by_itself(tmp_path: Path) -> None:
    masks = written(tmp_path / FILE_NAME)
    assert_holds(read_masks(tmp_path), masks)
    content = bytearray((tmp_path / FILE_NAME).read_bytes())
    content[len(MAGIC)] ^= 1  # the first layer's first byte
    (tmp_path / FILE_NAME).write_bytes(content)
    found = read_masks(tmp_path)
    assert torch.equal(found["model.b.c"], masks["model.b.c"])
    with pytest.raises(SparsifyError, match=r"mask of model\.a is damaged .*export the file again"):
        found["model.a"]


def test_masks_of_several_patterns_come_back(tmp_path: Path) -> None:
    texts = {"a": "2:4", "b": "1:4", "c": "4:8"}
    patterns = {name: NMPattern.parse(text) for name, text in texts.items()}
    masks = {name: random_masks(p, {name: (3, 4)})[name] for name, p in patterns.items()}
    write_masks(tmp_path / FILE_NAME, masks, patterns, BASE)
    assert_holds(read_masks(tmp_path), masks)
    assert read_masks(tmp_path).patterns == patterns


def test_what_is_no_mask_is_not_written_and_the_former_file_stays(tmp_path: Path) -> None:
    former = written(tmp_path / FILE_NAME)
    masks = random_masks(TWO_FOUR, {"a": (2, 2), "b": (2, 2)})
    masks["b"][1, :4] = True
    with pytest.raises(SparsifyError, match="b: row 1, group 0 keeps 4 weights; a 2:4 mask"):
        write_masks(tmp_path / FILE_NAME, masks, TWO_FOUR, BASE)
    with pytest.raises(SparsifyError, match="'a.x1b' holds control characters"):
        write_masks(tmp_path / FILE_NAME, {"a\x1b": masks["a"]}, TWO_FOUR, BASE)
    pair = ("a", masks["a"])
    with pytest.raises(SparsifyError, match="a: its mask is in the file already"):
        write_masks(tmp_path / FILE_NAME, [pair, pair], TWO_FOUR, BASE)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert_holds(read_masks(tmp_path), former)


def test_a_digest_names_masks_and_nothing_else(tmp_path: Path) -> None:
    masks = written(tmp_path / "a.nmask")
    digest = read_masks(tmp_path / "a.nmask").digest
    write_masks(tmp_path / "b.nmask", dict(reversed(masks.items())), TWO_FOUR, "", {"other": 1})
    assert read_masks(tmp_path / "b.nmask").digest == digest
    masks["model.a"] = changed(masks["model.a"], 0.3)
    write_masks(tmp_path / "b.nmask", masks, TWO_FOUR, BASE)
    assert read_masks(tmp_path / "b.nmask").digest != digest


# Delta files


@pytest.mark.parametrize("share", [0.0, 0.03, 0.3, 1.0])
def test_a_delta_holds_what_changed(share: float, tmp_path: Path) -> None:
    masks = random_masks(TWO_FOUR, {"a": (64, 64), "b": (64, 32), "only former": (2, 2)})
    write_masks(tmp_path / "prior.nmask", masks, TWO_FOUR, BASE)
    prior = read_masks(tmp_path / "prior.nmask")
    new = {name: changed(masks[name], share) for name in ("a", "b")}
    new["only new"] = random_masks(TWO_FOUR, {"n": (3, 3)})["n"]
    write_masks(tmp_path / "full.nmask", new, TWO_FOUR, BASE)
    write_masks(tmp_path / "delta.nmask", new, TWO_FOUR, BASE, {"domain": "python"}, prior)
    found = read_masks(tmp_path / "delta.nmask", prior)
    assert_holds(found, new)
    assert found.digest == read_masks(tmp_path / "full.nmask").digest
    groups = {name: TWO_FOUR.rank(new[name]) != TWO_FOUR.rank(masks[name]) for name in ("a", "b")}
    counts = {name: entry.changed for name, entry in found.index.layers.items()}
    expected = {name: int(moved.sum()) for name, moved in groups.items()} | {"only new": None}
    assert counts == (expected if share < 1 else dict.fromkeys(expected))
    sizes = [(tmp_path / f"{name}.nmask").stat().st_size for name in ("delta", "full")]
    assert sizes[0] < sizes[1] * {0.0: 0.35, 0.03: 0.55, 0.3: 0.99, 1.0: 1.1}[share]


def test_deltas_follow_each_other(tmp_path: Path) -> None:
    masks = random_masks(TWO_FOUR, {"a": (64, 64)})
    write_masks(tmp_path / "0.nmask", masks, TWO_FOUR, BASE)
    file = read_masks(tmp_path / "0.nmask")
    for i in range(1, 4):
        masks = {"a": changed(masks["a"], 0.05, seed=i)}
        write_masks(tmp_path / f"{i}.nmask", masks, TWO_FOUR, BASE, prior=file)
        file = read_masks(tmp_path / f"{i}.nmask", file)
        assert_holds(file, masks)


def test_a_delta_without_its_prior_is_an_error(tmp_path: Path) -> None:
    masks = written(tmp_path / "prior.nmask")
    prior = read_masks(tmp_path / "prior.nmask")
    write_masks(tmp_path / "delta.nmask", masks, TWO_FOUR, BASE, prior=prior)
    for given_prior, message in ((None, "none was given"), ("other", "other.nmask is")):
        if given_prior:
            other = masks | {"model.a": changed(masks["model.a"], 1)}
            write_masks(tmp_path / "other.nmask", other, TWO_FOUR, BASE)
        with pytest.raises(SparsifyError, match=f"{prior.digest[:12]}, but .*{message}.*mask join"):
            read_masks(
                tmp_path / "delta.nmask",
                read_masks(tmp_path / "other.nmask") if given_prior else None,
            )


def test_a_delta_that_names_no_prior_is_refused(tmp_path: Path) -> None:
    masks = written(tmp_path / "prior.nmask")
    prior = read_masks(tmp_path / "prior.nmask")
    write_masks(tmp_path / "delta.nmask", masks, TWO_FOUR, BASE, prior=prior)
    content = (tmp_path / "delta.nmask").read_bytes()
    (tmp_path / "delta.nmask").write_bytes(reindexed(content, lambda i: i.update(prior=None)))
    with pytest.raises(SparsifyError, match="holds changes, but names no prior"):
        read_masks(tmp_path / "delta.nmask", prior)


def test_a_delta_whose_bytes_changed_is_refused_wherever_they_did(tmp_path: Path) -> None:
    masks = random_masks(TWO_FOUR, {"a": (8, 8)})
    write_masks(tmp_path / "prior.nmask", masks, TWO_FOUR, BASE)
    prior = read_masks(tmp_path / "prior.nmask")
    write_masks(tmp_path / "d.nmask", {"a": changed(masks["a"], 0.1)}, TWO_FOUR, BASE, prior=prior)
    content = (tmp_path / "d.nmask").read_bytes()
    for byte in range(len(content)):
        for bit in (1, 128):
            flipped = bytearray(content)
            flipped[byte] ^= bit
            (tmp_path / "d.nmask").write_bytes(flipped)
            with pytest.raises(SparsifyError):
                read_masks(tmp_path / "d.nmask", prior)["a"]


# Damage


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    written(tmp_path / FILE_NAME)
    content = (tmp_path / FILE_NAME).read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / FILE_NAME).write_bytes(flipped)
        with pytest.raises(SparsifyError):  # noqa: PT012
            for name in (found := read_masks(tmp_path)):
                found[name]


def test_every_cut_and_every_addition_is_noticed(tmp_path: Path) -> None:
    written(tmp_path / FILE_NAME)
    content = (tmp_path / FILE_NAME).read_bytes()
    for size in range(len(content)):
        (tmp_path / FILE_NAME).write_bytes(content[:size])
        with pytest.raises(SparsifyError, match="not a readable mask file"):
            read_masks(tmp_path)
    for more in (b"\0", MAGIC, content):
        (tmp_path / FILE_NAME).write_bytes(content + more)
        with pytest.raises(SparsifyError, match="not a readable mask file"):
            read_masks(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE_NAME)
    with pytest.raises(SparsifyError, match="it is no regular file"):
        read_masks(tmp_path)


def test_a_missing_file_is_an_error_that_says_what_writes_one(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.nmask"):
        with pytest.raises(SparsifyError, match="not a readable mask file.*sparsify export"):
            read_masks(path)


def test_another_version_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"nmask\x00\x01\x03" + bytes(100))
    with pytest.raises(SparsifyError, match="version 259, and this sparsify reads version 2"):
        read_masks(tmp_path)


def entry(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda index: index["layers"]["model.a"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry(shape=[3, 24]), "layers end at byte"),
        (entry(shape=[10**12, 10**12]), "layers end at byte"),
        (entry(shape=[-3, -20]), "shape"),
        (entry(shape=[0, 20]), "shape"),
        (entry(shape=[3.0, 20]), "shape"),
        (entry(shape=[True, 60]), "shape"),
        (entry(shape=[3, 22]), "22 columns do not divide into groups of 4"),
        (entry(shape=[60]), "unpack"),
        (entry(shape=None), "unpack"),
        (entry(pattern="4:2"), "pattern '4:2'"),
        (entry(pattern="1:4"), "layers end at byte"),
        (entry(pattern=7), "pattern '7'"),
        (entry(sha256="ab"), "sha256 'ab'"),
        (entry(sha256=5), "expected string"),
        (entry(changed=-1), "changed groups"),
        (entry(changed=16), "changed groups"),
        (entry(changed="1"), "changed '1'"),
        (lambda index: index.pop("layers"), "'layers'"),
        (lambda index: index.pop("base"), "'base'"),
        (lambda index: index.update(layers=[]), "items"),
        (lambda index: index.update(layers={}), "layers end at byte 8"),
        (lambda index: index.update(base=5), "wrong type"),
        (lambda index: index.update(lineage=[]), "wrong type"),
        (lambda index: index["layers"].update(b=5), "not subscriptable"),
        (
            lambda index: index["layers"].update({"a\x1b": index["layers"].pop("model.a")}),
            "holds control characters",
        ),
    ],
)
def test_an_index_that_is_signed_and_wrong_is_refused(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    written(tmp_path / FILE_NAME)
    content = reindexed((tmp_path / FILE_NAME).read_bytes(), change)
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(SparsifyError, match=f"not a readable mask file.*{message}"):
        read_masks(tmp_path)


def test_a_code_that_is_signed_and_wrong_is_refused(tmp_path: Path) -> None:
    written(tmp_path / FILE_NAME)
    content = bytearray((tmp_path / FILE_NAME).read_bytes())
    code = bytes([255] * 6)
    content[len(MAGIC) : len(MAGIC) + 6] = code
    signed = reindexed(bytes(content), entry(sha256=hashlib.sha256(code).hexdigest()))
    (tmp_path / FILE_NAME).write_bytes(signed)
    with pytest.raises(SparsifyError, match=r"mask of model\.a is damaged \(.*"):
        read_masks(tmp_path)["model.a"]


def test_an_index_that_nests_without_end_is_refused(tmp_path: Path) -> None:
    index = b"[" * 100_000
    ends = hashlib.sha256(index).digest() + len(index).to_bytes(8, "little") + MAGIC
    (tmp_path / FILE_NAME).write_bytes(MAGIC + index + ends)
    with pytest.raises(SparsifyError, match="not a readable mask file"):
        read_masks(tmp_path)


def test_a_small_file_that_claims_to_be_huge_takes_no_memory(tmp_path: Path) -> None:
    """In a process whose memory is bounded: one that believed the sizes would die."""
    written(tmp_path / FILE_NAME)
    content = (tmp_path / FILE_NAME).read_bytes()
    claims = [
        reindexed(content, entry(shape=[2**20, 2**20])),
        content[:-16] + (2**40).to_bytes(8, "little") + MAGIC,
        reindexed(content, entry(shape=[2**20, 2**20], changed=2**35)),
    ]
    for i, claim in enumerate(claims):
        (tmp_path / f"{i}.nmask").write_bytes(claim)
    script = """
import resource, sys
from pathlib import Path
from sparsify import SparsifyError
from sparsify.export.mask_file.file import read_masks
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**28, now + 2**28))
for path in sys.argv[1:]:
    try:
        read_masks(Path(path))
    except SparsifyError as error:
        print(error)
"""
    paths = [str(tmp_path / f"{i}.nmask") for i in range(len(claims))]
    done = subprocess.run(
        [sys.executable, "-c", script, *paths], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("not a readable mask file") == len(claims)


def test_random_damage_never_gives_a_wrong_mask(tmp_path: Path) -> None:
    masks = written(tmp_path / "whole.nmask")
    content = (tmp_path / "whole.nmask").read_bytes()
    rng = random.Random(0)  # noqa: S311
    path = tmp_path / "damaged.nmask"
    for _ in range(500):
        damaged = bytearray(content)
        start, size = rng.randrange(len(content)), rng.randrange(40)
        damaged[start : start + size] = rng.randbytes(rng.choice((0, size, size + 1)))
        path.write_bytes(damaged)
        try:
            found = read_masks(path)
            got = {name: found[name] for name in found}
        except SparsifyError:
            continue
        assert bytes(damaged) == content
        assert all(torch.equal(got[name], mask) for name, mask in masks.items())


def test_an_index_that_cannot_be_written_leaves_the_former_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = written(tmp_path / FILE_NAME)

    def fail(index: Any) -> bytes:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("sparsify.export.mask_file.index.Index.to_bytes", fail)
        with pytest.raises(OSError, match="no space left"):
            written(tmp_path / FILE_NAME)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert_holds(read_masks(tmp_path), former)
