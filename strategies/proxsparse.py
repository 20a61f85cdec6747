"""ProxSparse: learn 2:4 masks by training a copy of the weights under a regularizer that is zero
where a group is 2:4 sparse (Liu et al., ICML 2025, "ProxSparse: Regularized Learning of
Semi-Structured Sparsity Masks for Pretrained LLMs").

For a group, ``r(w) = |w1 w2 w3| + |w2 w3 w4| + |w3 w4 w1| + |w4 w1 w2|``, which is zero if and only
if at most two of the four weights are not zero. After each optimizer step, every group z of the
copy is replaced by the v that minimises ``|v - z|^2 / 2 + lambda r(v)``. The mask keeps the
positions of the copy's largest weights; the export holds the original weights under this mask.

Shapes: O out, I in, G groups; here G counts the groups of all rows.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsify.calibration.prior import StartsFromPrior, favour
from sparsify.common.errors import SparsifyError
from sparsify.masking.effect import Effect
from sparsify.masking.layer import local_rows
from sparsify.masking.masker import Draw, Masker
from sparsify.masking.pattern import NMPattern
from sparsify.masking.run import Run
from sparsify.masking.strategy import SparsityStrategy

SWEEPS = 100
TOLERANCE = 1e-8  # absolute change of a weight that counts as converged
SWEEPS_AT_ONCE = 5  # then groups that have converged are set aside
GROUPS_AT_ONCE = 1 << 18  # their columns fit a CPU's cache; a GPU is faster with larger pieces
GROUPS_AT_ONCE_ON_GPU = 1 << 24


class ProxyMasker(Masker):
    """Holds the copy that is trained in place of the weight.

    Args:
        name, shape, pattern: as for every masker.
        anchor_eps: epsilon of the penalty; None means no penalty.
    """

    proxy_OI: Tensor

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        pattern: NMPattern,
        anchor_eps: float | None = None,
    ) -> None:
        super().__init__(name, shape, pattern)
        self.anchor_eps = anchor_eps
        self.proxy_OI = nn.Parameter(torch.zeros(shape, dtype=self.learned_dtype))

    def sample(self, weight_OI: Tensor, draw: Draw, row0: int = 0) -> tuple[Tensor, Tensor]:
        """Return the dense copy W, and the penalty ``|W / (W0 + eps sign W0) o (W - W0)|^2``, where
        W0 is the weight and sign 0 = 1.
        """
        if self.anchor_eps is None:
            return self.proxy_OI, weight_OI.new_zeros(())
        apart_OI = weight_OI + self.anchor_eps * torch.where(weight_OI < 0, -1.0, 1.0)
        distance_OI = self.proxy_OI / apart_OI * (self.proxy_OI - weight_OI)
        return self.proxy_OI, distance_OI.square().sum()

    def hard_mask(self, weight_OI: Tensor, row0: int = 0) -> Tensor:
        return self.pattern.top(self.proxy_OI.abs())


class ProxSparse(StartsFromPrior[ProxyMasker]):
    """Learns 2:4 masks by proximal gradient steps on a copy of the weights; base weights stay.

    Args:
        prior: gives the first masks: a strategy by name or as an object, a mask file or an exported
            folder; None starts from magnitude's. Weights of the copy that the prior drops are first
            made smaller than those that it keeps.
        strength: lambda; the authors' scripts take 0.25 (Llama-2-7B), 0.5 (13B), 0.85
            (Llama-3.1-8B) and 20 or more (Mistral), with AdamW at 1e-4 or 5e-5.
        coupled: multiply lambda by the learning rate, as proximal gradient methods do; the
            published method uses lambda itself.
        anchor: lambda2, the weight of the penalty that keeps large weights near their start.
        anchor_eps: the penalty's epsilon, in the weights' unit.
    """

    effect = Effect(weights="proxy")

    def __init__(
        self,
        prior: SparsityStrategy | str | None = None,
        strength: float = 0.25,
        coupled: bool = False,
        anchor: float = 0.0,
        anchor_eps: float = 0.1,
    ) -> None:
        super().__init__(prior)
        if strength < 0 or anchor < 0 or anchor_eps <= 0:
            raise SparsifyError(
                f"strength={strength}, anchor={anchor}, anchor_eps={anchor_eps}; strength and "
                "anchor must not be negative, and anchor_eps must be positive"
            )
        self.strength, self.coupled = strength, coupled
        self.anchor, self.anchor_eps = anchor, anchor_eps

    def make_masker(self, name: str, shape: tuple[int, int], pattern: NMPattern) -> ProxyMasker:
        if (pattern.n, pattern.m) != (2, 4):
            raise SparsifyError(
                f"pattern {pattern}: this method's regularizer is made for 2:4 alone; give "
                "--model.pattern 2:4, or take another strategy"
            )
        return ProxyMasker(name, shape, pattern, self.anchor_eps if self.anchor else None)

    def start(
        self, masker: ProxyMasker, weight_OI: Tensor, prior_OI: Tensor, row0: int = 0
    ) -> None:
        proxy_OI = weight_OI.detach()
        if self.prior is not None:
            proxy_OI = favour(proxy_OI, prior_OI, masker.pattern)
        masker.proxy_OI.data.copy_(proxy_OI)

    def loss(self, run: Run) -> Tensor:
        result = run(run.draw())
        return result.loss + self.anchor * result.penalty if self.anchor else result.loss

    def after_step(self, maskers: Mapping[ProxyMasker, Tensor], lr: float) -> None:
        strength = self.strength * (lr if self.coupled else 1.0)
        for masker in maskers:
            proximal_(local_rows(masker.proxy_OI.data), strength)


@torch.no_grad()
def proximal_(weight_OI: Tensor, strength: float) -> None:
    """Replace every group z of four, in place, by the v that minimises
    ``|v - z|^2 / 2 + strength r(v)``.

    Signs do not change, so only magnitudes matter; they are sorted in falling order. The minimum
    has two, three or four weights that are not zero. With two it is known; with three or four it is
    found by coordinate descent from zero, the smallest weight first.

    Args:
        weight_OI: fp32 or fp64, contiguous.
        strength: lambda.
    """
    at_once = GROUPS_AT_ONCE if weight_OI.device.type == "cpu" else GROUPS_AT_ONCE_ON_GPU
    for z_G4 in weight_OI.view(-1, 4).split(at_once):
        size_G4, order_G4 = z_G4.abs().sort(dim=-1, descending=True, stable=True)
        z = [column.contiguous() for column in size_G4.unbind(-1)]
        best = [z[0], z[1], torch.zeros_like(z[2]), torch.zeros_like(z[3])]
        least_G = _objective(best, z, strength)
        for count in (3, 4):
            found = _descend(z[:count], strength) + best[count:]
            value_G = _objective(found, z, strength)
            better_G = value_G < least_G
            best = [torch.where(better_G, f, b) for f, b in zip(found, best, strict=True)]
            least_G = torch.where(better_G, value_G, least_G)
        size_G4.scatter_(-1, order_G4, torch.stack(best, -1))
        torch.copysign(size_G4, z_G4, out=z_G4)


def _objective(v: list[Tensor], z: list[Tensor], strength: float) -> Tensor:
    """The function that ``proximal_`` minimises, of four columns of magnitudes ``[G]``."""
    distance = sum(((a - b).square() for a, b in zip(v, z, strict=True)), torch.zeros_like(z[0]))
    triples = v[0] * v[1] * (v[2] + v[3]) + v[2] * v[3] * (v[0] + v[1])
    return distance / 2 + strength * triples


def _descend(z: list[Tensor], strength: float) -> list[Tensor]:
    """Coordinate descent on three or four columns of magnitudes ``[G]``, in falling order."""
    v = [torch.zeros_like(column) for column in z]
    at, some_z, some_v = None, z, v  # the groups that still change, and their places
    for sweep in range(SWEEPS):
        change_G = torch.zeros_like(some_z[0])
        for i in reversed(range(len(z))):
            a, b, *c = (column for j, column in enumerate(some_v) if j != i)
            pairs = a * b if not c else a * b + c[0] * (a + b)
            new = (some_z[i] - strength * pairs).clamp_(min=0)
            change_G = torch.maximum(change_G, (new - some_v[i]).abs())
            some_v[i] = new
        if (sweep + 1) % SWEEPS_AT_ONCE and sweep + 1 < SWEEPS:
            continue
        if at is not None:
            v = [column.index_copy_(0, at, new) for column, new in zip(v, some_v, strict=True)]
        moving = (change_G >= TOLERANCE).nonzero().squeeze(-1)
        if not len(moving):
            break
        at = moving if at is None else at[moving]
        some_z = [column[moving] for column in some_z]
        some_v = [column[moving] for column in some_v]
    return v
