"""Reads and writes masks in the formats of other projects."""
