"""Base models: loaded, checked, hashed, and measured by perplexity."""
