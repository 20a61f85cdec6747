"""Finds the order of input channels under which a strategy's masks lose least of a layer's output.

An N:M mask chooses within groups of M consecutive inputs, so that the order of inputs decides which
weights compete. Under a mask m a row loses ``d = -w o (1 - m)``, and ``G = X^T X`` of the layer's
inputs gives its squared error, ``d G d^T``. A round pairs all groups at random and looks at every
exchange of a channel of one group with one of the other. The masks of both groups are chosen anew
by the strategy's score. A change D of d, in the columns of both groups, changes the error by

    2 D . (d G) + D G D^T,

summed over rows, which is exact. The best exchange of each pair is taken if it still lowers the
error after those that were taken before it: two exchanges p and q add ``2 D_p G D_q^T``.

Shapes: O rows of a piece, I in, C channels, K columns of a channel (heads that share keys and
values), P pairs of groups, S positions of a pair, M group size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.masking.pattern import NMPattern

# Weights of a piece of rows: what is made of it stays in a CPU's cache.
_PIECE = {"cpu": 1 << 17}
_PIECE_ELSEWHERE = 1 << 23


@dataclass
class Inputs:
    """The inputs of one layer that hold the channels.

    Attributes:
        weight_OI: the layer's weight.
        gram_II: X^T X of its inputs, fp32.
        scale_I: what the strategy multiplies weights by to score them, see ``score``.
        score: scores a weight, given ``scale_I``.
        columns_KC: the columns of every channel.
        pattern: of its mask.
        share: weighs its error against those of other layers.
    """

    weight_OI: Tensor
    gram_II: Tensor
    scale_I: Tensor
    score: Callable[[Tensor, Tensor], Tensor]
    columns_KC: Tensor
    pattern: NMPattern
    share: float = 1.0

    def held(self, order_C: Tensor) -> Tensor:
        """The column that comes to each place of the layer under an order, ``[I]``."""
        held_I = torch.arange(self.weight_OI.shape[1])
        held_I[self.columns_KC] = self.columns_KC[:, order_C]
        return held_I


def find_order(
    layers: Sequence[Inputs],
    runs: int,
    device: torch.device,
    rounds: int = 100,
    least: float = 0.01,
    seed: int = 0,
) -> tuple[Tensor, list[float]]:
    """Search an order of channels, in rounds of exchanges.

    Args:
        layers: the layers whose inputs hold the channels.
        runs: into how many equal runs the channels are divided; each stays in its own.
        device: where to compute.
        rounds: at most so many.
        least: end when so many rounds as there are groups in a run, at most 16, lowered the error
            by less than this share.
        seed: of the pairs.

    Returns:
        The order ``[C]``: new channel i is old channel [i]; and the error before the first round
        and after each.
    """
    generator = torch.Generator().manual_seed(seed)
    width = math.lcm(*(layer.pattern.m for layer in layers))
    order_C = torch.arange(layers[0].columns_KC.shape[1])
    exchanges = _exchanges(width)
    own = torch.arange(2 * width)
    errors: list[float] = []
    taken = order_C
    for number in range(rounds + 1):
        at_PS = _pairs(len(order_C), runs, width, generator)
        error, gain_XP = _gains(layers, order_C, at_PS, exchanges, device)
        if errors and error > errors[-1]:  # by rounding: the last exchanges gained nothing
            return taken, errors
        taken, errors = order_C, [*errors, error]
        if number == rounds or (number >= 16 and errors[-17] - error < least * errors[-17]):
            break
        gain_P, best_P = gain_XP.min(0)
        tried = gain_P < 0
        to_PS = torch.where(tried[:, None], exchanges[best_P], own)
        new_C = order_C.clone()
        new_C[at_PS] = order_C[at_PS.gather(1, to_PS)]
        both_PP = 2 * _between(layers, order_C, new_C, at_PS, device)
        order_C = order_C.clone()
        for p in gain_P.argsort().tolist():
            if tried[p] and gain_P[p] < 0:
                order_C[at_PS[p]] = new_C[at_PS[p]]
                gain_P += both_PP[p]
    return taken, errors


def _exchanges(width: int) -> Tensor:
    """All exchanges of a position of one group with one of the other: the position that each of a
    pair's comes to hold, ``[X, S]``.
    """
    exchanges_XS = torch.arange(2 * width).repeat(width * width, 1)
    both = torch.cartesian_prod(torch.arange(width), torch.arange(width, 2 * width))
    return exchanges_XS.scatter(1, both, both.flip(1))


def _pairs(channels: int, runs: int, width: int, generator: torch.Generator) -> Tensor:
    """Pairs of groups, drawn at random within each run: the positions of both, ``[P, S]``."""
    pairs = []
    for run in torch.arange(channels).view(runs, -1, width):
        drawn = run[torch.randperm(len(run), generator=generator)]
        half = len(drawn) // 2
        pairs.append(torch.cat([drawn[:half], drawn[half : 2 * half]], 1))
    return torch.cat(pairs)


def _pieces(layer: Inputs, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The weight and its scores by pieces of rows, in the type of X^T X."""
    weight_OI = layer.weight_OI.to(device, layer.gram_II.dtype)
    score_OI = layer.score(weight_OI, layer.scale_I.to(device))
    most = _PIECE.get(device.type, _PIECE_ELSEWHERE)
    rows = max(1, most // weight_OI.shape[1])
    yield from zip(weight_OI.split(rows), score_OI.split(rows), strict=True)


def _gains(
    layers: Sequence[Inputs],
    order_C: Tensor,
    at_PS: Tensor,
    exchanges_XS: Tensor,
    device: torch.device,
) -> tuple[float, Tensor]:
    """The error under an order, and how each exchange of each pair changes it, ``[X, P]``."""
    error, gain_XP = 0.0, torch.zeros(len(exchanges_XS), len(at_PS), dtype=torch.float64)
    for layer in layers:
        held_I = layer.held(order_C).to(device)
        gram_II = layer.gram_II.to(device)[held_I][:, held_I]
        columns_PSK = layer.columns_KC[:, at_PS].permute(1, 2, 0).to(device)
        columns_PJ = columns_PSK.flatten(1)
        own_PJJ = gram_II[columns_PJ[:, :, None], columns_PJ[:, None, :]]
        for weight_OI, score_OI in _pieces(layer, device):
            weight_OI, score_OI = weight_OI[:, held_I], score_OI[:, held_I]
            mask_OI = layer.pattern.top(score_OI)
            lost_OI = -weight_OI.masked_fill(mask_OI, 0)
            slope_OI = lost_OI @ gram_II
            error += layer.share * float((lost_OI * slope_OI).sum(dtype=torch.float64))
            parts = (x.T[columns_PSK] for x in (weight_OI, score_OI, mask_OI, 2 * slope_OI))
            pairs = _Pairs(layer.pattern, *parts)
            for x, change_PSKO in enumerate(pairs.changes()):
                linear_P = (change_PSKO * pairs.slope_PSKO).sum((1, 2, 3))
                change_PJO = change_PSKO.flatten(1, 2)
                square_P = (change_PJO @ change_PJO.mT * own_PJJ).sum((1, 2))
                gain_XP[x] += layer.share * (linear_P + square_P).cpu().double()
    return error, gain_XP


class _Pairs:
    """The pairs of groups of a piece of rows: what each exchange makes of their masks.

    Args:
        pattern: N of M.
        weight, score, mask, slope: ``[P, S, K, O]``.
    """

    def __init__(
        self, pattern: NMPattern, weight: Tensor, score: Tensor, mask: Tensor, slope: Tensor
    ) -> None:
        self._m, self._score, self.slope_PSKO = pattern.m, score, slope
        # What d becomes less what it is, for a weight that is kept then, or dropped.
        self._kept, self._dropped = weight.masked_fill(mask, 0), -weight.masked_fill(~mask, 0)
        n, m = pattern.n, pattern.m
        places = score.shape[1]
        self._with: list[Tensor] = []  # changes of the others where the newcomer is kept
        self._without: list[Tensor] = []
        self._needs: list[Tensor] = []  # a newcomer with a higher score is kept
        for a in range(places):
            group = slice(a // m * m, a // m * m + m)
            score_PMKO = score[:, group].clone()
            score_PMKO[:, a % m] = -torch.inf
            index = torch.arange(m, device=score.device).view(1, m, 1, 1)
            one, other = score_PMKO[:, :, None], score_PMKO[:, None]
            beats = (one > other) | ((one == other) & (index[:, :, None] < index[:, None]))
            beaten_by = beats.sum(1)
            kept, dropped = self._kept[:, group], self._dropped[:, group]
            self._without.append(torch.where(beaten_by < n, kept, dropped))
            self._with.append(torch.where(beaten_by < n - 1, kept, dropped))
            # The last of the others that is kept without the newcomer, which of equal scores the
            # lower position beats.
            last = score_PMKO.nextafter(score_PMKO.new_tensor(-torch.inf))
            last = torch.where(index > a % m, last, score_PMKO)
            self._needs.append(last.masked_fill(beaten_by != n - 1, -torch.inf).amax(1))

    def changes(self) -> Iterator[Tensor]:
        """The change of d by each exchange, in the order of :func:`_exchanges`:
        ``[P, S, K, O]``. The tensor is overwritten by the next.
        """
        m, width = self._m, self._score.shape[1] // 2
        change = torch.zeros_like(self._score)
        for a in range(width):
            for b in range(width, 2 * width):
                if m < width:
                    change.zero_()
                b_stays = self._score[:, b] > self._needs[a]
                a_stays = self._score[:, a] > self._needs[b]
                for place, stays in ((a, b_stays), (b, a_stays)):
                    group = slice(place // m * m, place // m * m + m)
                    change[:, group] = torch.where(
                        stays[:, None], self._with[place], self._without[place]
                    )
                for place, stays in ((a, a_stays), (b, b_stays)):
                    change[:, place] = torch.where(
                        stays, self._kept[:, place], self._dropped[:, place]
                    )
                yield change


def _between(
    layers: Sequence[Inputs], order_C: Tensor, new_C: Tensor, at_PS: Tensor, device: torch.device
) -> Tensor:
    """``D_p G D_q^T`` of each two exchanges that make the new order of the former, ``[P, P]``."""
    both_PP = torch.zeros(len(at_PS), len(at_PS), dtype=torch.float64)
    for layer in layers:
        # By the columns where they are under the first order.
        held_I, new_I = layer.held(order_C), layer.held(new_C)
        back_I = new_I.argsort()[held_I].to(device)
        held_I, new_I = held_I.to(device), new_I.to(device)
        at = layer.columns_KC[:, at_PS].permute(1, 2, 0).flatten().to(device)
        gram_II = layer.gram_II.to(device)[held_I][:, held_I]
        products_QQ = gram_II.new_zeros(len(at), len(at))
        for weight_OI, score_OI in _pieces(layer, device):
            mask_OI = layer.pattern.top(score_OI[:, held_I])
            new_OI = layer.pattern.top(score_OI[:, new_I])[:, back_I]
            change_OI = weight_OI[:, held_I] * (new_OI.to(weight_OI) - mask_OI.to(weight_OI))
            change_OQ = change_OI[:, at]
            products_QQ.addmm_(change_OQ.T, change_OQ)
        products_QQ *= gram_II[at][:, at]
        size = len(at) // len(at_PS)
        sums_PP = products_QQ.view(len(at_PS), size, len(at_PS), size).sum((1, 3))
        both_PP += layer.share * sums_PP.cpu().double()
    return both_PP
