"""What a strategy does to a model, as the rest of a run needs to know it."""

from dataclasses import dataclass
from typing import Literal, get_args

from sparsify.common.errors import SparsifyError

Weights = Literal["frozen", "updated", "trained", "proxy", "adapted"]


@dataclass(frozen=True)
class Effect:
    """Declared once by each strategy: by its class, or in ``__init__`` where settings decide.

    Attributes:
        weights: what becomes of the base weights. ``frozen``: never touched; ``updated``: one-shot
            with a weight update; ``trained``: they learn with the masks; ``proxy``: a copy is
            trained, the base ships; ``adapted``: never touched, but what ships is their sum with
            something that was learned.
        prunes: whether layers are masked at all; the dense reference says no.
        without_gradients: whether it learns from losses alone, so that ``loss`` has no graph.
        exchanges_draws: whether ranks exchange what they found, each under draws of its own.

    Raises:
        SparsifyError: ``weights`` is no such word.
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
        """Whether what ships are the base weights under masks that were chosen for them as they
        are, and nothing else was learned.
        """
        return self.weights == "frozen"

    @property
    def trains_base(self) -> bool:
        """Whether the base weights learn."""
        return self.weights == "trained"

    @property
    def trains_weights(self) -> bool:
        """Whether weights learn, the base's or a copy of them."""
        return self.weights in ("trained", "proxy")

    @property
    def changes_base(self) -> bool:
        """Whether the base weights differ after the run."""
        return self.weights in ("trained", "updated")
