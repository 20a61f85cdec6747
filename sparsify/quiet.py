"""Keeps libraries' messages that mean nothing to a user off the command line."""

import logging
import warnings

from transformers.utils.logging import disable_progress_bar

NOISE = ("💡 Tip", "Loading `train_dataloader` to estimate", "TPU available")
WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 on torch 2.13
    r"Found .* module\(s\) in eval mode",  # the base model stays so that its dropout is off
    # True of an epoch; a run's logging goes on over the next ones.
    r"The number of training batches .* is smaller than the logging interval",
    r"'set_vital' is deprecated",  # torchdata 0.11 on torch 2.13
)


def quiet() -> None:
    """Silence them, for this process."""
    for handler in logging.getLogger("lightning.pytorch").handlers:
        handler.addFilter(_is_no_noise)
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message)
    disable_progress_bar()  # of loading and writing weights; downloads keep theirs


def _is_no_noise(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOISE)
