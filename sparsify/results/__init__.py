"""What is known of finished runs: result files, comparisons, sensitivity, tasks, dashboards."""
