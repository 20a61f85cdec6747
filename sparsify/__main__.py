"""``python -m sparsify``."""

import os
import sys

# Python puts the current folder first; a file there must not take the place of a module.
if sys.path and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from sparsify.cli.main import main

main()
