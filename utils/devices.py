"""Choosing and preparing the device."""

import ctypes

import torch

from .errors import UserError


def choose_device(text: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device, prepared; a `UserError` where there is no such device."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {text}: unknown device. Accepted: auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {text}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of returning it to the system and faulting it in again at every step.

    Activations of a CPU run are large, so by default each is mapped and unmapped anew; that costs about a third of the
    time. Other C libraries have no `mallopt`, and nothing happens.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
