"""Helpers that know nothing of masks or models: files, ranks, the terminal, the machine."""
