"""Keeps libraries' messages that mean nothing to a user off the command line."""

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
    r"Found .* module\(s\) in eval mode",  # the base model stays so that its dropout is off
    # True of an epoch; a run's logging goes on over the next ones.
    r"The number of training batches .* is smaller than the logging interval",
    r"'set_vital' is deprecated",  # torchdata 0.11 on torch 2.13
)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence them for the time of the block; then all is as before."""
    handlers = [h for name in LIBRARIES for h in logging.getLogger(name).handlers]
    bars = is_progress_bar_enabled()
    with warnings.catch_warnings():
        for message in WARNINGS:
            warnings.filterwarnings("ignore", message)
        for handler in handlers:
            handler.addFilter(_is_no_noise)
        disable_progress_bar()  # of loading and writing weights; downloads keep theirs
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(_is_no_noise)
            if bars:
                enable_progress_bar()


def _is_no_noise(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    # What Transformers reports of keys, load_checks.py says in a sentence, or refuses.
    return not (message.startswith(NOISE) or " LOAD REPORT" in message.partition("\n")[0])
