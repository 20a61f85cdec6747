"""Masks in the formats of others."""
