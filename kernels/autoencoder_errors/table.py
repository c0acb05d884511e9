"""How the fused kernel is cut up: one static table, no autotuning and no switch.

A row is found by shapes that a server knows before its first request, so that every program can be
compiled, and every graph captured, before it.

Legend: B images, C code width.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MAX_CODES", "Launch", "Row", "find", "rows"]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Sizes of one program of the kernel and what the compiler is told."""

    block_m: int  # images of a tile
    block_n: int  # features of a step
    num_warps: int
    num_stages: int  # depth of the loads' pipeline


@dataclass(frozen=True, kw_only=True)
class Row:
    """Where a launch is used: up to and including these sizes; None is any."""

    max_images: int | None
    max_codes: int
    launch: Launch


MAX_CODES = 128  # a tile's codes stay in registers; 256 would spill on sm_80


def rows() -> tuple[Row, ...]:
    """Return the table, the first row that fits being the one that is used."""
    return _ROWS


def find(images: int, codes: int) -> Launch:
    """Return how to cut up a launch for B images and C codes.

    Raises:
        ValueError: C is more than `MAX_CODES`.
    """
    for row in _ROWS:
        if codes <= row.max_codes and (row.max_images is None or images <= row.max_images):
            return row.launch
    raise ValueError(f"{codes} codes are more than {MAX_CODES}")


def _row(images: int | None, codes: int, m: int, n: int, warps: int, stages: int) -> Row:
    launch = Launch(block_m=m, block_n=n, num_warps=warps, num_stages=stages)
    return Row(max_images=images, max_codes=codes, launch=launch)


# Chosen so that nothing spills, for sm_80 and sm_90 (`tests/kernels/test_compiled.py`): the three
# passes of "tf32x3" hold each operand twice. Nothing here has run on a device.
_ROWS = (
    #    B, C: block_m, block_n, warps, stages
    _row(16, 32, 16, 64, 4, 3),
    _row(64, 32, 64, 32, 4, 3),
    _row(None, 32, 128, 32, 8, 3),
    _row(16, 64, 16, 64, 4, 3),
    _row(None, 64, 64, 32, 8, 3),
    _row(16, MAX_CODES, 16, 32, 8, 3),
    _row(None, MAX_CODES, 64, 16, 8, 3),
)
