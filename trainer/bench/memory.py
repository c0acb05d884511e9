"""How much memory a stretch of work took at most, on the device that did it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

__all__ = ["peak_memory_bytes", "reset_peak_memory"]

_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak_memory(device: torch.device) -> int:
    """Start to measure; return what is held now.

    Where the system cannot forget an earlier peak (anything but Linux), the peak is that of the
    process so far.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if _RESET.exists():
        _RESET.write_text("5")  # proc(5): resets the peak resident set size
    return peak_memory_bytes(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Most that was held since the last reset: the device's allocations, or the process's pages."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
