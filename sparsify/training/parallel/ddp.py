"""Data parallelism with whole models, for strategies with gradients and without."""

from typing import Any, cast

from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy

from sparsify.masking.strategy import SparsityStrategy


class DDP(DDPStrategy):
    """Lightning's strategy, but it does not wrap a model that will have no gradients.

    torch's wrapper waits in every step for gradients to average, and raises an error if none comes.
    A strategy that learns from losses alone exchanges these itself. It only needs all ranks to
    start from equal values, which this class sends.
    """

    def configure_ddp(self) -> None:
        module = cast(Any, self.lightning_module)
        # A script may train a module that is not ours with our Trainer.
        strategy = getattr(module, "strategy", None)
        if isinstance(strategy, SparsityStrategy) and strategy.effect.without_gradients:
            _sync_module_states(module)  # sends the first rank's, as the wrapper would
        else:
            super().configure_ddp()
