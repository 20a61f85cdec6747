"""Runnable settings, one YAML a strategy, for the embedded model."""
