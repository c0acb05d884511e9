"""What a number was measured on: processor, device, versions, and the command that measured it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from medley.journal import Run

__all__ = ["machine", "run_of"]

PACKAGES = ("torch", "triton", "open_clip_torch", "medley-clip")
SMI = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")


def machine(device: torch.device) -> str:
    """Processor, cores, accelerator, threads and versions."""
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    return (
        f"{os.cpu_count()} cores of {_processor()}, {accelerator}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def run_of(device: torch.device, *, packages: Sequence[str] = ()) -> Run:
    """Describe this process, its machine and the versions of what was measured.

    Args:
        device: where it computes.
        packages: distributions that matter beside the usual ones.
    """
    return Run(
        command=" ".join(["medley", *sys.argv[1:]]),
        machine=machine(device),
        device=device.type,
        versions=", ".join(_versions(device, [*PACKAGES, *packages])),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _versions(device: torch.device, packages: Sequence[str]) -> list[str]:
    # Others' work on the machine: near 0 where nobody else computes.
    found = [f"{name} {_version(name)}" for name in packages]
    found.append(f"load average {os.getloadavg()[0]:.1f} at the start")
    if device.type == "cuda":
        found += [f"CUDA {torch.version.cuda}", *_smi()]
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _smi() -> list[str]:
    """Driver and clocks, where the driver's own tool tells them."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ["driver and clocks unknown"]
    values = told.stdout.splitlines()[0].split(", ")
    return [f"{name} {value}" for name, value in zip(SMI, values, strict=True)]


def _processor() -> str:
    """The processor's name where the system tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
