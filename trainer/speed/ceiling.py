"""The most this machine moves and multiplies, measured in the run that is compared with it."""

from __future__ import annotations

import torch

from trainer.speed.measurement import Journal
from trainer.speed.timing import Pass, Work, in_turns

__all__ = ["measure_ceiling"]

# Copies far larger than any cache; products that are compute-bound.
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}
SIDE = {"cpu": 1536, "cuda": 8192}


def measure_ceiling(
    journal: Journal, device: torch.device, dtypes: tuple[torch.dtype, ...], *, repeats: int
) -> None:
    """Write a line for a big copy and one for a big product of each dtype.

    Values are of the fastest round: copy_bytes_per_s (read and written), matmul_flop_per_s.
    """
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    side = SIDE[device.type]
    columns: dict[str, Work] = {"copy": lambda: target.copy_(source)}
    columns |= {f"matmul {_name(dtype)}": _product(side, dtype, device) for dtype in dtypes}
    timed = in_turns({n: Pass(w) for n, w in columns.items()}, device=device, repeats=repeats)
    for name, one in timed.items():
        values = {}
        if one.times_s and name == "copy":
            values["copy_bytes_per_s"] = 2 * COPY_BYTES[device.type] / min(one.times_s)
        elif one.times_s:
            values["matmul_flop_per_s"] = 2 * side**3 / min(one.times_s)
        journal.add("ceiling", {}, name, times_s=one.times_s, values=values, failure=one.failure)


def _product(side: int, dtype: torch.dtype, device: torch.device) -> Work:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
