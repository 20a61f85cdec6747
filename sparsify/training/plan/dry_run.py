"""A run of the real code on tensors without values: calibration and one optimizer step.

Events happen in the order of a run under Lightning, which drops gradients only after the forward
pass. So in later steps the forward pass still holds the former step's gradients, and the
optimizer's states. Both are added to what the first step shows.

Shapes: B windows of a batch, S of calibration, T tokens, V vocabulary.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from sparsify.calibration import layerwise
from sparsify.calibration.activations import Activations
from sparsify.calibration.gradients import gradient_norms
from sparsify.masking.layer import base_parameters, masked_layers
from sparsify.masking.linear import can_mask
from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.masker import Draw, Masker
from sparsify.masking.pattern import NMPattern
from sparsify.masking.select import decoder_blocks
from sparsify.masking.strategy import SparsityStrategy
from sparsify.models.base import BaseModel, load_skeleton, stored_dtype
from sparsify.models.positions import check_positions
from sparsify.training import optimizers
from sparsify.training.guards import check_dtype
from sparsify.training.module import SparseCausalLM
from sparsify.training.parallel.shard_model import check_sharding
from sparsify.training.plan.calibration import calibrate
from sparsify.training.plan.experts import balanced
from sparsify.training.plan.ledger import Ledger, Peak, live_bytes
from sparsify.training.plan.replay import replayed
from sparsify.training.plan.settings import PlanSettings
from sparsify.training.plan.work import Work, WorkCounter
from sparsify.training.step import BatchRun, checkpoint_activations

WEIGHTS, MASKERS, TEACHER = "weights", "masker tensors", "teacher"
GRADIENTS, OPTIMIZER, ACTIVATIONS = "gradients", "optimizer states", "activations"
LOGGED = "mask logging"
START, CALIBRATION, FORWARD, BACKWARD = "start", "calibration", "forward", "backward"
STEP = "optimizer step"
WINDOW = "a window of calibration"  # its work; that of CALIBRATION is done once


@dataclass(frozen=True)
class DryRun:
    """What the run showed.

    Attributes:
        peaks: the moment of the most live bytes of every phase.
        weights: bytes of the base weights.
        outside: those outside the decoder blocks.
        block: of the largest decoder block.
        maskers: of all maskers' tensors.
        block_maskers: of the largest block's.
        learned: bytes of what has a gradient in the largest block.
        window: of one calibration window's hidden states; 0 if no text is read.
        masked: the model, whose tensors hold no values.
        work: of every phase; of forward and backward that of one micro-batch.
    """

    peaks: dict[str, Peak]
    weights: int
    outside: int
    block: int
    maskers: int
    block_maskers: int
    learned: int
    window: int
    masked: MaskedModel
    work: dict[str, Work]


def dry_run(settings: PlanSettings) -> DryRun:
    """Do the dry run; raises what a run would raise, and errors of code that depends on values."""
    module = settings.module
    strategy = copy.deepcopy(module.strategy)  # its state after this run must not reach another
    skeleton = load_skeleton(module.name_or_path)
    check_positions(skeleton, settings.block_size)
    second = copy.deepcopy(skeleton)
    name = module.dtype_name
    dtype = stored_dtype(module.name_or_path) if name == "auto" else getattr(torch, name)
    selection = module.selection
    for pattern in filter(None, (selection.pattern, *selection.overrides.patterns.values())):
        pattern.rank(pattern.table())  # fills its cached tables with real values first
    for layer in skeleton.modules():
        can_mask(layer)  # tries its class with real values first
    with Ledger() as ledger, _work(ledger) as work, replayed(ledger, work, settings.device):
        model = _without_values(skeleton, dtype)
        ledger.label(WEIGHTS, [*model.parameters(), *model.buffers()])
        teacher = None
        if module.distillation.needs_dense and strategy.effect.trains_base:
            teacher = _without_values(second, dtype).requires_grad_(False)
            ledger.label(TEACHER, teacher.parameters())
        masked = _masked(BaseModel(model, module.name_or_path, dtype, ""), strategy, module)
        check_dtype(masked)
        if settings.shard:
            check_sharding(masked, module.gather, settings.ranks)
        maskers = _masker_tensors(model)
        ledger.label(MASKERS, maskers)
        ledger.phase = CALIBRATION
        params = [p for p in model.parameters() if p.requires_grad]
        kept: dict[str, int] = {}
        with balanced(model):
            reads_text = calibrate(masked, settings)
            if params:
                kept = _train(ledger, masked, teacher, params, settings)
        blocks = decoder_blocks(model).values()
        hidden = model.config.get_text_config().hidden_size
        base = list(base_parameters(model).values())
        of_blocks = [[p for n, p in b.named_parameters() if ".masker." not in n] for b in blocks]
        return DryRun(
            _later_step(ledger.peaks(), kept),
            weights=live_bytes(base),
            outside=live_bytes(base) - live_bytes([p for ps in of_blocks for p in ps]),
            block=max(map(live_bytes, of_blocks)),
            maskers=live_bytes(maskers),
            block_maskers=max(live_bytes(_masker_tensors(b)) for b in blocks),
            learned=max(live_bytes(p for p in b.parameters() if p.requires_grad) for b in blocks),
            window=settings.block_size * hidden * dtype.itemsize if reads_text else 0,
            masked=masked,
            work=work.found,
        )


def _later_step(peaks: dict[str, Peak], kept: dict[str, int]) -> dict[str, Peak]:
    """The peaks of later steps, which hold more tensors than the first."""
    found = dict(peaks)
    for phase, more in ((FORWARD, (GRADIENTS, OPTIMIZER)), (BACKWARD, (OPTIMIZER,))):
        if phase in peaks:
            found[phase] = Peak(peaks[phase].parts | {part: kept.get(part, 0) for part in more})
    return found


def _without_values(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The skeleton with fake tensors of the CPU; what was tied stays so."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for name, tensor in slots.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    is_weight = isinstance(tensor, nn.Parameter)
                    cast = is_weight and tensor.is_floating_point()
                    empty = torch.empty(tensor.shape, dtype=dtype if cast else tensor.dtype)
                    made[id(tensor)] = nn.Parameter(empty, cast) if is_weight else empty
                slots[name] = made[id(tensor)]  # type: ignore[assignment]
    return model.eval()


def _masked(base: BaseModel, strategy: SparsityStrategy, module: SparseCausalLM) -> MaskedModel:
    """Mask the model as a run does."""
    make = strategy.make_masker

    def make_masker(name: str, shape: tuple[int, int], pattern: NMPattern) -> Masker:
        masker: Masker = make(name, shape, pattern)
        # Module.to would exchange fake tensors, which the ledger's weak references forbid.
        masker.to = lambda device: masker  # type: ignore[method-assign, assignment]
        return masker

    with patch.object(strategy, "make_masker", make_masker):
        masked = MaskedModel(base, strategy, module.selection)
    if module.gradient_checkpointing:
        checkpoint_activations(masked.model, masked.scope)
    return masked


def _masker_tensors(module: nn.Module) -> list[Tensor]:
    maskers = [layer.masker for layer in masked_layers(module).values()]
    return [t for m in maskers for t in (*m.parameters(), *m.buffers())]


def _train(
    ledger: Ledger,
    masked: MaskedModel,
    teacher: PreTrainedModel | None,
    params: list[nn.Parameter],
    settings: PlanSettings,
) -> dict[str, int]:
    """Run one step; returns the bytes that stay allocated after it, by label."""
    strategy, distillation = masked.strategy, settings.module.distillation.most()
    tokens_BT = torch.zeros(settings.batch_size, settings.block_size, dtype=torch.long)

    def make_optimizer(params: list[nn.Parameter]) -> Optimizer:
        optimizer = settings.module.make_optimizer(params)
        for group in optimizer.param_groups:
            # By default torch updates all Parameters at once on a GPU, which takes memory.
            if group.get("foreach", False) is None and not group.get("fused"):
                group["foreach"] = settings.device == "cuda"
        return optimizer

    def loss() -> Tensor:
        run = BatchRun(masked, tokens_BT, Draw(0, 0, 0), distillation, teacher)
        mixed = settings.precision == "bf16-mixed"
        with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
            found = strategy.loss(run)
        return found.detach().requires_grad_() if strategy.effect.without_gradients else found

    def states() -> Iterator[Tensor]:
        values = (v for state in optimizer.state.values() for v in state.values())
        return (value for value in values if isinstance(value, Tensor))

    ledger.phase = START  # again: calibration is over
    optimizer = optimizers.make(masked, params, make_optimizer)
    ledger.label(OPTIMIZER, states())  # those that exist before the first step
    # The masks at the start, which the callback that logs their changes keeps.
    layers = masked.layers.values()
    first = [x.masker.pattern.rank(x.masker.hard_mask(x.weight_OI), True) for x in layers]
    ledger.label(LOGGED, first)
    ledger.phase = FORWARD
    now = loss()
    ledger.label_living(ACTIVATIONS)
    ledger.phase = BACKWARD
    now.backward()
    del now
    ledger.label(GRADIENTS, (p.grad for p in params))
    ledger.phase = STEP
    strategy.before_step(masked.maskers)
    nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step(lambda: 0.0)  # as Lightning gives a closure, and some need one
    strategy.after_step(masked.maskers, optimizer.param_groups[0]["lr"])
    ledger.label(OPTIMIZER, states())
    return ledger.living()


@contextmanager
def _work(ledger: Ledger) -> Iterator[WorkCounter]:
    """Count work, and apart from the rest of calibration what it does for every window."""
    run, norms = Activations.run, gradient_norms
    with WorkCounter(lambda: ledger.phase) as work:

        def run_window(*args: Any) -> Iterator[list[Tensor]]:
            with work.count_as(WINDOW):
                yield from run(*args)

        def window_norms(*args: Any) -> dict[str, Tensor]:
            with work.count_as(WINDOW):
                return norms(*args)

        with (
            patch.object(Activations, "run", run_window),
            patch.object(layerwise, "gradient_norms", window_norms),
        ):
            yield work
