"""What watches or finishes a run; the command line adds each entry point of ``sparsify.callbacks``."""
