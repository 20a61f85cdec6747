"""The optimizer that takes gradients in backward: its steps by hand, what it keeps, rounding."""

import copy
import gc
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsify import SparsifyError
from sparsify.masking import in_place, noise
from sparsify.masking.in_place import InPlaceMomentum

SHAPES = ((6, 8), (5, 4, 3), (7,))


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def loss(params: list[nn.Parameter], number: int, share: float = 1.0) -> Tensor:
    """A loss whose gradients are other random numbers for each ``number``, very unlike in size."""
    generator = torch.Generator().manual_seed(100 + number)
    terms = [
        (p.float() * torch.randn(p.shape, generator=generator) * 10.0 ** (3 * k)).sum()
        for k, p in enumerate(params)
    ]
    return share * torch.stack(terms).sum()


def by_hand(
    params: list[nn.Parameter],
    steps: list[list[list[Tensor]]],
    lr: float,
    beta: float,
    decay: float,
) -> list[np.ndarray[Any, Any]]:
    """The same steps in numpy; ``steps`` holds the gradients of each step. Squares are estimated
    by random sums, whose signs are made again here.
    """
    values = [p.detach().double().numpy().copy() for p in params]
    v = [np.zeros_like(value) for value in values]
    s = [np.zeros(len(value)) for value in values]
    for t, gradients in enumerate(steps, start=1):
        for k, gradient in enumerate(gradients):
            g = gradient.double().numpy()
            rows = g.reshape(len(g), -1)
            uniform = noise.uniform(noise.fold("signs", 0, t - 1), rows.shape[1], 16).numpy()
            squares = (rows @ np.where(uniform > 0.5, 1.0, -1.0)) ** 2
            v[k] = beta * v[k] + (1 - beta) * g
            s[k] = decay * s[k] + (1 - decay) * squares.mean(1) / rows.shape[1]
            mean, square = v[k] / (1 - beta**t), s[k] / (1 - decay**t)
            size = np.sqrt(np.maximum(square, 0.01 * square.mean()))
            values[k] -= lr * mean / size.reshape(-1, *[1] * (g.ndim - 1))
    return values


def gradients(params: list[nn.Parameter], numbers: list[int]) -> list[Tensor]:
    """The mean gradient of some losses, by autograd on copies."""
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    torch.stack([loss(twins, n) for n in numbers]).mean().backward()
    return [twin.grad for twin in twins]  # type: ignore[misc]


def taken(optimizer: InPlaceMomentum) -> list[bool]:
    """Which momenta have got a gradient."""
    return [bool(state["momentum"].any()) for state in optimizer.state.values()]


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_are_those_of_the_equations(momentum: float, micro_batches: int) -> None:
    params = parameters()
    numbers = [[s * micro_batches + k for k in range(micro_batches)] for s in range(4)]
    expected = by_hand(params, [gradients(params, n) for n in numbers], 0.02, momentum, 0.7)
    optimizer = InPlaceMomentum(params, 0.02, momentum, 0.7)
    for step in numbers:
        for number in step:
            loss(params, number, 1 / micro_batches).backward()
            assert all(p.grad is None for p in params)  # taken in backward
        optimizer.step()
    for parameter, value in zip(params, expected, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=1e-5, atol=1e-6)
    assert [list(optimizer.state[p]) for p in params] == [["step", "momentum", "square"]] * 3


def test_steps_are_as_large_as_gradients_agree() -> None:
    moved: dict[str, list[float]] = {"equal": [], "random": []}
    for kind, sizes in moved.items():
        parameter = nn.Parameter(torch.zeros(4096, 1))  # the random sums of one number are exact
        optimizer = InPlaceMomentum([parameter], 0.02)
        for number in range(100):
            before = parameter.detach().clone()
            generator = torch.Generator().manual_seed(0 if kind == "equal" else number)
            (parameter * torch.randn(4096, 1, generator=generator).sign()).sum().backward()
            optimizer.step()
            sizes.append(float((parameter.detach() - before).square().mean().sqrt()))
    assert moved["equal"] == pytest.approx([0.02] * 100, rel=1e-4)
    assert moved["random"][0] == pytest.approx(0.02, rel=1e-4)
    noise_share = math.sqrt((1 - 0.9) / (1 + 0.9))  # of a mean with these weights
    assert moved["random"][-1] == pytest.approx(0.02 * noise_share, rel=0.05)


@pytest.mark.parametrize("shape", [(96, 64), (13, 7), (300, 1000)])
def test_random_sums_tell_the_size_of_each_rows_gradients(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.zeros(shape))
    gradient = torch.randn(shape, generator=generator)
    gradient *= 10 ** torch.randn(shape[0], 1, generator=generator)
    gradient[:, -1:] *= 10  # as one large input of a layer makes it
    optimizer = InPlaceMomentum([parameter], decay=0.999)
    parts: dict[int, list[Tensor]] = {1: [], 3: []}
    for _ in range(200):
        for micro_batches, found in parts.items():
            for _ in range(micro_batches):
                (parameter * gradient).sum().div(micro_batches).backward()
            [sums] = optimizer._sums.values()
            found.append(sums.clone())
            if micro_batches == 1:
                optimizer._sums.clear()
        optimizer.step()
    # The sums of a step are those of its gradients' sum, whatever its parts.
    torch.testing.assert_close(parts[1], parts[3], rtol=1e-3, atol=1e-2)
    found = optimizer.state[parameter]["square"] / (1 - 0.999**200)
    torch.testing.assert_close(found, gradient.square().mean(1), rtol=0.15, atol=0)
    # Processes that hold some rows have the same sums between them.
    optimizer = InPlaceMomentum([parameter])
    signs = optimizer._signs_for(parameter, gradient)
    squares = []
    for rows in (slice(0, 3), slice(3, 4), slice(4, None)):
        monkeypatch.setattr(in_place, "first_row", lambda _, start=rows.start: start)
        squares += in_place._mean_squares({parameter: gradient[rows] @ signs})
    monkeypatch.undo()
    [whole] = in_place._mean_squares({parameter: gradient @ signs})
    torch.testing.assert_close(torch.stack(squares).sum(0), whole)


def test_rows_with_next_to_no_gradients_move_less() -> None:
    parameter = nn.Parameter(torch.zeros(4, 64))
    scale = torch.tensor([1.0, 1.0, 1e-3, 0.0])[:, None]
    optimizer = InPlaceMomentum([parameter], lr=0.02, momentum=0.0)
    for number in range(50):
        before = parameter.detach().clone()
        generator = torch.Generator().manual_seed(number)
        (parameter * scale * torch.randn(4, 64, generator=generator)).sum().backward()
        optimizer.step()
    moved = (parameter.detach() - before).square().mean(1).sqrt()
    assert moved[:2].tolist() == pytest.approx([0.02] * 2, rel=0.3)
    # The mean square of all rows is a half, of which a hundredth counts: 0.02 * 1e-3 / sqrt(0.005)
    assert float(moved[2]) == pytest.approx(0.02 * 1e-3 / 0.005**0.5, rel=0.3)
    assert float(moved[3]) == 0


def test_gradients_are_dropped_one_by_one() -> None:
    params = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    optimizer = InPlaceMomentum(params)
    kept: list[int] = []
    x = torch.ones(4)
    for parameter in params:
        x = x * parameter
        x.register_hook(lambda _: kept.append(sum(p.grad is not None for p in params)))
    x.sum().backward()
    assert kept == [0, 0, 0]
    assert taken(optimizer) == [True] * 3


def test_replicas_keep_gradients_until_they_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place, "processes", lambda: 2)
    params = parameters()
    expected = by_hand(params, [gradients(params, [n]) for n in range(3)], 0.02, 0.9, 0.99)
    optimizer = InPlaceMomentum(params, 0.02)
    for number in range(3):
        loss(params, number).backward()
        assert all(p.grad is not None for p in params)
        optimizer.step()
        assert all(p.grad is None for p in params)
    for parameter, value in zip(params, expected, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=1e-5, atol=1e-6)


def test_what_got_no_gradient_stays() -> None:
    params = parameters()
    first = copy.deepcopy(params)
    optimizer = InPlaceMomentum(params)
    params[0].sum().backward()
    optimizer.step()
    assert bool((params[0] != first[0]).all())
    assert torch.equal(params[1], first[1])
    params[1].sum().mul(0).backward()
    optimizer.step()
    assert torch.equal(params[1], first[1])  # and no number became NaN


def test_the_newest_optimizer_takes_the_gradients() -> None:
    params = parameters()
    first = InPlaceMomentum(params)
    second = InPlaceMomentum(params)
    loss(params, 0).backward()
    assert [taken(one) for one in (first, second)] == [[False] * 3, [True] * 3]
    gone = weakref.ref(second)
    del second
    gc.collect()
    assert gone() is None
    loss(params, 0).backward()
    assert all(p.grad is not None for p in params)  # nobody is left to take them


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_from_its_state(dtype: torch.dtype) -> None:
    whole, half = parameters(dtype), parameters(dtype)

    def steps(params: list[nn.Parameter], optimizer: InPlaceMomentum, which: range) -> None:
        for number in which:
            loss(params, number).backward()
            optimizer.step()

    steps(whole, InPlaceMomentum(whole, seed=3), range(6))
    optimizer = InPlaceMomentum(half, seed=3)
    steps(half, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    assert all(state["momentum"].dtype == dtype for state in saved["state"].values())
    older = copy.deepcopy(saved)
    for state in older["state"].values():
        state["square"] = torch.tensor(2.0, dtype=torch.float64)  # one for all rows, once
    resumed = InPlaceMomentum(half, seed=3)
    resumed.load_state_dict(older)
    assert all(bool((s["square"] == 2).all()) for s in resumed.state.values())
    assert [len(s["square"]) for s in resumed.state.values()] == [len(p) for p in half]
    resumed.load_state_dict(saved)
    steps(half, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, half, strict=True))


def test_bf16_moves_on_average_by_less_than_its_last_place() -> None:
    parameter = nn.Parameter(torch.full((64 * 256, 1), 1.0, dtype=torch.bfloat16))
    optimizer = InPlaceMomentum([parameter], lr=1e-4, momentum=0.0)
    for _ in range(10):  # half of the last place of 1 is 0.002 below it
        parameter.float().sum().backward()
        optimizer.step()
    assert float(parameter.detach().float().mean()) == pytest.approx(1 - 1e-3, abs=1e-4)
    assert len(parameter.unique()) > 1


def test_bf16_adds_up_gradients_that_are_less_than_the_last_place_of_their_sum() -> None:
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        parameter = nn.Parameter(torch.zeros(16, 256, dtype=dtype))
        optimizer = InPlaceMomentum([parameter], lr=0.01)
        for _ in range(20):
            for _ in range(128):
                parameter.grad = torch.full_like(parameter, 1 / 128)
                optimizer.take(parameter)
            optimizer.step()
        moved[dtype] = parameter.detach().float().mean().item()
    assert moved[torch.bfloat16] == pytest.approx(moved[torch.float32], rel=0.02)


@pytest.mark.parametrize("at_once", [1, 100])
def test_bf16_does_not_depend_on_the_size_of_pieces(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for count in (at_once, in_place.AT_ONCE):
        monkeypatch.setattr(in_place, "AT_ONCE", count)
        params = parameters(torch.bfloat16)
        optimizer = InPlaceMomentum(params)
        loss(params, 0).backward()
        optimizer.step()
        found.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_dithered_rounding_is_to_a_neighbour_and_evenly_up_and_down() -> None:
    values = torch.tensor([[1.0, 1.002, -1.006, 3e-5, 0.0, -7.001]]).repeat(50, 1)
    rounded = torch.stack(
        [noise.dither_to_bfloat16(values, noise.fold("test"), n) for n in range(64)]
    ).float()
    step = 2.0 ** (torch.frexp(values).exponent - 8)
    assert ((rounded - values).abs() < step).all()
    # The errors of random rounding would add up to some 4 steps.
    assert ((rounded - values).sum(0).abs() <= 2 * step).all()
    assert len(rounded[0, :, 1].unique()) == 2
    half = noise.dither_to_bfloat16(values[20:], noise.fold("test"), 3, row0=20)
    assert torch.equal(half.float(), rounded[3, 20:])


def test_rounding_is_to_a_neighbour_and_right_on_average() -> None:
    values = torch.tensor([1.0, 1 + 2**-9, -1 - 2**-10, 3e-5, -7.7, 0.0])
    counts = [
        noise.round_to_bfloat16(values[None].repeat(1000, 1), noise.fold("test", n)).float()
        for n in range(20)
    ]
    found = torch.cat(counts)
    low = (values.view(torch.int32) & -65536).view(torch.float32)
    high = ((values.view(torch.int32) & -65536) + 65536).view(torch.float32)
    exact = values == low
    assert bool(((found == low) | (found == high)).all())
    assert bool((found[:, exact] == values[exact]).all())
    spread = (high - low).abs() / math.sqrt(len(found))
    assert bool(((found.double().mean(0) - values).abs() <= 2.5 * spread).all())
    # 1 + 2**-9 is a quarter of the way up, and is rounded up so often.
    assert float((found[:, 1] > 1).double().mean()) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0.*must not be negative"),
        ({"lr": math.nan}, "lr=nan"),
        ({"momentum": 1.0}, r"momentum=1.0.*\[0, 1\)"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"decay": -0.1}, "decay=-0.1"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, float], message: str) -> None:
    with pytest.raises(SparsifyError, match=message):
        InPlaceMomentum(parameters(), **options)
