"""Sparsification methods, one a file; each is found by the name of its entry point in
``pyproject.toml``.
"""
