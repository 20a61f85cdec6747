"""The interface that every sparsification method implements."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
import typing_extensions
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsify.common.errors import SparsifyError
from sparsify.masking.distillation import Distillation
from sparsify.masking.effect import Effect
from sparsify.masking.experts import Expert
from sparsify.masking.layer import MaskedLinear
from sparsify.masking.masker import FixedMasker, Masker
from sparsify.masking.pattern import NMPattern
from sparsify.masking.plain_settings import argument_names, is_plain, plain
from sparsify.masking.run import Run
from sparsify.masking.schedule import Schedule

S = TypeVar("S")
#: The class of a strategy's maskers; Any for a strategy that does not name it.
M = typing_extensions.TypeVar("M", bound=Masker, default=Any)
FORMER_ATTRIBUTES = {"weights", "prunes", "changes_base", "without_gradients", "exchanges_draws"}
NOT_SETTINGS = ("training", "values", "independent_blocks")


class BlockStatistics(Protocol):
    """Statistics of the calibration text for the layers of one block."""

    def collect(self, kind: Callable[[int, torch.device], S]) -> Mapping[str, S]: ...

    def gradient_norms(self) -> dict[str, Tensor]: ...


@dataclass
class Block:
    """One decoder block during calibration.

    Attributes:
        name: its qualified name.
        layers: its masked layers by qualified name; each expert is a layer of its own, which has a
            ``weight_OI``, and a ``masker`` with name, shape and pattern.
        text: gives statistics of the calibration text.
    """

    name: str
    layers: Mapping[str, MaskedLinear | Expert]
    text: BlockStatistics | None = None

    def collect(self, kind: Callable[[int, torch.device], S]) -> Mapping[str, S]:
        """Feed the inputs of every layer, window by window, to a new statistic of class ``kind``.

        This runs the block once over all windows, with this block's weights still unpruned. Of
        experts, only as many statistics are held as fit in some memory: take them in the order of
        ``layers``, as each change of order may run the block again.

        Args:
            kind: :class:`~sparsify.calibration.Moments`, :class:`~sparsify.calibration.Hessian`, or
                any class that is made with (number of inputs, device) and has ``add(x_TI)``; or
                with ``paired = True`` and ``add(x_TI, dense_TI)``, which also gets what the input
                would be had no block been pruned (:class:`~sparsify.calibration.CrossHessian`).

        Returns:
            The statistics by layer name; layers with the same input share one object.
        """
        return self._text.collect(kind)

    def gradient_norms(self) -> dict[str, Tensor]:
        """For each weight, the l2 norm over windows of the loss's gradient: fp32 ``[O, I]`` by
        layer name. It is always that of the dense model, even if blocks were pruned since.
        """
        return self._text.gradient_norms()

    @property
    def _text(self) -> BlockStatistics:
        if self.text is None:
            raise RuntimeError(f"block {self.name!r} was made without calibration text")
        return self.text


@dataclass
class LayerResult:
    """What calibration found for one layer.

    Attributes:
        mask: bool ``[O, I]``, True = kept.
        weight: the new weight ``[O, I]`` where the method updates it.
        inputs: the l2 norm of each input over the calibration text, fp32 ``[I]``, where a learner
            asked for it (:class:`~sparsify.calibration.prior.WithInputs`); of a block's experts
            ``[O, I]``, as each has its own inputs.
    """

    mask: Tensor
    weight: Tensor | None = None
    inputs: Tensor | None = None

    def to(self, device: torch.device) -> "LayerResult":
        """The same result on a device."""
        weight, inputs = (
            None if part is None else part.to(device) for part in (self.weight, self.inputs)
        )
        return LayerResult(self.mask.to(device), weight, inputs)


class SparsityStrategy(nn.Module, Generic[M]):
    """One method: hyper-parameters and global scalars; the tensors of a layer belong to its masker.

    Every method has a default. A one-shot method only defines ``calibrate``. To learn masks, define
    ``make_masker`` and a masker with Parameters that require gradients; derive the strategy from
    ``SparsityStrategy[ThatMasker]``, so that all methods are typed.

    The methods around an optimizer step are given each masker once, with the weight ``[O, I]`` that
    it masks; layers that share a weight share its masker. In a sharded run both are DTensors over
    all ranks; :func:`~sparsify.masking.layer.local_rows` gives the rows of this rank.

    Attributes:
        effect: what the strategy does to the model.
        independent_blocks: whether ``calibrate`` finds the same result for a block if it has not
            seen the blocks before it. If so, a calibration that was stopped continues at its next
            block; if not, it starts again. Not inherited: each class sets it for itself, or each
            object.
        distillation: how it learns from the dense model, unless the run says otherwise.
        schedules: values that change during the run.
        values: the schedules' current values: those at the start, until the annealing callback
            writes those of a step. Maskers hold the same dict.
        seed: the run's seed; the module sets it before it makes any masker.
    """

    effect: Effect = Effect()
    independent_blocks: bool = False
    distillation: Distillation = Distillation()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if former := sorted(FORMER_ATTRIBUTES & vars(cls).keys()):
            raise SparsifyError(
                f"{cls.__name__} declares {', '.join(former)}, as strategies of version 0.1 did, "
                "and nothing reads it any more; declare effect = Effect(...), which says the same"
            )

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}
        self.schedules = {}
        self.seed = 0

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        return self._schedules

    @schedules.setter
    def schedules(self, schedules: Mapping[str, Schedule]) -> None:
        self._schedules = schedules
        self.anneal(0.0)

    def anneal(self, progress: float) -> None:
        """Set ``values`` from ``schedules`` for ``progress`` = step / steps."""
        self.values.update(
            {name: schedule.at(progress) for name, schedule in self.schedules.items()}
        )

    def make_masker(self, name: str, shape: tuple[int, int], pattern: NMPattern) -> M:
        """Allocate the masker of one layer; its values come later, in ``init_masker``."""
        return cast(M, FixedMasker(name, shape, pattern))

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        """Compute masks, layer by layer, without learning; yields (layer name, result).

        Yield all layers of a block before you take the next block: the results prune the block, and
        the next block's statistics are collected on the output of the pruned blocks before it.
        """
        return iter(())

    def calibrator(self) -> "SparsityStrategy":
        """The strategy that decides the results of ``calibrate``: this one, or the one from whose
        masks this one starts.
        """
        return self

    def input_scale(self, gram_II: Tensor) -> Tensor:
        """How much each input counts in ``calibrate``, ``[I]``, given X^T X in any order."""
        return gram_II.diagonal().sqrt()

    def order_score(self, weight_OI: Tensor, scale_I: Tensor) -> Tensor:
        """Scores of which ``calibrate`` keeps about the largest, given :meth:`input_scale`."""
        return weight_OI.abs() * scale_I

    def as_prior(self) -> "SparsityStrategy":
        """What runs where this strategy is named, without settings, as the prior of another: the
        settings that find the best masks for the base weights.
        """
        return self

    def init_masker(
        self, masker: M, weight_OI: Tensor, result: LayerResult | None, row0: int = 0
    ) -> None:
        """Give the masker its first values, from calibration's result if there is one.

        If layers share a masker, this is called with each layer's result; the last call wins.

        Args:
            masker: what ``make_masker`` made.
            weight_OI: the layer's weight, or rows of it.
            result: calibration's result for these rows; None if it gave none.
            row0: the index of the first row in the whole layer.
        """
        if result is None:
            raise SparsifyError(
                f"{masker.name}: {type(self).__name__}.calibrate gave no mask; "
                "it must yield every layer, or init_masker must be defined"
            )
        masker.set_mask(result.mask)

    def loss(self, run: Run) -> Tensor:
        """The loss of one micro-batch, 0-d."""
        return run(run.draw()).loss

    def optimizer(
        self,
        params: list[nn.Parameter],
        maskers: Mapping[M, Tensor],
        default: Callable[[list[nn.Parameter]], Optimizer],
    ) -> Optimizer:
        """Make the optimizer of everything that is learned.

        Args:
            params: all Parameters that require gradients.
            maskers: for an optimizer that needs to know which Parameter belongs to which masker.
            default: makes the optimizer that the user configured.
        """
        return default(params)

    def before_step(self, maskers: Mapping[M, Tensor]) -> None:
        """Called once before every optimizer step; all gradients exist and are not yet clipped."""

    def after_step(self, maskers: Mapping[M, Tensor], lr: float) -> None:
        """Called once after every optimizer step, for proximal steps or decoupled decay."""

    def metrics(self) -> dict[str, Tensor]:
        """0-d tensors to log beside the loss."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The class and its settings, for the record of a run. Settings are the attributes that are
        numbers, text or lists of these, and all attributes named like an argument of the class.
        """
        given = argument_names(type(self))
        settings: dict[str, Any] = {
            name: plain(value)
            for name, value in vars(self).items()
            if (is_plain(value) or name in given)
            and not name.startswith("_")
            and name not in NOT_SETTINGS
        }
        settings |= {name: asdict(schedule) for name, schedule in self.schedules.items()}
        settings |= {
            name: part.describe()
            for name, part in self.named_children()
            if isinstance(part, SparsityStrategy)
        }
        path = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"class": path, "weights": self.effect.weights, "settings": settings}


def goes_on_by_block(strategy: SparsityStrategy) -> bool:
    """Whether a strategy's stopped calibration continues at its next block. Only what the object or
    its own class declares counts: a derived class may depend on earlier blocks.
    """
    declared = vars(type(strategy)) | vars(strategy)
    return bool(declared.get("independent_blocks"))
