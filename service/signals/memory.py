"""How much memory this process may take, and what of the device is taken.

The process's own use of it is prometheus_client's to say (`process_resident_memory_bytes`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from service.signals.metrics import Metrics

__all__ = ["memory_limit_bytes", "watch"]


def watch(metrics: Metrics, device: torch.device) -> None:
    """Say the limit now, and what the device has before each scrape; nothing of a CPU."""
    metrics.memory_limit_bytes.set(memory_limit_bytes())
    if device.type == "cuda":
        metrics.before_scrape.append(partial(_measure, metrics, device))


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """The machine's memory, or less, if a control group of this process allows less.

    Args:
        root: of the file system that is looked at.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _limit_files(root):
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):
            continue  # no such group here, or "max"
    return min(limits)


def _limit_files(root: Path) -> Iterator[Path]:
    """Where the groups of this process, and those above them, would say their limit.

    A container sees its own group at the top, by whatever path its process names it.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        group = Path(path.lstrip("/"))
        for above in (group, *group.parents):
            if kinds == "":
                yield root / "sys/fs/cgroup" / above / "memory.max"
            elif "memory" in kinds.split(","):
                yield root / "sys/fs/cgroup/memory" / above / "memory.limit_in_bytes"


def _measure(metrics: Metrics, device: torch.device) -> None:
    free, total = torch.cuda.mem_get_info(device)
    kinds = {
        "free": free,
        "total": total,
        "reserved": torch.cuda.memory_reserved(device),
        "allocated": torch.cuda.memory_allocated(device),
    }
    for kind, size_bytes in kinds.items():
        metrics.device_memory_bytes.labels(kind).set(size_bytes)
