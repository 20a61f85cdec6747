"""Decides how layers run while vLLM loads them, checks their weights, and tells what was decided.

Nothing of vLLM is needed here. Shapes: O out, I in.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, cast, get_args
from weakref import WeakSet

import torch
from torch import Tensor, nn

from sparsify.common.errors import SparsifyError
from sparsify.export.manifest import MANIFEST
from sparsify.masking.pattern import TWO_FOUR
from sparsify.models.layer_names import family
from sparsify.serving.backends import BACKENDS, Backend, compressed
from sparsify.serving.by_tokens import by_tokens, one_weight
from sparsify.serving.choose import DENSE, Choice, Choices, Chooser, Layer
from sparsify.serving.measure import Clock, LayerKind, in_turns, token_counts
from sparsify.serving.vllm_plugin import log

Mode = Literal["measured", "one_weight", "sparse", "dense"]
Process = Callable[[nn.Module], None]
SETTING = "SPARSIFY_VLLM_CHOOSE"
MOST_TOKENS = 8192
"""Of one step, where vLLM does not say."""


def mode() -> Mode:
    """The setting in the environment.

    Raises:
        SparsifyError: it is none of the four.
    """
    found = os.environ.get(SETTING, "measured")
    if found not in get_args(Mode):
        raise SparsifyError(f"{SETTING}={found}: it must be one of {', '.join(get_args(Mode))}")
    return cast(Mode, found)


class Loading:
    """The layers of one model in one process. Every rank of a tensor-parallel group measures on its
    own GPU and decides for its own slices: nothing is sent, and whatever the others choose, their
    products are the same.

    Args:
        choose: ``measured`` takes what is fastest at each number of tokens; ``one_weight`` runs a
            layer sparse for all of them if that is faster for any; the others measure nothing.
        experts: how many layers of experts are masked.
        backends: what may run sparse layers.
        clock: measures times that are not known yet.

    Attributes:
        choices: how each layer runs whose weight was loaded.
    """

    def __init__(
        self,
        choose: Mode,
        experts: int = 0,
        backends: Sequence[Backend] | None = None,
        clock: Clock = in_turns,
    ) -> None:
        self._choose, self._experts, self._clock = choose, experts, clock
        self._backends = {b.name: b for b in (BACKENDS if backends is None else backends)}
        self._chooser: Chooser | None = None
        self._waiting: WeakSet[nn.Module] = WeakSet()
        self._left: dict[str, str] = {}
        self.choices = Choices()

    def leave(self, name: str, why: str, process: Process) -> Process:
        """Note a layer that is dense, whatever its weight.

        Returns:
            what to call instead of ``process`` once its weight is loaded: it warns if none of the
            model's layers was expected, which otherwise would go unnoticed.
        """
        self._left[name] = why

        def process_and_tell(layer: nn.Module) -> None:
            process(layer)
            if self._left and not self.choices and not self._waiting:
                log.warning("%s", self.report())
                self._left.clear()

        return process_and_tell

    def expect(self, layer: nn.Module) -> None:
        """Note a layer whose weight will be loaded; the last of them ends the loading."""
        self._waiting.add(layer)

    def choose(
        self, name: str, weight_OI: Tensor, most: int = MOST_TOKENS, obstacle: str | None = None
    ) -> Choice:
        """Decide how a layer runs, from 1 to ``most`` tokens.

        Raises:
            SparsifyError: sparse was asked for, and no backend runs here.
        """
        if self._chooser is None:
            self._chooser = Chooser(
                weight_OI.device,
                "measured" if self._choose == "one_weight" else self._choose,
                token_counts(1, most),
                list(self._backends.values()),
                self._clock,
                one_weight if self._choose == "one_weight" else by_tokens,
            )
        rows, columns = weight_OI.shape
        kind = LayerKind((rows, columns), weight_OI.dtype, bias=False)
        # Measurements draw random numbers; what is sampled later must not depend on them.
        with torch.random.fork_rng(_cuda(weight_OI)):
            self.choices[name] = self._chooser(Layer(kind, TWO_FOUR, obstacle))
        return self.choices[name]

    def compress(
        self, name: str, weight_OI: Tensor, parts: Mapping[str, int]
    ) -> dict[str, nn.Module]:
        """Compress a weight for every backend that was chosen for it; products are checked.

        Args:
            name: the layer.
            weight_OI: its weight, in this process.
            parts: how many rows each of the layers has that it holds one below the other.

        Raises:
            SparsifyError: the weight is not 2:4, or a product is wrong.
        """
        _check_two_four(name, weight_OI, parts)
        fix = f"set {SETTING}=dense"
        with torch.random.fork_rng(_cuda(weight_OI)):
            return {
                used: compressed(name, weight_OI, None, self._backends[used], fix)
                for used in self.choices[name].used
                if used != DENSE
            }

    def done(self, layer: nn.Module, loud: bool = True) -> None:
        """Note that a layer was loaded; after the last one, say how all of them run."""
        self._waiting.discard(layer)
        if not self._waiting and self.choices:
            (log.info if loud else log.debug)("%s", self.report())

    def report(self) -> str:
        """How many layers run sparse and from how many tokens on, and why the others do not."""
        sparse = sum(set(choice.used) != {DENSE} for choice in self.choices.values())
        lines = [
            f"sparsify: {sparse} of {len(self.choices) + len(self._left)} linear layers run sparse"
        ]
        if self.choices:
            lines.append(self.choices.families())
        counts: dict[tuple[str, str], int] = {}
        for name, why in self._left.items():
            counts[family(name), why] = counts.get((family(name), why), 0) + 1
        lines += [f"dense: {count} {name}: {why}" for (name, why), count in counts.items()]
        if self._experts:
            lines.append(
                f"dense: the experts of {self._experts} masked layers: vLLM multiplies all experts "
                "in one kernel of its own"
            )
        return "\n".join(lines)


def _cuda(weight_OI: Tensor) -> list[torch.device]:
    return [weight_OI.device] if weight_OI.is_cuda else []


def _check_two_four(name: str, weight_OI: Tensor, parts: Mapping[str, int]) -> None:
    """Check what a backend does not: it would drop values silently."""
    kept_OG = TWO_FOUR.groups(weight_OI != 0).sum(-1, dtype=torch.int8)
    if not (wrong := kept_OG > TWO_FOUR.n).any():
        return
    row, group = wrong.nonzero()[0].tolist()
    kept = int(kept_OG[row, group])
    for part, rows in parts.items():
        name = part
        if row < rows:
            break
        row -= rows
    raise SparsifyError(
        f"{name}: {MANIFEST} says that it fits in 2:4, but row {row} of this process's slice "
        f"keeps {kept} weights in group {group} (inputs {4 * group} to "
        f"{4 * group + 3}); the weights were changed after the export, or are not loaded from it: "
        f"run `sparsify verify` on the folder, or serve it dense with {SETTING}=dense"
    )
