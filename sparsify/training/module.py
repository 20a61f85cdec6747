"""The LightningModule: builds a masked model, and learns its masks.

One training step: Lightning gives a batch of token ids. The strategy asks the :class:`Run` for one
or more forward passes, each under a draw. Every masked layer makes its mask for that draw, uses it
and frees it. In backward the layers make their masks again. Then the optimizer updates what the
strategy learns.

Shapes: B windows, T tokens.
"""

from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from sparsify.calibration import Calibration
from sparsify.calibration.permuting import parse_permute
from sparsify.common.errors import SparsifyError
from sparsify.common.ranks import data_parallel
from sparsify.masking.distillation import Distillation
from sparsify.masking.layer import base_parameters
from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.masker import Draw
from sparsify.masking.select import Selection
from sparsify.masking.strategy import SparsityStrategy
from sparsify.models.base import EMBEDDED, Dtype
from sparsify.models.load_checks import check_model
from sparsify.models.multimodal import tokenizer_of
from sparsify.models.origin import Origin
from sparsify.models.token_batch import TokenBatch
from sparsify.training import guards, optimizers
from sparsify.training.build import build, calibrate
from sparsify.training.checkpoints import hooks
from sparsify.training.evaluation import Evaluation
from sparsify.training.parallel.shard_model import shard
from sparsify.training.step import BatchRun


class SparseCausalLM(Evaluation):
    """Learns, evaluates and holds the masks of one causal LM.

    Args:
        strategy: the sparsification method.
        name_or_path: ``embedded``, a local folder, a Hugging Face id, or a GGUF file in either.
        pattern: N kept of every M consecutive input weights, as 'N:M'.
        include: a glob, or several, of layers to mask; the default is every linear layer of the
            decoder blocks, without routers and other small ones that much depends on.
        exclude: a glob, or several, of layers to leave dense.
        overrides: other patterns for some of the layers: 'N:M' or 'dense', by glob; if several
            globs match a layer, the last one counts.
        permute: put channels in an order under which the strategy's masks lose less, at no cost
            when the model runs: all, none, some of mlp, heads and residual, or the path of an
            exported folder whose orders to take.
        dtype: the type of the base weights; maskers learn in the type that they declare, usually
            fp32.
        gradient_checkpointing: recompute each block in backward instead of storing its activations.
        calibration: the text that one-shot masks, or the starting masks of learned ones, are
            computed from.
        distillation: how to learn from the dense model.
        optimizer: updates what is learned, unless the strategy brings its own optimizer.
        lr_final: the learning rate at the end, as a share of the one at the start; it falls along
            half a cosine.
        warmup_steps: optimizer steps over which the learning rate first rises from zero.
        gather: what ranks that shard a model send each other: ``plain`` weights and the maskers'
            tensors, or ``masked`` weights, which is less, and gives all ranks the same masks.
        seed: the seed of the masks' noise.
    """

    def __init__(
        self,
        strategy: SparsityStrategy,
        name_or_path: str = EMBEDDED,
        pattern: str = "2:4",
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        overrides: dict[str, str] | None = None,
        permute: str | list[str] = "none",
        dtype: Dtype = "float32",
        gradient_checkpointing: bool = False,
        calibration: Calibration = Calibration(),
        distillation: Distillation = Distillation(),
        optimizer: OptimizerCallable = optimizers.adamw,
        lr_final: float = 0.1,
        warmup_steps: int = 0,
        gather: Literal["plain", "masked"] = "plain",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["strategy", "optimizer", "calibration", "distillation"])
        # Checkpoints hold no frozen weights; on_load_checkpoint checks the rest.
        self.strict_loading = False
        self.name_or_path = name_or_path
        self.origin = Origin(name_or_path, dtype)
        self.selection = Selection.parse(pattern, include, exclude, overrides)
        self.permute = parse_permute(permute)
        self.orders: dict[str, Tensor] | None = None  # those of a checkpoint, once it is read
        self.searched: dict[str, Any] = {}  # what the search for orders took
        self.dtype_name = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.calibration = calibration
        self.calibrated: dict[str, Any] | None = None
        self.distillation = distillation.over(strategy.distillation)
        self.make_optimizer = optimizer
        self.lr_final, self.warmup_steps = lr_final, warmup_steps
        self.gather: Literal["plain", "masked"] = gather
        self.seed = strategy.seed = seed
        self.strategy = strategy
        self.model: PreTrainedModel | None = None  # the model in `masked`, for Lightning to find
        self.teacher: PreTrainedModel | None = None
        self.task_loss: Tensor | None = None
        self.steps_before = 0
        self._masked: MaskedModel | None = None
        self._begun = False  # whether the model is being masked, or that has failed
        self._finite = guards.FiniteWatch()

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
        strategy: SparsityStrategy,
        **options: Any,
    ) -> "SparseCausalLM":
        """Wrap a model object, in place; ``options`` as for the class. The processor of a
        vision-language model may be given in place of the tokenizer, and is exported too.
        """
        check_model(model)  # which says more of a wrong model
        guards.check_objects(model, tokenizer_of(tokenizer), strategy)
        name = model.config._name_or_path or type(model).__name__
        module = cls(strategy, name_or_path=name, **options)
        module.origin.give(model, tokenizer)
        return module

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # its other options pass through
        cls, checkpoint_path: Any, **options: Any
    ) -> "SparseCausalLM":
        """Lightning's method, made safe: Lightning would call any function that the checkpoint
        names as ``_instantiator``. Here only the settings of this class are used.
        """
        options = {"weights_only": True} | options | {"_instantiator": None}
        load: Any = LightningModule.load_from_checkpoint
        return load.__func__(cls, checkpoint_path, **options)

    @property
    def masked(self) -> MaskedModel:
        """The model with its masked layers, once it is built."""
        if self._masked is None:
            raise RuntimeError("the model is built in configure_model, which has not run yet")
        return self._masked

    @property
    def lm(self) -> PreTrainedModel:
        """The Transformers model with its masked layers, once it is built."""
        return self.masked.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to the model."""
        return self.origin.tokenizer

    def configure_model(self) -> None:
        """Load, mask, calibrate and shard; the second call does nothing."""
        if self._begun:
            raise SparsifyError(
                "an earlier run of this module failed before its masks were made, and its model is "
                "masked only in part; make a new SparseCausalLM, of a model that is not masked"
            )
        if self.model is not None:
            self.origin.enter_modes(self.model, self.gradient_checkpointing)
            return
        if self._trainer is None and self.permute and self.orders is None:
            return  # Lightning hands over the checkpoint that holds the orders afterwards
        guards.check_precision(None if self._trainer is None else self.trainer.precision)
        # Build in main memory: Lightning would put the whole model on the device at once, but
        # calibration moves blocks there one by one.
        self._begun = True
        with torch.device("cpu"):
            self._masked, self.teacher = build(self, self._trainer)
            self.model = self.masked.model
            # Without a trainer, a checkpoint will give the masks, so nothing is calibrated.
            if self._trainer is not None and not getattr(self.trainer, "restores", False):
                self.calibrated = calibrate(self, self.trainer)
            if not any(p.requires_grad for p in self.parameters()):
                # Lightning takes one optimizer step even in a run that learns nothing; the
                # optimizer needs a Parameter.
                self.anchor = nn.Parameter(torch.zeros(1))
        if self._device_mesh is not None:
            shard(self.masked, self.teacher, self.gather, self.device_mesh)
        self._begun = False

    @property
    def gathers_masked(self) -> bool:
        """Whether ranks gather masked weights; False if the model is not sharded."""
        return self.gather == "masked" and self._device_mesh is not None

    @property
    def steps(self) -> int:
        """How many optimizer steps the present masks have been learned for."""
        return self.trainer.global_step or self.steps_before

    @property
    def learns(self) -> bool:
        """Whether training changes anything but the anchor."""
        return any(p.requires_grad for name, p in self.named_parameters() if name != "anchor")

    def ends_step(self, batch_idx: int) -> bool:
        """Whether this micro-batch is the last of its optimizer step."""
        whole = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        return whole or self.trainer.is_last_batch

    def on_fit_start(self) -> None:
        guards.check_limits(self.trainer, lambda: hooks.epoch_batches(self.trainer))
        data = cast(Any, self.trainer).datamodule
        if self.learns:
            guards.check_text(self.name_or_path, data.embedded, "learn")

    def training_step(self, batch: Tensor | TokenBatch, batch_idx: int) -> Tensor:
        if not self.learns:
            self.trainer.should_stop = True
            return 0 * self.anchor.sum()
        rank, ranks = (0, 1) if self.gathers_masked else data_parallel(self.trainer)
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        first = Draw(self.seed, self.trainer.global_step, micro_batch * ranks + rank)
        progress = self.trainer.global_step / self.trainer.estimated_stepping_batches
        distillation = self.distillation.at(progress)
        run = BatchRun(self.masked, batch, first, distillation, self.teacher)
        loss = self.strategy.loss(run)
        if self.strategy.effect.without_gradients:  # Lightning calls backward on every loss
            loss = loss.detach().requires_grad_()
        self.task_loss = run.task_loss if run.task_loss is not None else loss.detach()
        self._finite.watch(self.task_loss, self.trainer)
        self.log("train/loss", loss.detach())
        self.log("train/task_loss", self.task_loss, prog_bar=True)
        for name, value in self.strategy.metrics().items():
            self.log(f"train/{name}", value)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.strategy.before_step(self.masked.maskers)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.strategy.after_step(self.masked.maskers, optimizer.param_groups[0]["lr"])

    def on_train_end(self) -> None:
        self.check_finite()  # the last steps may lie between two logs

    def check_finite(self) -> None:
        """Stop the run on every rank if its loss or what it has learned is not finite on one."""
        self._finite.check(self.trainer)
        guards.check_learned(self, self.trainer)

    def configure_optimizers(self) -> Any:
        params = [p for p in self.parameters() if p.requires_grad]
        if self.gathers_masked:  # base weights then require gradients only to pass them to masks
            base = set(base_parameters(self.lm).values())
            params = [p for p in params if p not in base]
        return optimizers.configure(self, params, self.trainer.estimated_stepping_batches)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_finite()
        hooks.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        hooks.restore(self, checkpoint, self._trainer)
