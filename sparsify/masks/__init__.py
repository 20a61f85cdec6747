"""Masks as files: packed, compared, imported, and swapped over one model."""
