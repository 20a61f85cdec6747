"""What a strategy declares about its effect on a model, for the rest of a run to read."""

from dataclasses import dataclass
from typing import Literal, get_args

from sparsify.common.errors import SparsifyError

Weights = Literal["frozen", "updated", "trained", "proxy", "adapted"]


@dataclass(frozen=True)
class Effect:
    """Each strategy declares one: on its class, or in ``__init__`` if it depends on settings.

    Attributes:
        weights: what happens to the base weights. ``frozen``: they never change; ``updated``:
            calibration changes them once; ``trained``: they learn along with the masks; ``proxy``:
            a copy of them is trained, and the base weights themselves are exported; ``adapted``:
            base weights stay frozen; the export adds a learned term to them.
        prunes: whether layers are masked at all; False for the dense reference.
        without_gradients: whether it learns from loss values alone, so that ``loss`` has no graph.
        exchanges_draws: whether each rank makes its own draws, and ranks exchange their results.

    Raises:
        SparsifyError: ``weights`` is none of these words.
    """

    weights: Weights = "frozen"
    prunes: bool = True
    without_gradients: bool = False
    exchanges_draws: bool = False

    def __post_init__(self) -> None:
        if self.weights not in (words := get_args(Weights)):
            raise SparsifyError(f"weights={self.weights!r}; give one of {', '.join(words)}")

    @property
    def only_masks(self) -> bool:
        """Whether the masks are all that the run changes: it exports the unchanged base weights
        under masks that were chosen for exactly these weights.
        """
        return self.weights == "frozen"

    @property
    def trains_base(self) -> bool:
        """Whether the base weights learn."""
        return self.weights == "trained"

    @property
    def trains_weights(self) -> bool:
        """Whether the base weights or a copy of them learn."""
        return self.weights in ("trained", "proxy")

    @property
    def changes_base(self) -> bool:
        """Whether the run changes the base weights."""
        return self.weights in ("trained", "updated")
