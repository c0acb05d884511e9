"""The most this machine moves and multiplies, measured in the run that is compared with it."""

from __future__ import annotations

import torch

from medley.journal import Journal
from trainer.speed.timing import Pass, Work, graphed, in_turns, over

__all__ = ["measure_ceiling"]

# Copies far larger than any cache; products that are compute-bound.
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}
SIDE = {"cpu": 1536, "cuda": 8192}
L2_BYTES, COPIES_IN_L2 = 2**23, 50  # on a GPU: source and target stay in the cache


def measure_ceiling(
    journal: Journal, device: torch.device, dtypes: tuple[torch.dtype, ...], *, repeats: int
) -> None:
    """Write a line for each kind of copy and for a big product of each dtype.

    Values are of the fastest round: copy_bytes_per_s (read and written; "copy" is the big one) and
    matmul_flop_per_s.
    """
    side = SIDE[device.type]
    copies = {"copy": _copy(COPY_BYTES[device.type], device)}
    if device.type == "cuda":
        copies["copy within L2"] = _copy(L2_BYTES, device)
    products = {
        f"matmul {str(d).removeprefix('torch.')}": _product(side, d, device) for d in dtypes
    }
    timed = in_turns(copies | products, device=device, repeats=repeats)
    for name, one in timed.items():
        values = {}
        if one.times_s and name in copies:
            moved = 2 * (L2_BYTES if name != "copy" else COPY_BYTES[device.type])
            values["copy_bytes_per_s"] = moved / min(one.times_s)
        elif one.times_s:
            values["matmul_flop_per_s"] = 2 * side**3 / min(one.times_s)
        journal.add("ceiling", {}, name, times_s=one.times_s, values=values, failure=one.failure)


def _copy(size_bytes: int, device: torch.device) -> Pass:
    source = torch.randn(size_bytes // 4, device=device)
    target = torch.empty_like(source)
    works: list[Work] = [lambda: target.copy_(source)]
    # A small copy takes no longer than its launch, so many of them are one graph.
    return graphed(works * COPIES_IN_L2) if size_bytes == L2_BYTES else over(works)


def _product(side: int, dtype: torch.dtype, device: torch.device) -> Pass:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return over([lambda: a @ b])
