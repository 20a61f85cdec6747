"""``python -m sparsify``."""

from sparsify.main import main

main()
