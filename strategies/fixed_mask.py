"""Fine-tunes a model under the unchanging mask of another strategy. It trains the kept weights (the
last row of table 3 of MaskLLM, Fang et al., NeurIPS 2024, arXiv 2409.17481), or a low-rank term
that is added to them (LoRA, Hu et al., ICLR 2022, arXiv 2106.09685).

The term is masked together with the weight, ``mask o (W + alpha / rank * B A)``, in training and in
the export. The library ``peft`` is not used: it adds its product outside the layer's weight, where
no mask reaches it, so that merging the product would fill the mask's zeros.

Shapes: O out, I in, R rank of the addition.
"""

import math

import torch
from torch import Tensor, nn

from sparsify.calibration.prior import StartsFromPrior
from sparsify.common.errors import SparsifyError
from sparsify.masking import noise
from sparsify.masking.effect import Effect
from sparsify.masking.masker import FixedMasker
from sparsify.masking.pattern import NMPattern
from sparsify.masking.strategy import SparsityStrategy


class AdaptedMasker(FixedMasker):
    """Applies an unchanging mask to the weight plus the product of two small matrices, B A.

    Args:
        name, shape, pattern: as for every masker.
        rank: R.
        scale: the factor of the product.
        seed: the seed of A's initial values.
    """

    lora_A_RI: Tensor
    lora_B_OR: Tensor

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        pattern: NMPattern,
        rank: int,
        scale: float,
        seed: int,
    ) -> None:
        super().__init__(name, shape, pattern)
        self.scale, self.seed = scale, seed
        self.lora_A_RI = nn.Parameter(torch.zeros(rank, shape[1], dtype=self.learned_dtype))
        self.lora_B_OR = nn.Parameter(torch.zeros(shape[0], rank, dtype=self.learned_dtype))

    def set_mask(self, mask_OI: Tensor) -> None:
        """Store the mask. Draw A from U(-1/sqrt(I), 1/sqrt(I)), Kaiming's rule as LoRA uses it, and
        set B to zero, so that the sum starts as the weight.
        """
        super().set_mask(mask_OI)
        rank, inputs = self.lora_A_RI.shape
        key = noise.fold("lora_A", self.seed, self.name)
        start = noise.uniform(key, rank, inputs, device=self.lora_A_RI.device)
        self.lora_A_RI.data.copy_((2 * start - 1) / math.sqrt(inputs))
        self.lora_B_OR.data.zero_()

    def harden(self, weight_OI: Tensor, row0: int = 0) -> Tensor:
        # Add in fp32, then round to the stored type, so that training sees what is exported.
        adapted_OI = weight_OI + self.scale * (self.lora_B_OR @ self.lora_A_RI)
        return super().harden(adapted_OI.to(weight_OI.dtype), row0)


class FixedMask(StartsFromPrior[FixedMasker]):
    """Trains the kept weights, and every Parameter outside the masked layers. With a rank, it
    trains only a low-rank term in each masked layer, and the base weights stay frozen.

    Args:
        prior: gives the mask: a strategy by name or as an object, a mask file or an exported folder
            (of which only the masks are read). If a strategy updates weights, full training starts
            from the updated ones; a low-rank term is always added to the base weights.
        lora_rank: the rank of the low-rank term; 0 trains the weights themselves.
        lora_alpha: the term is scaled by ``lora_alpha / lora_rank``.
    """

    def __init__(
        self,
        prior: SparsityStrategy | str = "sparsegpt",
        lora_rank: int = 0,
        lora_alpha: float = 16.0,
    ) -> None:
        if not prior:
            raise SparsifyError(
                f"prior={prior!r}; there must be a mask to stay under: name a strategy, a mask "
                "file or an exported folder, for instance 'sparsegpt'"
            )
        if lora_rank < 0 or lora_alpha <= 0:
            raise SparsifyError(
                f"lora_rank={lora_rank}, lora_alpha={lora_alpha}; the rank must not be negative "
                "(0 trains the whole weights), and alpha must be positive"
            )
        super().__init__(prior, weights=not lora_rank)
        self.lora_rank, self.lora_alpha = lora_rank, lora_alpha
        self.effect = Effect(weights="adapted" if lora_rank else "trained")

    def make_masker(self, name: str, shape: tuple[int, int], pattern: NMPattern) -> FixedMasker:
        if not self.lora_rank:
            return FixedMasker(name, shape, pattern)
        scale = self.lora_alpha / self.lora_rank
        return AdaptedMasker(name, shape, pattern, self.lora_rank, scale, self.seed)
