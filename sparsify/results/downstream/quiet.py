"""Keeps what lm-evaluation-harness prints off the command line, and collects what it warns of."""

import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

HARNESS = "lm_eval"


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Hide its prints, log and warnings; its progress bars too where nobody watches them."""
    # It would bootstrap in forks of a process that has threads, which may hang.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(redirect_stdout(io.StringIO()))
        if not sys.stderr.isatty():
            stack.enter_context(redirect_stderr(io.StringIO()))
        for name in (HARNESS, "transformers"):
            stack.enter_context(_silenced(logging.getLogger(name)))
        yield


@contextmanager
def _silenced(logger: logging.Logger) -> Iterator[None]:
    before = logger.propagate, logger.handlers
    logger.propagate, logger.handlers = False, [logging.NullHandler()]
    try:
        yield
    finally:
        logger.propagate, logger.handlers = before


@contextmanager
def collected_warnings() -> Iterator[dict[str, int]]:
    """Count its log's warnings, which may say that requests were cut; numbers in them become N."""
    counts: dict[str, int] = {}

    class Count(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = re.sub(r"\d+", "N", record.getMessage())
            counts[message] = counts.get(message, 0) + 1

    handler = Count(logging.WARNING)
    logger = logging.getLogger(HARNESS)
    logger.addHandler(handler)
    try:
        yield counts
    finally:
        logger.removeHandler(handler)
