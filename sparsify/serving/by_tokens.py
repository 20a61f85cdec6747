"""Decides for layers whose number of tokens changes from call to call, as on a server."""

from collections.abc import Mapping

from sparsify.serving.choose import DENSE, MARGIN, Choice, Seconds, always, shares_of_dense
from sparsify.serving.measure import LayerKind


def by_tokens(kind: LayerKind, seconds: Mapping[str, Seconds]) -> Choice:
    """Choose what is fastest at each number of tokens. Between two measured numbers dense is taken
    if it was at either, and else what was at the larger.
    """
    shares = shares_of_dense(seconds)
    steps: list[tuple[int, str]] = []
    before = 0
    for count in sorted(next(iter(shares.values()))):
        best = min(shares, key=lambda backend: shares[backend][count])
        name = best if shares[best][count] <= 1 - MARGIN else DENSE
        if not steps or steps[-1][1] != name:
            late = steps and steps[-1][1] == DENSE
            steps.append((count if late else before + 1, name))
        before = count
    if len(steps) == 1:
        return always(kind, seconds)
    words = ", ".join(f"{name} from {least}" for least, name in steps)
    return Choice(kind, f"{words} tokens", "each where it was fastest", seconds, tuple(steps))


def one_weight(kind: LayerKind, seconds: Mapping[str, Seconds]) -> Choice:
    """Choose the best backend for all numbers of tokens, if one was faster than dense at any: then
    a single, compressed weight is kept.
    """
    shares = shares_of_dense(seconds)
    won = {
        backend: [str(count) for count, share in of.items() if share <= 1 - MARGIN]
        for backend, of in shares.items()
    }
    winners = [backend for backend, where in won.items() if where]
    best = min(winners, key=lambda backend: sum(shares[backend].values()), default=None)
    if best is None or len(won[best]) == len(shares[best]):
        return always(kind, seconds)
    return Choice(kind, best, f"one weight; faster at {', '.join(won[best])} tokens", seconds)
