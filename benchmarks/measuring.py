"""CPU seconds in turns, and bytes of tensors: what the parts of ``cost.py`` share."""

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from sparsify.masking.select import decoder_blocks

Name = TypeVar("Name")
Contestant = Callable[[int], Callable[[], Any]]


def in_turns(
    contestants: Mapping[Name, Contestant],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[Name, list[float]]:
    """CPU seconds of each contestant in every round, after one round that does not count.

    Seconds of the CPU, because a machine may do other work beside.

    Args:
        contestants: each gets the number of the round, prepares, and returns what is timed.
        rounds: how many count.
        clock: the seconds that have been used so far.
    """
    times: dict[Name, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, prepare in contestants.items():
            run = prepare(turn)
            start = clock()
            run()
            times[name] += [clock() - start] if turn else []
    return times


def allocated(prepare: Callable[[], Callable[[], Any]]) -> tuple[int, int]:
    """Bytes of all tensors that exist: at the peak while a function runs, and when it has run.

    They are what torch's allocator for CPUs has given out and not got back since ``prepare`` began:
    the same in every run, and without what Python, libraries and gaps between tensors take.

    Args:
        prepare: returns the function; what it allocates itself is counted where it lives on.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run = prepare()
        with record_function("counted"):
            run()
    events = found.profiler.kineto_results.events()
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
        elif event.name() == "counted":
            peak = now
    return peak, now


def linear_weights(model: Any) -> int:
    """How many weights the blocks' linear layers have: all that are masked."""
    modules = (m for block in decoder_blocks(model).values() for m in block.modules())
    return sum(m.weight.numel() for m in modules if isinstance(m, nn.Linear))
