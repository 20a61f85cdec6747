"""Data parallelism with whole models, for strategies with gradients and without."""

from typing import Any, cast

from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy

from sparsify.masking.strategy import SparsityStrategy


class DDP(DDPStrategy):
    """Lightning's strategy, which leaves the model as it is where no gradient will come.

    torch's wrapper waits in every step for gradients to average, and takes it for an error if none
    comes. A strategy that learns from losses alone exchanges these itself; what is left to do are
    equal values to start from.
    """

    def configure_ddp(self) -> None:
        module = cast(Any, self.lightning_module)
        # A script may train another module by our Trainer.
        strategy = getattr(module, "strategy", None)
        if isinstance(strategy, SparsityStrategy) and strategy.effect.without_gradients:
            _sync_module_states(module)  # the first rank's, as the wrapper would
        else:
            super().configure_ddp()
