"""A run and its folder: logs, progress, checkpoints, resuming, signals, and how results lead back to their sources."""
