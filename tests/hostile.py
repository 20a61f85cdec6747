"""What a stranger may put into files, and must neither run nor be obeyed."""

import os
from typing import Any

CODE = "from pathlib import Path\nPath('OWNED').touch()\n"  # leaves a file if it runs
ESCAPE = "\x1b]0;owned\x07\x9b31m\u202egood"


class Pickled:
    """Runs a command when it is read."""

    def __reduce__(self) -> Any:
        return os.system, ("touch OWNED",)
