"""Run what was exported."""
