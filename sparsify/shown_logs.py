"""Logs and warnings of the command line's process: text of files in them is shown, not obeyed."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class _ShownRecord(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802
        from sparsify.printable import printable

        return printable(super().getMessage())


@contextmanager
def shown_logs() -> Iterator[None]:
    """For the time of the block, whichever library logs or warns: names of tensors, for example."""
    factory, format_ = logging.getLogRecordFactory(), warnings.formatwarning

    def shown(message: Warning | str, *place: object, **more: object) -> str:
        from sparsify.printable import printable

        return printable(format_(message, *place, **more))  # type: ignore[arg-type]

    logging.setLogRecordFactory(_ShownRecord)
    warnings.formatwarning = shown
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = format_
