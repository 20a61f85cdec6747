"""Selfmask: learn one score a weight, and keep the weights with the N largest scores of each group.
The dense model, which is the same frozen weights without the masks, is the teacher.

    start      s = scale (|w x| / mean |w x|)^2 within the prior's choice, x the norm of the input;
               kept ones get a margin more
    forward    m = the N largest scores of each group; y = (w o m) x. No noise and no temperature
    backward   ds = w g - mean over the group of w g, where g is the gradient at the masked weight
    loss       KL(dense || sparse), over the vocabulary; no cross-entropy
    step       Adam, whose second moment is one number a row: the mean of ds^2

The gradient is straight-through (Bengio et al., 2013, arXiv 1308.3432): to first order, ``w g`` is
what keeping a weight adds to the loss, of dropped weights too. A group's scores count only relative
to each other, so that their mean change is taken out. The loss is
:class:`~sparsify.masking.distillation.Distillation`, the step
:class:`~sparsify.masking.in_place.InPlaceMomentum`.

Shapes: O out, I in, J bytes of a row's mask, M group size.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsify.calibration.prior import StartsFromPrior, WithInputs, favour
from sparsify.common.errors import SparsifyError
from sparsify.masking.distillation import Distillation
from sparsify.masking.in_place import InPlaceMomentum
from sparsify.masking.layer import local_rows
from sparsify.masking.mask_bits import pack, unpack
from sparsify.masking.masker import Draw, Masker
from sparsify.masking.pattern import NMPattern
from sparsify.masking.strategy import LayerResult, SparsityStrategy

LARGEST = 1_000  # scale and margin; scores are usually below one


class _StraightThrough(torch.autograd.Function):
    """The masked weight; the scores get the gradient as if they were the mask."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, scores_OI: Tensor, mask_OI: Tensor, m: int) -> Tensor:
        ctx.save_for_backward(weight_OI)
        ctx.m = m
        return torch.where(mask_OI, weight_OI, weight_OI.new_zeros(()))

    @staticmethod
    def backward(ctx: Any, grad_OI: Tensor) -> tuple[Any, ...]:
        (weight_OI,) = ctx.saved_tensors
        slope_OGM = (grad_OI.float() * weight_OI).unflatten(-1, (-1, ctx.m))
        slope_OGM -= slope_OGM.mean(-1, keepdim=True)
        return None, slope_OGM.flatten(-2), None, None


class ScoreMasker(Masker):
    """Holds the scores, and the mask that they make as one bit a weight.

    Scores change once a step, and masks are needed at least twice a micro-batch, so that the mask
    is kept.

    Args:
        name, shape, pattern: as for every masker.
        dtype: of the scores.
    """

    scores_OI: Tensor
    kept_OJ: Tensor

    def __init__(
        self, name: str, shape: tuple[int, int], pattern: NMPattern, dtype: torch.dtype
    ) -> None:
        super().__init__(name, shape, pattern)
        self.learned_dtype = dtype
        self.scores_OI = nn.Parameter(torch.zeros(shape, dtype=dtype))
        kept_OJ = torch.zeros(shape[0], -(-shape[1] // 8), dtype=torch.uint8)
        self.kept_OJ = nn.Parameter(kept_OJ, requires_grad=False)

    def sample(self, weight_OI: Tensor, draw: Draw, row0: int = 0) -> tuple[Tensor, Tensor]:
        mask_OI = self.hard_mask(weight_OI, row0)
        masked = cast(Any, _StraightThrough).apply(
            weight_OI, self.scores_OI, mask_OI, self.pattern.m
        )
        return masked, self.penalty(masked)

    def hard_mask(self, weight_OI: Tensor, row0: int = 0) -> Tensor:
        return unpack(self.kept_OJ, self.shape[1])

    def set_scores(self, scores_OI: Tensor) -> None:
        """Take over scores, and the mask that they make."""
        self.scores_OI.data.copy_(scores_OI)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the mask of the scores that are held now."""
        scores_OI = local_rows(self.scores_OI.detach())
        local_rows(self.kept_OJ.detach()).copy_(pack(self.pattern.top(scores_OI)))

    def metrics(self) -> dict[str, Tensor]:
        """``margin``: by how much a group's smallest kept score exceeds its largest dropped one, on
        average.
        """
        scores_OI, n = self.scores_OI.detach().float(), self.pattern.n
        groups = self.pattern.groups(scores_OI).sort(-1, descending=True).values
        return {"margin": (groups[..., n - 1] - groups[..., n]).mean()}


class SelfMask(StartsFromPrior[ScoreMasker]):
    """Learns one score a weight over frozen weights; the dense model teaches.

    Unless the run says otherwise (``--model.distillation``), the loss is the divergence from the
    dense model alone.

    Args:
        prior: the masks from which learning starts: a strategy by name or as an object, a mask file
            or an exported folder; None starts from the largest weights.
        scale: the first score of a weight of its layer's mean size.
        margin: what is added to the first scores of the weights that the prior keeps. Where it
            keeps a smaller weight instead of a larger one, only this tells their scores apart.
        lr: the learning rate, in the scores' unit: about the root mean square of a row's first
            step, and of later ones where the gradients of all steps agree.
        momentum: the share of the mean gradient that is left after a step; beta_1 of Adam.
        decay: the share of the mean square that is left after a step; beta_2 of Adam.
        dtype: of the scores and of their momentum; in bfloat16 both together take four bytes a
            weight.
    """

    distillation = Distillation(weight=1.0)

    def __init__(
        self,
        prior: SparsityStrategy | str | None = "sparsegpt",
        scale: float = 0.1,
        margin: float = 0.02,
        lr: float = 0.004,
        momentum: float = 0.9,
        decay: float = 0.99,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__(prior)
        if self.prior is not None:
            self.prior = WithInputs(self.prior)
        in_range = 0 < scale <= LARGEST and 0 <= margin <= LARGEST
        if not in_range or dtype not in ("float32", "bfloat16"):
            raise SparsifyError(
                f"scale={scale}, margin={margin}, dtype={dtype!r}; the scale must be positive, the "
                f"margin not negative, both at most {LARGEST:,}, and scores are held in 'float32' "
                "or 'bfloat16'"
            )
        self.scale, self.margin, self.dtype = scale, margin, dtype
        self.lr, self.momentum, self.decay = lr, momentum, decay

    def make_masker(self, name: str, shape: tuple[int, int], pattern: NMPattern) -> ScoreMasker:
        return ScoreMasker(name, shape, pattern, getattr(torch, self.dtype))

    def init_masker(
        self, masker: ScoreMasker, weight_OI: Tensor, result: LayerResult | None, row0: int = 0
    ) -> None:
        """Start from what a weight adds to its layer's output instead of from its own size. The
        noise of its score's gradient has that size too, so that no weight is nearer to a flip by
        chance than others.
        """
        if result is not None and result.inputs is not None:
            weight_OI = weight_OI * result.inputs
        super().init_masker(masker, weight_OI, result, row0)

    def start(
        self, masker: ScoreMasker, weight_OI: Tensor, prior_OI: Tensor, row0: int = 0
    ) -> None:
        size_OI = weight_OI.detach().float().abs()
        size_OI /= size_OI.mean().clamp(min=torch.finfo(torch.float32).tiny)
        pattern = masker.pattern
        scores_OI = favour(size_OI.square_().mul_(self.scale), prior_OI, pattern)
        scores_OI += self.margin * prior_OI
        # Rounding may have made equal what is kept and what is dropped.
        masker.set_scores(favour(scores_OI.to(masker.scores_OI.dtype), prior_OI, pattern))

    def optimizer(
        self,
        params: list[nn.Parameter],
        maskers: Mapping[ScoreMasker, Tensor],
        default: Callable[[list[nn.Parameter]], Optimizer],
    ) -> Optimizer:
        return InPlaceMomentum(params, self.lr, self.momentum, self.decay, self.seed)

    def after_step(self, maskers: Mapping[ScoreMasker, Tensor], lr: float) -> None:
        for masker in maskers:
            masker.refresh()
