"""Fine-tunes what another strategy keeps, under its mask, which stays: the whole weights (the last
row of table 3 of MaskLLM, Fang et al., NeurIPS 2024, arXiv 2409.17481), or a low-rank addition to
them (LoRA, Hu et al., ICLR 2022, arXiv 2106.09685).

The addition is masked with the weight, ``mask o (W + alpha / rank * B A)``, in training as in what
ships. The library ``peft`` adds its product outside the layer's weight, so that no mask reaches it,
and merging it would fill the zeros; therefore it is not used.

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
    """A mask that stays, over the sum of the weight and a product of two small matrices.

    Args:
        name, shape, pattern: as for every masker.
        rank: R.
        scale: of the product.
        seed: of the first A.
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
        """Take over the mask; A from U(-1/sqrt(I), 1/sqrt(I)), which is Kaiming's rule as LoRA has
        it, and B zero, so that the sum starts as the weight.
        """
        super().set_mask(mask_OI)
        rank, inputs = self.lora_A_RI.shape
        key = noise.fold("lora_A", self.seed, self.name)
        start = noise.uniform(key, rank, inputs, device=self.lora_A_RI.device)
        self.lora_A_RI.data.copy_((2 * start - 1) / math.sqrt(inputs))
        self.lora_B_OR.data.zero_()

    def harden(self, weight_OI: Tensor, row0: int = 0) -> Tensor:
        # In fp32, then rounded as it will be stored: training sees what ships.
        adapted_OI = weight_OI + self.scale * (self.lora_B_OR @ self.lora_A_RI)
        return super().harden(adapted_OI.to(weight_OI.dtype), row0)


class FixedMask(StartsFromPrior[FixedMasker]):
    """Trains the kept weights, and every Parameter outside the masked layers; or, with a rank,
    nothing but a low-rank addition to each masked layer, with the base weights frozen.

    Args:
        prior: whose mask: a strategy by name or as an object, a mask file or an exported folder. If
            it updates weights, these are the start of full training (of a file or folder only the
            masks are taken); an addition is to the weights of the base.
        lora_rank: of the addition; 0 trains the weights themselves.
        lora_alpha: the addition is scaled by ``lora_alpha / lora_rank``.
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
