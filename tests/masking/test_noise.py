"""Noise: bit for bit against whole-number arithmetic written a second time, and in distribution."""

import hashlib
import math

import numpy as np
import pytest
import torch

from sparsify.masking import noise

KEYS = [
    noise.fold(0, step, index, name)
    for step, index, name in [(0, 0, "a"), (1, 0, "a"), (7, 3, "b.q")]
]
EXTREMES = [torch.tensor(0), torch.tensor(-1), torch.tensor(2**63 - 1), torch.tensor(-(2**63))]
WORD = 0xFFFFFFFF


def mix(x: int) -> int:
    """The mixer on unsigned 32-bit numbers."""
    x &= WORD
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & WORD
    x = ((x ^ (x >> 15)) * 0x735A2D97) & WORD
    return x ^ (x >> 15)


def codes(key: int, rows: range, elements: int) -> list[list[int]]:
    """The 23-bit numbers of some rows, one by one."""
    unsigned = key % 2**64
    high, low = unsigned >> 32, unsigned & WORD
    result = []
    for row in rows:
        first = mix(row + high)
        second = mix(first ^ low)
        result.append(
            [mix((mix(column ^ first) + second) & WORD) >> 9 for column in range(elements)]
        )
    return result


def sample_matrix(seed: int) -> torch.Tensor:
    """A million numbers of one key."""
    return noise.uniform(noise.fold("statistics", seed), 1000, 1000)


@pytest.mark.parametrize("key", [*KEYS, *EXTREMES], ids=lambda key: hex(int(key) % 2**64))
def test_every_bit_is_as_in_whole_number_arithmetic(key: torch.Tensor) -> None:
    for row0, elements in ((0, 37), (1000, 5), (2**31 - 9, 3)):
        made = noise.uniform(key, 7, elements, row0)
        assert made.dtype == torch.float32
        expected = [
            [(code + 0.5) / 2**23 for code in row]
            for row in codes(int(key), range(row0, row0 + 7), elements)
        ]
        assert made.double().tolist() == expected


def test_a_key_is_a_known_hash_of_its_words() -> None:
    words = (0, 17, 3, "model.layers.0.mlp.up_proj")
    digest = hashlib.blake2b(b"(0, 17, 3, 'model.layers.0.mlp.up_proj')", digest_size=8).digest()
    key = noise.fold(*words)
    assert int(key) % 2**64 == sum(byte << (8 * i) for i, byte in enumerate(digest))
    assert key.dtype == torch.int64
    assert key.ndim == 0
    assert key.device.type == "cpu"


def test_different_words_make_different_keys() -> None:
    words = [
        (s, t, i, name)
        for s in range(4)
        for t in range(20)
        for i in range(10)
        for name in ("a", "b", "ab")
    ]
    words += [(1, 23), (12, 3), ("1", 23), (1, "23"), (123,), ("a", "b"), ("ab",), ("a,b",)]  # type: ignore[list-item]
    assert len({int(noise.fold(*w)) for w in words}) == len(words)


@pytest.mark.parametrize("make", [noise.uniform, noise.gumbel, noise.normal])
def test_a_shard_makes_its_own_rows_of_the_whole(make) -> None:  # type: ignore[no-untyped-def]
    whole = make(KEYS[2], 12, 10)
    parts = [make(KEYS[2], rows, 10, row0) for row0, rows in ((0, 5), (5, 4), (9, 3))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(make(KEYS[2], 12, 10), whole)


def test_the_first_and_last_codes_stay_inside_and_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    for code, expected in ((0, 2.0**-24), (2**23 - 1, 1 - 2.0**-24)):
        # Make the generator give this code everywhere, by its last permutation.
        bits = torch.tensor(code << 9, dtype=torch.int64).int()
        monkeypatch.setattr(noise, "_mix_", lambda x, _, bits=bits: x.copy_(bits))
        u = noise.uniform(KEYS[0], 2, 4)
        assert u.double().unique().tolist() == [expected]
        assert bool((u > 0).all())
        assert bool((u < 1).all())
        for made in (noise.gumbel(KEYS[0], 2, 4), noise.normal(KEYS[0], 2, 4)):
            assert bool(made.isfinite().all())


@pytest.mark.parametrize("seed", [0, 1])
def test_uniform_numbers_are_uniform(seed: int) -> None:
    u = sample_matrix(seed).double()
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    count = u.numel()
    assert abs(float(u.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / count)
    assert abs(float(u.var()) - 1 / 12) < 4 * math.sqrt(1 / 180 / count)
    # chi-squared over 256 bins: 255 expected, standard deviation sqrt(2 * 255)
    for values in (u, u * 2**8 % 1, u * 2**15 % 1):  # the high, the middle and the low 8 bits of 23
        seen = np.bincount((values.flatten() * 256).long().clamp(max=255).numpy(), minlength=256)
        expected = count / 256
        assert abs(((seen - expected) ** 2 / expected).sum() - 255) < 5 * math.sqrt(2 * 255)
    # The means of rows and of columns scatter as those of independent numbers do.
    for dim in (0, 1):
        scatter = float(u.mean(dim).var()) * 12 * 1000
        assert abs(scatter - 1) < 5 * math.sqrt(2 / 999)


def test_neighbours_are_uncorrelated() -> None:
    u = sample_matrix(0) - 0.5
    other = [noise.uniform(torch.tensor(key), 1000, 1000) - 0.5 for key in (5, 6, 5 + (1 << 32))]

    def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a * b).double().mean()) * 12

    upper = torch.ones(1000, 1000, dtype=torch.bool).triu(1)
    pairs = {
        "columns": (u[:, 1:], u[:, :-1]),
        "rows": (u[1:], u[:-1]),
        "diagonal": (u[1:, 1:], u[:-1, :-1]),
        "two columns": (u[:, 2:], u[:, :-2]),
        "transposed": (u[upper], u.T[upper]),
        "keys": (other[0], other[1]),
        "keys, high word": (other[0], other[2]),
        "steps": (u, noise.uniform(noise.fold("statistics", 1), 1000, 1000) - 0.5),
    }
    for what, (a, b) in pairs.items():
        # mean of products of independent numbers: standard deviation 1 / sqrt(count) after scaling
        assert abs(correlation(a, b)) < 5 / math.sqrt(a.numel()), what
        assert not torch.equal(a, b), what


def test_no_two_rows_hold_the_same_numbers_in_another_order() -> None:
    rows = noise.uniform(KEYS[1], 512, 64).sort(dim=1).values
    assert len(rows.unique(dim=0)) == 512


def test_gumbel_and_normal_moments() -> None:
    count = 1_000_000
    key = noise.fold("moments")
    g = noise.gumbel(key, 1000, 1000).double()
    u = noise.uniform(key, 1000, 1000).double()
    assert torch.allclose(g, -(-u.log()).log(), atol=2e-5, rtol=1e-5)
    variance = math.pi**2 / 6
    assert abs(float(g.mean()) - 0.5772156649) < 4 * math.sqrt(variance / count)
    # The fourth central moment of a Gumbel is 5.4 times its variance squared.
    assert abs(float(g.var()) - variance) < 4 * math.sqrt(4.4 * variance**2 / count)
    z = noise.normal(key, 1000, 1000).double()
    assert abs(float(z.mean())) < 4 / math.sqrt(count)
    assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / count)
    assert abs(float((z**4).mean()) - 3) < 4 * math.sqrt(96 / count)
    for limit, share in ((1.0, 0.158655), (2.0, 0.022750), (3.0, 0.001350)):
        assert abs(float((z > limit).double().mean()) - share) < 4 * math.sqrt(share / count)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own, on import
def test_compiled_noise_is_the_same() -> None:
    compiled = torch.compile(noise.uniform)
    for key in KEYS:
        assert torch.equal(compiled(key, 33, 65, 3), noise.uniform(key, 33, 65, 3))
