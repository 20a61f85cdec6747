"""Reads and compares finished runs: result files, sensitivity, tasks, dashboards."""
