"""Hides messages of libraries that mean nothing to a user of the command line."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

LIBRARIES = ("lightning.pytorch", "transformers")
NOISE = ("💡 Tip", "Loading `train_dataloader` to estimate", "TPU available")
WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 on torch 2.13
    r"Found .* module\(s\) in eval mode",  # meant: dropout of the base model is off
    # True of one epoch, but logging goes on across epochs.
    r"The number of training batches .* is smaller than the logging interval",
    r"'set_vital' is deprecated",  # torchdata 0.11 on torch 2.13
)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide these messages while the block runs."""
    handlers = [h for name in LIBRARIES for h in logging.getLogger(name).handlers]
    bars = is_progress_bar_enabled()
    with warnings.catch_warnings():
        for message in WARNINGS:
            warnings.filterwarnings("ignore", message)
        for handler in handlers:
            handler.addFilter(_is_no_noise)
        disable_progress_bar()  # for loading and writing weights; downloads keep their own
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(_is_no_noise)
            if bars:
                enable_progress_bar()


def _is_no_noise(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    # load_checks.py reads the same report on keys: it warns in one sentence, or refuses the model.
    return not (message.startswith(NOISE) or " LOAD REPORT" in message.partition("\n")[0])
