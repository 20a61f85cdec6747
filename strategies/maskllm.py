"""MaskLLM: learn a distribution over the candidate masks of every group (Fang et al., NeurIPS 2024,
arXiv 2409.17481).

Shapes: O out, I in, G groups = I / M, M group size, K candidates = C(M, N).
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsify.calibration.prior import StartsFromPrior
from sparsify.common.errors import SparsifyError
from sparsify.masking import noise
from sparsify.masking.certainty import describe_distribution
from sparsify.masking.masker import Draw, Masker
from sparsify.masking.pattern import NMPattern
from sparsify.masking.run import Run
from sparsify.masking.schedule import Schedule
from sparsify.masking.strategy import SparsityStrategy

MAX_CANDIDATES = 128


class CandidateMasker(Masker):
    """One logit for each candidate of each group.

    Args:
        name, shape, pattern: as for every masker.
        values: the strategy's annealed ``kappa`` and ``tau``.
        hard: sample one candidate instead of a mixture of all; the gradient is that of the mixture
            (straight-through).
    """

    # Candidates come before groups: a CPU's softmax over a last dimension of six is 10x slower.
    logits_OKG: Tensor
    table_KM: Tensor

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        pattern: NMPattern,
        values: Mapping[str, float],
        hard: bool,
    ) -> None:
        super().__init__(name, shape, pattern)
        self.values = values
        self.hard = hard
        logits = shape[0], pattern.candidates, shape[1] // pattern.m
        self.logits_OKG = nn.Parameter(torch.zeros(logits, dtype=self.learned_dtype))
        self.register_buffer("table_KM", pattern.table().float(), persistent=False)

    def sample(self, weight_OI: Tensor, draw: Draw, row0: int = 0) -> tuple[Tensor, Tensor]:
        """Mix the candidates by Gumbel-softmax (equations 6 and 7; kappa as in algorithm 1). The
        penalty is the squared norm of the retained weights (equation 8).
        """
        learns = torch.is_grad_enabled()
        found = cast(Any, _Sample).apply(self.logits_OKG, weight_OI, self, draw, row0, learns)
        return cast(tuple[Tensor, Tensor], found)

    def start(self, prior_OI: Tensor, std: float, alpha: float, seed: int, row0: int = 0) -> None:
        """Draw the first logits from N(0, std**2), and raise those of candidates near the prior.

        Equations 9 and 10, with two differences. The paper subtracts the mean similarity, which
        changes no probability. It scales by the measured standard deviation of the whole layer;
        a process that holds only some rows cannot measure it, so ``std`` is used instead.
        """
        rows, candidates, groups = self.logits_OKG.shape
        key = noise.fold("init", seed, self.name)
        start = noise.normal(key, rows, candidates * groups, row0, self.logits_OKG.device) * std
        prior_OGM = self.pattern.groups(prior_OI).float()
        shared = torch.einsum("ogm,km->okg", prior_OGM, self.table_KM)
        start += shared.flatten(1) * (alpha * std)
        self.logits_OKG.data.copy_(start.view_as(self.logits_OKG))

    def hard_mask(self, weight_OI: Tensor, row0: int = 0) -> Tensor:
        return self.pattern.unrank(self.logits_OKG.argmax(1))

    def metrics(self) -> dict[str, Tensor]:
        logits_OKG = self.logits_OKG.detach().float()
        probability_OKG = torch.softmax(self.values["kappa"] * logits_OKG, dim=1)
        return describe_distribution(probability_OKG, self.table_KM)


class _Sample(torch.autograd.Function):
    """A draw's masked weight, and its squared norm before it was rounded to the weight's dtype.

    Backward is written by hand: a CPU works on some rows at a time, so that all but the results
    stays in its cache. Autograd would keep several tensors of the layer's size.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_OKG: Tensor,
        weight_OI: Tensor,
        masker: CandidateMasker,
        draw: Draw,
        row0: int,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        rows, candidates, groups = logits_OKG.shape
        device, m, table_KM = logits_OKG.device, masker.pattern.m, masker.table_KM
        kappa, tau = masker.values["kappa"], masker.values["tau"]
        dtype = torch.promote_types(logits_OKG.dtype, torch.float32)
        product_OI = torch.empty_like(weight_OI, dtype=torch.promote_types(weight_OI.dtype, dtype))
        penalty = torch.zeros((), dtype=torch.float32, device=device)
        soft_OKG = torch.empty_like(logits_OKG, dtype=dtype) if learns else None
        trains_weight = learns and ctx.needs_input_grad[1]
        mask_OI = torch.empty_like(product_OI) if trains_weight else None
        key, pieces = draw.key(masker.name), []
        for some, gumbel, spare in noise.gumbel_pieces(
            key, rows, candidates * groups, row0, device
        ):
            logits = logits_OKG[some]
            scores, soft = (part.view_as(logits).to(dtype) for part in (gumbel, spare))
            scores.add_(torch.mul(logits, kappa, out=soft))
            winner = _winner(scores) if masker.hard else None
            if winner is None or learns:
                scores.div_(tau)
                # In fp32 adding a share below e**-30 to 1 changes nothing. Without this bound
                # shares may be denormal numbers, with which a CPU computes many times slower.
                least = scores.amax(1, keepdim=True).sub_(30.0)
                torch.maximum(scores, least, out=scores)
                soft = soft if soft_OKG is None else soft_OKG[some]
                torch.softmax(scores, 1, out=soft)
            mask = scores.flatten()[: len(logits) * groups * m].view(-1, groups, m)
            if winner is None:
                torch.bmm(soft.mT, table_KM.expand(len(logits), -1, -1), out=mask)
            else:
                torch.index_select(table_KM, 0, winner, out=mask.view(-1, m))
            if mask_OI is not None:
                mask_OI[some] = mask.flatten(1)
            product = torch.mul(mask.flatten(1), weight_OI[some], out=product_OI[some])
            penalty += torch.square(product, out=mask.flatten(1)).sum()
            pieces.append(some)
        ctx.save_for_backward(soft_OKG, weight_OI, product_OI, mask_OI, table_KM)
        ctx.pieces, ctx.kappa, ctx.tau = pieces, kappa, tau
        return product_OI.to(weight_OI.dtype), penalty

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_OI: Tensor, grad_penalty: Tensor) -> tuple[Any, ...]:
        soft_OKG, weight_OI, product_OI, mask_OI, table_KM = ctx.saved_tensors
        for some in ctx.pieces:
            soft = soft_OKG[some]
            of_product = (product_OI[some] * (2 * grad_penalty)).add_(grad_OI[some])
            if mask_OI is not None:
                mask_OI[some] *= of_product
            of_mask_OMG = of_product.mul_(weight_OI[some]).unflatten(1, (-1, table_KM.shape[1])).mT
            of_soft = torch.bmm(table_KM.expand(len(soft), -1, -1), of_mask_OMG)
            of_scores = torch.ops.aten._softmax_backward_data(of_soft, soft, 1, soft.dtype)
            # The gradient takes the memory of the shares: no more of the layer's size is needed.
            torch.mul(of_scores.div_(ctx.tau), ctx.kappa, out=soft)
        grad_weight = None if mask_OI is None else mask_OI.to(weight_OI.dtype)
        return soft_OKG, grad_weight, None, None, None, None


def _winner(scores_OKG: Tensor) -> Tensor:
    """The number of every group's largest score, int32 ``[O * G]``; of equal ones the first.

    On a CPU it takes a thirtieth of the time of ``argmax``.
    """
    largest, *others = scores_OKG.unbind(1)
    winner = torch.zeros_like(largest, dtype=torch.uint8)
    for number, scores in enumerate(others, 1):
        # The last candidate that beats all before it has the largest number among such.
        beats = (scores > largest).view(torch.uint8)
        winner = torch.maximum(winner, beats.mul_(number))
        largest = torch.maximum(largest, scores)
    return winner.flatten().int()


class MaskLLM(StartsFromPrior[CandidateMasker]):
    """Learns masks over frozen weights by Gumbel-softmax sampling of candidates.

    The defaults are the paper's, for 2,000 steps of 256 x 4096 tokens.

    Args:
        prior: the masks near which the distribution starts: a strategy by name or as an object, a
            mask file or an exported folder; None starts from a uniform distribution.
        alpha: strength of the prior: a candidate's logit is raised by ``alpha * init_std`` for each
            position that both it and the prior keep.
        init_std: standard deviation of the logits' random start.
        kappa: scale of the logits before noise is added; the distribution sharpens as it rises.
        tau: temperature of the softmax; as it falls, the mixture narrows to one candidate.
        penalty_weight: how much the retained norm is rewarded, which keeps gradients from vanishing
            (equation 8; only the authors' code lets it decay to zero).
        hard: train with sampled hard masks and a straight-through gradient.
    """

    def __init__(
        self,
        prior: SparsityStrategy | str | None = "sparsegpt",
        alpha: float = 3.0,
        init_std: float = 0.01,
        kappa: Schedule = Schedule(100.0, 500.0),
        tau: Schedule = Schedule(4.0, 0.05),
        penalty_weight: Schedule = Schedule(1e-5, 0.0),
        hard: bool = False,
    ) -> None:
        super().__init__(prior)
        self.alpha = alpha
        self.init_std = init_std
        self.hard = hard
        self.schedules = {"kappa": kappa, "tau": tau, "penalty_weight": penalty_weight}

    def make_masker(self, name: str, shape: tuple[int, int], pattern: NMPattern) -> CandidateMasker:
        if pattern.candidates > MAX_CANDIDATES:
            raise SparsifyError(
                f"pattern {pattern} has {pattern.candidates:,} candidates a group, and this method "
                f"learns a logit for each ({pattern.candidates / pattern.m:,.1f} a weight; at most "
                f"{MAX_CANDIDATES} candidates); take a smaller M"
            )
        return CandidateMasker(name, shape, pattern, self.values, self.hard)

    def start(
        self, masker: CandidateMasker, weight_OI: Tensor, prior_OI: Tensor, row0: int = 0
    ) -> None:
        alpha = 0.0 if self.prior is None else self.alpha  # without a prior no candidate is raised
        masker.start(prior_OI, self.init_std, alpha, self.seed, row0)

    def loss(self, run: Run) -> Tensor:
        result = run(run.draw())
        return result.loss - self.values["penalty_weight"] * result.penalty

    def metrics(self) -> dict[str, Tensor]:
        return {name: torch.tensor(value) for name, value in self.values.items()}
