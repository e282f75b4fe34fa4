"""Choosing the device."""

import torch

from .errors import UserError


def choose_device(text: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device; a `UserError` where there is no such device."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {text}: unknown device. Accepted: auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {text}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device
