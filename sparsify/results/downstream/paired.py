"""Numbers of two models on the same questions, and how sure their difference is."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Method = Literal["paired", "independent"]


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error; None where that is not known."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Metric(Estimate):
    """What one model reached on one task.

    Attributes:
        value: over all examples.
        stderr: as the harness gives it.
        higher_is_better: None where the task does not say.
        examples: the examples' own values; None where ``value`` is not their mean.
    """

    higher_is_better: bool | None = None
    examples: Sequence[float] | None = None


@dataclass(frozen=True)
class Difference(Estimate):
    """Sparse less dense.

    Attributes:
        method: what the standard error takes the two for: ``paired``, with one difference an
            example; ``independent``, which is too large where both answer the same questions.
    """

    method: Method


def difference(dense: Metric, sparse: Metric) -> Difference:
    """How far the sparse model is from the dense one; both answered the same examples, in order.

    Paired, the standard error is that of the mean of the examples' differences d:
    ``sqrt(sum((d - mean(d))^2) / (n - 1) / n)``. Where the examples' values are not known it is
    ``sqrt(stderr_dense^2 + stderr_sparse^2)``.
    """
    value = sparse.value - dense.value
    if dense.examples is not None and sparse.examples is not None:
        each = [b - a for a, b in zip(dense.examples, sparse.examples, strict=True)]
        error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else None
        return Difference(value, error, "paired")
    if dense.stderr is None or sparse.stderr is None:
        return Difference(value, None, "independent")
    return Difference(value, math.hypot(dense.stderr, sparse.stderr), "independent")


def mean(estimates: Iterable[Estimate]) -> Estimate:
    """The unweighted mean over tasks, whose errors are independent of each other."""
    all_ = list(estimates)
    errors = [estimate.stderr for estimate in all_ if estimate.stderr is not None]
    known = len(errors) == len(all_)
    return Estimate(
        statistics.fmean(estimate.value for estimate in all_),
        math.hypot(*errors) / len(all_) if known else None,
    )
