"""Checkpoints: written whole, checked when read, fitted to the run that goes on."""
