"""What watches or finishes a run; the command line adds those with an entry point."""
