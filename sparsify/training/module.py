"""The LightningModule: a causal LM, its masked layers and a strategy.

One training step: Lightning gives a batch of token ids; the strategy asks the :class:`Run` for one
or more forward passes, each under a draw; every masked layer makes its mask for that draw and
forgets it; the loss goes back through the layers, which make their masks again; the optimizer
updates what the strategy learns.

Shapes: B windows, T tokens.
"""

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from sparsify.calibration import Calibration, Layerwise
from sparsify.calibration.shared import on_rank_zero
from sparsify.common.console import tracked
from sparsify.common.errors import SparsifyError
from sparsify.common.ranks import data_parallel, from_rank_zero
from sparsify.common.seal import content_hash
from sparsify.masking.inject import inject
from sparsify.masking.layer import MaskScope, base_parameters, masked_layers
from sparsify.masking.masker import Draw, Masking
from sparsify.masking.overrides import Overrides
from sparsify.masking.pattern import NMPattern
from sparsify.masking.schedule import Schedule
from sparsify.masking.select import decoder_blocks, select
from sparsify.masking.strategy import SparsityStrategy
from sparsify.models.base import EMBEDDED, Dtype, load_model, load_tokenizer, stored_dtype
from sparsify.models.hashes import hash_parameters
from sparsify.models.load_checks import (
    check_called,
    check_finite,
    check_model,
    check_positions,
    check_tokenizer,
    check_tokens,
    correct_tie,
)
from sparsify.models.modes import Modes
from sparsify.models.perplexity import PerplexityMeter, Score, score_metrics, token_losses
from sparsify.models.token_batch import TokenBatch, split_batch
from sparsify.training.checkpoints.content import check_content, check_training
from sparsify.training.checkpoints.new_settings import OwnSchedule, keep_patience, keep_settings
from sparsify.training.checkpoints.resume import check_fits, check_resumes, continue_on, step_shape
from sparsify.training.distillation import Distillation
from sparsify.training.guards import (
    FiniteWatch,
    check_dtype,
    check_learned,
    check_limits,
    check_objects,
    check_precision,
    check_shards,
    check_text,
    finite_scores,
)
from sparsify.training.parallel.masked_gather import check_gather, shard_gathering_masked
from sparsify.training.step import BatchRun, checkpoint_activations

ADAMW: dict[str, Any] = {"lr": 5e-4, "weight_decay": 0.1, "betas": [0.9, 0.95]}


def _adamw(params: Any) -> Optimizer:
    return AdamW(params, **ADAMW)


class SparseCausalLM(LightningModule):
    """Learns, evaluates and holds the masks of one causal LM.

    Args:
        strategy: the sparsification method.
        name_or_path: ``embedded``, a local folder, a Hugging Face id, or a GGUF file in either.
        pattern: N kept of every M consecutive input weights, as 'N:M'.
        include: a glob, or several, of layers to mask; the default is every linear layer of the
            decoder blocks.
        exclude: a glob, or several, of layers to leave dense.
        overrides: other patterns for some of the layers: 'N:M', or 'dense', by glob; of several
            globs that match a layer the last one holds.
        dtype: the type of the base weights; what is learned is always fp32.
        gradient_checkpointing: recompute each block in backward instead of storing its activations.
        calibration: the text from which masks are computed in one shot, or learned masks start.
        distillation: learn from the dense model's predictions too.
        optimizer: what updates the logits, unless the strategy brings its own.
        lr_final: the learning rate at the end as a share of the one at the start; the way there is
            half a cosine.
        warmup_steps: optimizer steps over which the learning rate first rises from zero.
        gather: what ranks that shard a model send each other: ``plain`` weights and all that masks
            are made of, or ``masked`` weights: less, and all ranks have the same masks.
        seed: of the masks' noise.
    """

    def __init__(
        self,
        strategy: SparsityStrategy,
        name_or_path: str = EMBEDDED,
        pattern: str = "2:4",
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        overrides: dict[str, str] | None = None,
        dtype: Dtype = "float32",
        gradient_checkpointing: bool = False,
        calibration: Calibration = Calibration(),
        distillation: Distillation = Distillation(),
        optimizer: OptimizerCallable = _adamw,
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
        self.pattern = NMPattern.parse(pattern)
        self.include = [include] if isinstance(include, str) else include
        self.exclude = [exclude] if isinstance(exclude, str) else exclude or []
        self.overrides = Overrides.parse(overrides)
        self.dtype_name: Dtype = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.calibration = calibration
        self.calibrated: dict[str, Any] | None = None
        self.distillation = distillation
        self.teacher: PreTrainedModel | None = None
        self.make_optimizer = optimizer
        self.lr_final, self.warmup_steps = lr_final, warmup_steps
        self.gather = gather
        self.seed = strategy.seed = seed
        self.model: PreTrainedModel | None = None
        self.strategy = strategy
        self.scope = MaskScope()
        self.dense_layers: dict[str, str] = {}
        self.base_hash = ""
        self.task_loss: Tensor | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        # In a list, so that it is not registered before it is masked.
        self._given: list[PreTrainedModel] = []
        self._modes: Modes | None = None  # those of a given model
        self._meter: PerplexityMeter | None = None
        self._steps_before = 0
        self.validated_at = -1
        self._finite = FiniteWatch()

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        strategy: SparsityStrategy,
        **options: Any,
    ) -> "SparseCausalLM":
        """Wrap a model object, in place; ``options`` as for the class."""
        check_model(model)  # which says more of a wrong model
        check_objects(model, tokenizer, strategy)
        module = cls(
            strategy, name_or_path=model.config._name_or_path or type(model).__name__, **options
        )
        module._given, module._tokenizer = [model], tokenizer
        return module

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # its other options pass through
        cls, checkpoint_path: Any, **options: Any
    ) -> "SparseCausalLM":
        """As Lightning's, but of the file's settings only those that make this class are used:
        Lightning calls a function that they may name.
        """
        options = {"weights_only": True} | options | {"_instantiator": None}
        load: Any = LightningModule.load_from_checkpoint
        return load.__func__(cls, checkpoint_path, **options)

    @property
    def base_name(self) -> str:
        """The model's name for records: of a local path the last part, as they travel."""
        path = Path(self.name_or_path).expanduser()
        return path.resolve().name if path.exists() else self.name_or_path

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that belongs to the model."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.name_or_path)
        return self._tokenizer

    @property
    def lm(self) -> PreTrainedModel:
        """The model with its masked layers, once it is built."""
        if self.model is None:
            raise RuntimeError("the model is built in configure_model, which has not run yet")
        return self.model

    def configure_model(self) -> None:
        """Load, mask, calibrate and shard; the second call does nothing."""
        if self.model is not None:
            if self._modes is not None:
                self._modes.enter()
                if self.gradient_checkpointing:  # which blocks do in training mode alone
                    for part in self.model.modules():
                        if isinstance(part, GradientCheckpointingLayer):
                            part.training = True
            return
        check_precision(None if self._trainer is None else self.trainer.precision)
        # In main memory, where Lightning would have it all on the device at once: calibration takes
        # blocks there one by one.
        with torch.device("cpu"):
            self._build()
        if self._device_mesh is not None:
            self._shard()

    def _build(self) -> None:
        if self._given:
            model = self._given.pop()
            self.stored_dtype = model.dtype
            self._modes = Modes(model)
            self._modes.enter()  # dropout would give other statistics, and so other masks
            correct_tie(model)
        else:
            model = load_model(self.name_or_path, self.dtype_name)
            self.stored_dtype = stored_dtype(self.name_or_path)
        check_model(model)
        check_finite(model.named_parameters())
        self._check_text(model)
        self.base_hash = hash_parameters(dict(model.named_parameters()))
        layers, self.dense_layers = select(
            model, self.pattern, self.include, self.exclude, self.overrides
        )
        check_dtype(self.strategy, model.dtype)
        model.requires_grad_(self.strategy.weights == "trained")
        fits = self._trainer is None or self.trainer.state.fn == TrainerFn.FITTING
        if self.distillation.weight and self.strategy.weights == "trained" and fits:
            self.teacher = copy.deepcopy(model).requires_grad_(False)
        if self.strategy.prunes:
            self.scope = inject(
                model, layers, self.pattern, self.strategy.make_masker, self.overrides
            )
        else:
            self.dense_layers |= dict.fromkeys(
                layers, f"{type(self.strategy).__name__} masks nothing"
            )
        with self.scope.use("dense"):
            check_called(model, masked_layers(model))
        if self.gradient_checkpointing:
            checkpoint_activations(model, self.scope)
        self.model = model
        # Without a trainer the masks come from a checkpoint too.
        if self._trainer is not None and not getattr(self._trainer, "restores", False):
            self._calibrate()
        if not any(p.requires_grad for p in self.parameters()):
            # A run that learns nothing still is one optimizer step for Lightning, and needs
            # something to step.
            self.anchor = nn.Parameter(torch.zeros(1))

    def _check_text(self, model: PreTrainedModel) -> None:
        """Refuse windows that the model cannot take, where it is known what they are."""
        datamodule = None if self._trainer is None else cast(Any, self.trainer).datamodule
        if datamodule is not None:
            check_positions(model, datamodule.block_size)
            check_tokenizer(model, self.tokenizer)

    def restore_modes(self) -> None:
        """Have the modules of a given model in training or evaluation mode as they came."""
        if self._modes is not None:
            self._modes.leave()

    def _calibrate(self) -> None:
        trainer = self._trainer
        device = self.lm.device if trainer is None else trainer.strategy.root_device

        def watch(blocks: Iterable[str]) -> Iterable[str]:
            return tracked(blocks, "calibrating", trainer)

        engine = Layerwise(
            self.lm,
            self.scope,
            self.calibration_windows,
            self.calibration,
            self.base_hash,
            device,
            watch,
        )
        layers = masked_layers(self.lm)
        left = dict(layers)
        for name, result in on_rank_zero(engine.run(self.strategy), self.lm.device):
            layer = left.pop(name)
            self.strategy.init_masker(layer.masker, layer.weight_OI, result)
            if result.weight is not None:
                layer.weight_OI.data.copy_(result.weight)
        for layer in left.values():
            self.strategy.init_masker(layer.masker, layer.weight_OI, None)
        (self.calibrated,) = from_rank_zero([engine.record])
        if self.calibrated is not None and trainer is not None:
            text = cast(Any, trainer).datamodule.describe("train")
            self.calibrated["sources"] = text["sources"]

    def calibration_windows(self) -> Tensor:
        """Windows of training text, int64 ``[S, T]``."""
        datamodule: Any = cast(Any, self.trainer).datamodule
        check_text(self.name_or_path, datamodule.embedded, "compute")
        windows_ST = datamodule.calibration(self.calibration.samples, self.calibration.seed)
        check_tokens(self.lm, windows_ST)
        return cast(Tensor, windows_ST)

    def _shard(self) -> None:
        meshes = cast(Any, self.device_mesh)
        mesh = meshes["data_parallel"]
        check_shards(
            self.strategy, masked_layers(self.lm), mesh.size(), meshes.size() // mesh.size()
        )
        if self.gathers_masked:
            check_gather(self.strategy)
            shard_gathering_masked(self.lm, mesh)
            return
        for model in (self.lm, self.teacher):
            if model is not None:
                for block in decoder_blocks(model).values():
                    fully_shard(block, mesh=mesh)
                # Left to itself torch keeps what belongs to no block gathered until backward. Where
                # none comes, steps would move the gathered copy, and be lost with it.
                always = True if self.strategy.without_gradients else None
                fully_shard(model, mesh=mesh, reshard_after_forward=always)

    @property
    def gathers_masked(self) -> bool:
        """Whether ranks gather masked weights; where nothing is sharded nothing is gathered."""
        return self.gather == "masked" and self._device_mesh is not None

    @property
    def steps(self) -> int:
        """Optimizer steps that made the present masks."""
        return self.trainer.global_step or self._steps_before

    @property
    def learns(self) -> bool:
        """Whether training changes anything but the anchor."""
        return any(p.requires_grad for name, p in self.named_parameters() if name != "anchor")

    def ends_step(self, batch_idx: int) -> bool:
        """Whether this micro-batch is the last of its optimizer step."""
        whole = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        return whole or self.trainer.is_last_batch

    def on_fit_start(self) -> None:
        check_limits(self.trainer, self._epoch_batches)
        if self.learns:
            check_text(self.name_or_path, cast(Any, self.trainer).datamodule.embedded, "learn")

    def training_step(self, batch: Tensor | TokenBatch, batch_idx: int) -> Tensor:
        if not self.learns:
            self.trainer.should_stop = True
            return 0 * self.anchor.sum()
        rank, ranks = (0, 1) if self.gathers_masked else data_parallel(self.trainer)
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        first = Draw(self.seed, self.trainer.global_step, micro_batch * ranks + rank)
        run = BatchRun(self.lm, self.scope, batch, first, self.distillation, self.teacher)
        loss = self.strategy.loss(run)
        if self.strategy.without_gradients:  # Lightning goes backward through every loss
            loss = loss.detach().requires_grad_()
        self.task_loss = run.task_loss if run.task_loss is not None else loss.detach()
        self._finite.watch(self.task_loss, self.trainer)
        self.log("train/loss", loss.detach())
        self.log("train/task_loss", self.task_loss, prog_bar=True)
        for name, value in self.strategy.metrics().items():
            self.log(f"train/{name}", value)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.strategy.before_step(masked_layers(self.lm))

    def on_train_end(self) -> None:
        self.check_finite()  # the last steps may lie between two logs

    def check_finite(self) -> None:
        """Stop the run on every rank if its loss or what it has learned is not finite on one."""
        self._finite.check(self.trainer)
        check_learned(self, self.trainer)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.strategy.after_step(masked_layers(self.lm), optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        params = [p for p in self.parameters() if p.requires_grad]
        if self.gathers_masked:  # base weights have gradients then, on their way to the masks
            base = set(base_parameters(self.lm).values())
            params = [p for p in params if p not in base]
        layers = masked_layers(self.lm)
        try:
            optimizer = self.strategy.optimizer(params, layers, self.make_optimizer)
        except SparsifyError:
            raise
        except (ValueError, TypeError) as error:
            raise SparsifyError(
                f"the optimizer refuses its settings: {error}; mend --model.optimizer.init_args"
            ) from error
        keep_settings(optimizer, self.make_optimizer)
        steps = self.trainer.estimated_stepping_batches
        if not 1 <= steps < math.inf:
            raise SparsifyError(
                f"a run of {steps} optimizer steps: schedules need an end, at step 1 or later; "
                "give --trainer.max_steps"
            )
        decay = Schedule(1.0, self.lr_final, "cosine")

        def factor(step: int) -> float:
            warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
            return warmup * decay.at(step / steps)

        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": OwnSchedule(optimizer, factor), "interval": "step"},
        }

    # -- evaluation: always under the hard mask, which is what ships -------------------------------

    def window_losses(self, batch: Tensor | TokenBatch, masking: Masking = "hard") -> Tensor:
        """Losses of every next token, target or not, nats, ``[B, T - 1]``, without a graph."""
        tokens_BT = split_batch(batch)[0]
        with torch.no_grad(), self.scope.use(masking):
            return token_losses(self.lm(input_ids=tokens_BT, use_cache=False).logits, tokens_BT)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """The hard mask and the precision under which scores are measured, without a graph."""
        precision = nullcontext()
        if self._trainer is not None:
            precision = cast(Any, self.trainer).precision_plugin.val_step_context()
        with torch.no_grad(), precision, self.scope.use("hard"):
            yield

    def on_validation_epoch_start(self) -> None:
        self._meter = PerplexityMeter(
            cast(Any, self.trainer).datamodule.validation_names, self.device
        )

    def validation_step(
        self, batch: Tensor | TokenBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        meter = cast(PerplexityMeter, self._meter)
        name, (tokens_BT, targets_BT) = meter.names[dataloader_idx], split_batch(batch)
        meter.update(name, self.window_losses(batch), targets_BT, tokens_BT)

    def on_validation_epoch_end(self) -> None:
        self.validated_at = self.trainer.global_step
        self._log_scores("val")

    def on_test_epoch_start(self) -> None:
        self._meter = PerplexityMeter(cast(Any, self.trainer).datamodule.test_names, self.device)

    def test_step(
        self, batch: Tensor | TokenBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _log_scores(self, split: str) -> None:
        self.scores: dict[str, Score] = finite_scores(cast(PerplexityMeter, self._meter), self)
        for name, value in score_metrics(split, self.scores).items():
            self.log(name, value, prog_bar=name == f"{split}/perplexity")

    # -- checkpoints: what is learned, and the name of the base ------------------------------------

    def saved_keys(self) -> set[str]:
        """The state's keys that checkpoints hold: all but base weights that stay as they are."""
        kept = {name for name in self.state_dict() if not name.startswith("teacher.")}
        if self.strategy.changes_base:
            return kept
        return kept - {f"model.{name}" for name in base_parameters(self.lm, all_names=True)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_finite()
        kept = self.saved_keys()
        checkpoint["state_dict"] = {
            key: value for key, value in checkpoint["state_dict"].items() if key in kept
        }
        checkpoint["base_hash"] = self.base_hash
        if "config" in (settings := checkpoint.get("hyper_parameters", {})):
            checkpoint["settings_sha256"] = content_hash(settings["config"])
        checkpoint["schedule_values"] = dict(self.strategy.values)
        checkpoint["calibration"] = self.calibrated
        # Once fit has returned, Lightning has forgotten where in the data it was.
        checkpoint["resumable"] = self.trainer.training
        checkpoint["step_shape"] = step_shape(self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Without a trainer Lightning has read it by itself.
        path = None if self._trainer is None else self.trainer.ckpt_path
        check_content(checkpoint, path or "the checkpoint")
        self.configure_model()
        self._steps_before = checkpoint["global_step"]
        self.calibrated = checkpoint.get("calibration")
        # What describes the masks depends on them; a run that trains on sets them anew.
        self.strategy.values.update(checkpoint.get("schedule_values") or {})
        state = self.state_dict()
        check_fits(checkpoint, self.base_hash, {key: state[key] for key in self.saved_keys()})
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            check_resumes(checkpoint, self.trainer.max_steps, self.trainer.ckpt_path)
            check_training(checkpoint, self.trainer)
            keep_patience(checkpoint["callbacks"], cast(Any, self.trainer).callbacks)
            if (now := step_shape(self.trainer)) != checkpoint["step_shape"]:
                continue_on(checkpoint, now, self._epoch_batches())

    def _epoch_batches(self) -> int:
        """Micro-batches of an epoch on this rank."""
        batches = len(cast(Any, self.trainer).datamodule.train_dataloader())
        limit = self.trainer.limit_train_batches
        return min(batches, limit) if isinstance(limit, int) else int(batches * limit)
