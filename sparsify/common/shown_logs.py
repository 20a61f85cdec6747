"""Makes logs and warnings printable: a terminal never obeys control characters in them."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class _ShownRecord(logging.LogRecord):
    def getMessage(self) -> str:
        from sparsify.common.printable import printable

        return printable(super().getMessage())


@contextmanager
def shown_logs() -> Iterator[None]:
    """Do so while the block runs, for every library that logs or warns, of tensor names say."""
    factory, format_ = logging.getLogRecordFactory(), warnings.formatwarning

    def shown(message: Warning | str, *place: object, **more: object) -> str:
        from sparsify.common.printable import printable

        return printable(format_(message, *place, **more))  # type: ignore[arg-type]

    logging.setLogRecordFactory(_ShownRecord)
    warnings.formatwarning = shown
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = format_
