"""What a number was measured on, in one line."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

__all__ = ["machine"]


def machine(device: torch.device) -> str:
    """Processor, cores, accelerator, threads and versions."""
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    return (
        f"{os.cpu_count()} cores of {_processor()}, {accelerator}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def _processor() -> str:
    """The processor's name where the system tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
