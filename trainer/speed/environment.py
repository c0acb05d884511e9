"""What a run is measured on: command, machine, device, versions."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch

from trainer.bench.machine import machine
from trainer.speed.measurement import Run

__all__ = ["run_of"]

PACKAGES = ("torch", "triton", "open_clip_torch", "medley-clip")
SMI = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")


def run_of(device: torch.device) -> Run:
    """Describe this process, its machine and its versions."""
    return Run(
        command=" ".join(["medley", *sys.argv[1:]]),
        machine=machine(device),
        device=device.type,
        versions=", ".join(_versions(device)),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _versions(device: torch.device) -> list[str]:
    # Others' work on the machine: near 0 where nobody else computes.
    found = [f"{name} {_version(name)}" for name in PACKAGES]
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
