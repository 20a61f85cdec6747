"""MaskLLM: learn a distribution over the candidate masks of every group (Fang et al., NeurIPS 2024,
arXiv 2409.17481).

Shapes: O out, I in, G groups = I / M, M group size, K candidates = C(M, N).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsify.calibration.prior import StartsFromPrior
from sparsify.common.errors import SparsifyError
from sparsify.masking import noise
from sparsify.masking.certainty import describe_distribution
from sparsify.masking.masker import Draw, Masker
from sparsify.masking.pattern import NMPattern
from sparsify.masking.schedule import Schedule
from sparsify.masking.strategy import Run, SparsityStrategy

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

    def mask(self, draw: Draw, row0: int = 0) -> Tensor:
        """Mix the candidates by Gumbel-softmax (equations 6 and 7; kappa as in algorithm 1)."""
        rows, candidates, groups = self.logits_OKG.shape
        device = self.logits_OKG.device
        gumbel = noise.gumbel(draw.key(self.name), rows, candidates * groups, row0, device)
        scores = self.values["kappa"] * self.logits_OKG + gumbel.view_as(self.logits_OKG)
        scores = scores / self.values["tau"]
        # In fp32 adding a share below e**-30 to 1 changes nothing. Without the clamp shares may
        # be denormal numbers, with which a CPU multiplies a hundred times more slowly.
        scores = (scores - scores.detach().amax(1, keepdim=True)).clamp(min=-30.0)
        soft = torch.softmax(scores, dim=1)
        if self.hard:
            one_hot = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
            soft = one_hot + (soft - soft.detach())
        return torch.einsum("okg,km->ogm", soft, self.table_KM).flatten(-2)

    def penalty(self, masked_OI: Tensor) -> Tensor:
        """The squared norm of the retained weights (equation 8)."""
        return masked_OI.float().square().sum()

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
        self.anneal(0.0)

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
