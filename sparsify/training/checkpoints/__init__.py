"""Writes checkpoints whole, checks them when read, and adapts them to the run that resumes."""
