"""Keeps a model in evaluation mode during a run, whatever mode it came in."""

from torch import nn


class Modes:
    """Which modules of a model are in training mode: as it came, and as a run left it.

    Args:
        model: in the mode to which it shall be restored.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._given = _modes(model)
        self._of_run: dict[str, bool] | None = None

    def enter(self) -> None:
        """Evaluation mode, in which dropout is off; at a second run the modes of the first, whose
        blocks may be in training mode so that their activations are recomputed.
        """
        if self._of_run is None:
            self._model.eval()
        else:
            _set(self._model, self._of_run)

    def leave(self) -> None:
        """The modes in which the model came; modules that have come since stay as they are."""
        self._of_run = _modes(self._model)
        _set(self._model, self._given)


def _modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def _set(model: nn.Module, modes: dict[str, bool]) -> None:
    for name, module in model.named_modules():
        module.training = modes.get(name, module.training)
