"""Loads, checks and hashes base models, and measures their perplexity."""
