"""Lightning's Trainer, which can also export a checkpoint, and leaves signals alone."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, cast

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.strategies import (
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn

from sparsify.common.errors import SparsifyError, restoring
from sparsify.common.signals import Interrupted
from sparsify.training.checkpoints.shards import ShardedCheckpointIO
from sparsify.training.parallel.ddp import DDP
from sparsify.training.parallel.fsdp import Sharded
from sparsify.training.parallel.launcher import use_own_launcher


class _Signals(_SignalConnector):
    """Leaves the process's signals alone. Lightning's connector would end the run at SIGTERM
    without saving, and in every SLURM job would queue the job again at SIGUSR1.
    """

    def register_signal_handlers(self) -> None:
        self.received_sigterm = False


class Trainer(LightningTrainer):
    """A Trainer that can also export a checkpoint; everything else is Lightning's.

    Args:
        strategy: how the processes of a run share the work; ``fsdp`` is
            :class:`~sparsify.training.parallel.Sharded`, on CPU too.
        limit_train_batches: how many batches of an epoch, or, with a point, which share of them.
        limit_val_batches: the same for validation.
        limit_test_batches: the same for the test.
        limit_predict_batches: the same for prediction.
        overfit_batches: train and validate on only this many batches, or on this share of them.
        val_check_interval: batches, or a share of an epoch, between two validations.
        settings: Lightning's other arguments.

    Attributes:
        exporting: whether ``export`` is running.
        sensing: whether the run measures the sensitivity of blocks instead of the model.
        restores: the checkpoint that is about to be loaded, if one is; what it holds is then not
            computed.
    """

    exporting = False
    sensing = False
    restores: Any = None

    # 1 means one batch, 1.0 all of them. Lightning's types are typing's Union[int, float], which
    # Python takes for the same as Union[float, int]; the command line would read "1" by the order
    # that any module happened to write first. The unions below keep their order.
    def __init__(
        self,
        *,
        strategy: Strategy | str = "auto",
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        val_check_interval: int | float | str | timedelta | dict[str, int] | None = None,
        **settings: Any,
    ) -> None:
        with _own_ddp():
            super().__init__(
                strategy=own_strategy(strategy),
                limit_train_batches=limit_train_batches,
                limit_val_batches=limit_val_batches,
                limit_test_batches=limit_test_batches,
                limit_predict_batches=limit_predict_batches,
                overfit_batches=overfit_batches,
                val_check_interval=val_check_interval,
                **settings,
            )
        if not _requeues(settings.get("plugins")):
            self._signal_connector = _Signals(self)
        use_own_launcher(self.strategy)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:
            self.strategy.checkpoint_io = ShardedCheckpointIO()
        self._checkpoint_connector = _Restorer(self)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        # Lightning calls no hook before it loads the checkpoint, and by then the model is built.
        self.restores = kwargs.get("ckpt_path")
        try:
            return super()._run(*args, **kwargs)
        except KeyboardInterrupt:
            # Lightning would exit the interpreter, and ignore SIGINT from then on.
            raise Interrupted(signal.SIGINT) from None
        finally:
            # The LightningModule need not be ours.
            if origin := getattr(self.lightning_module, "origin", None):
                origin.restore_modes()

    def export(
        self, model: LightningModule, datamodule: LightningDataModule, ckpt_path: str | None = None
    ) -> None:
        """Test a checkpoint and write its model as a Hugging Face folder.

        Args:
            model: the module.
            datamodule: its data.
            ckpt_path: the checkpoint, usually ``last.ckpt`` of the run; without one, the strategy's
                starting masks are exported.
        """
        self.exporting = True
        try:
            self.test(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)
        finally:
            self.exporting = False


class _Restorer(_CheckpointConnector):
    """Lightning's connector; one message says if a checkpoint cannot be restored."""

    def _restore_modules_and_callbacks(self, *args: Any, **kwargs: Any) -> None:
        path = args[0] if args else kwargs.get("checkpoint_path")
        with restoring(path) if path else nullcontext():
            super()._restore_modules_and_callbacks(*args, **kwargs)

    def restore_training_state(self) -> None:
        with restoring(self._ckpt_path) if self._ckpt_path else nullcontext():
            super().restore_training_state()
        if self._ckpt_path and self.trainer.state.fn == TrainerFn.FITTING:
            _find_place(self.trainer.fit_loop)


def _find_place(fit_loop: Any) -> None:
    """Mend what Lightning does on a resume, once its loops' state is restored."""
    # Whoever asked for the number of steps, as our optimizers do, had the training data set up
    # before its place was known. Lightning would not set it up again.
    fit_loop._combined_loader = None
    fit_loop.setup_data()
    epochs, loop = fit_loop.epoch_progress.current, fit_loop.epoch_loop
    # A checkpoint of an epoch's very end: Lightning would end that epoch once more, and leave out
    # the next, in runs of max_steps.
    if epochs.ready == epochs.processed:
        cast(Any, _Loop).restarting.fset(fit_loop, False)
        return
    # One of a step's end, after which a validation was due: Lightning would leave it out, and at
    # the end of an epoch its hooks too. It makes up for a validation that has begun.
    batches, validation = loop.batch_progress, loop.val_loop.batch_progress
    validation.reset()
    at_end = batches.total.completed == batches.total.processed - 1
    if not loop._should_check_val_fx(fit_loop._data_fetcher):
        return
    if at_end:
        batches.increment_completed()
        validation.total.ready = validation.total.started = 1
    elif loop._batches_that_stepped == loop.global_step and not loop._should_accumulate():
        loop._batches_that_stepped -= 1  # Lightning will count the last step of a run again


@contextmanager
def _own_ddp() -> Iterator[None]:
    """Within this context the name "ddp" means our strategy; "auto" becomes "ddp" on several
    devices. Only our Trainer is made within it: a script's other Trainers use Lightning's DDP.
    """
    registry: Any = StrategyRegistry
    former = registry["ddp"]
    registry.register("ddp", DDP, override=True, start_method="popen")
    try:
        yield
    finally:
        registry["ddp"] = former


def _requeues(plugins: Any) -> bool:
    """Whether the user asked for SLURM to queue the job again. Only a plugin counts as asking,
    since Lightning by itself would do it in every job.
    """
    given = plugins if isinstance(plugins, list) else [plugins]
    return any(isinstance(one, SLURMEnvironment) and one.auto_requeue for one in given)


def own_strategy(strategy: Strategy | str) -> Strategy | str:
    """Our sharded strategy for the name ``fsdp``; any other strategy unchanged.

    Raises:
        SparsifyError: it is another strategy that shards, which does not work with maskers.
    """
    if isinstance(strategy, str):
        if strategy.lower() == "fsdp":
            return Sharded()
        if strategy.lower().startswith("fsdp"):
            raise SparsifyError(
                f"strategy {strategy}: sharded tensors stay on their devices here; give "
                "--trainer.strategy fsdp"
            )
    elif isinstance(strategy, FSDPStrategy | ModelParallelStrategy) and not isinstance(
        strategy, Sharded
    ):
        raise SparsifyError(
            f"strategy {type(strategy).__name__}: it cannot hold frozen bf16 weights beside fp32 "
            "logits, or keep base weights out of checkpoints; give --trainer.strategy fsdp, which "
            "is sparsify.training.parallel.Sharded"
        )
    return strategy
