"""A run and its folder: logs, progress, checkpoints, resuming, signals, and tracing results to their sources."""
