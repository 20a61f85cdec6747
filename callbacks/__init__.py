"""Callbacks that watch or finish a run; the command line adds those with an entry point."""
