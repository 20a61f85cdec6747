"""The run: Lightning's module and Trainer, checkpoints, several processes, memory plans."""
