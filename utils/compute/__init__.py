"""Devices: choice and preparation, compilation, splitting of CPU batches, transfers, several processes."""
