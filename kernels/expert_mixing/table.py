"""How the fused kernels are cut up: one static table, no autotuning and no switch.

A row is found by shapes that a server knows before its first request, so every program can be
compiled, and every graph captured, before it.

Where the sizes come from: a model of traffic and occupancy on an H100, and compiling for sm_90 and
sm_80 without one: no row spills a register. None has been timed. The model: each program streams
its row's experts from L2 for the tokens of its tile alone, so a tile should hold as many as the
registers allow (256, a ViT-B/16's 197 at once) where there are rows enough to fill the device, and
where there are not, smaller tiles and split columns spread them over it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["Launch", "Row", "find", "rows"]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Sizes of one program of the kernel and what the compiler is told."""

    block_m: int  # tokens of a tile
    block_k: int  # columns of x that a step of the first product takes
    block_n: int  # columns of y that a step of the second product writes
    num_warps: int
    num_stages: int  # depth of the pipeline of loads
    split: int  # programs that share the columns of a tile's y, each repeating the first product

    def fit(self, width: int, outputs: int | None = None) -> Launch:
        """Return the same for this D: each step divides it, so that no column needs a mask.

        Args:
            width: columns of x.
            outputs: columns of y, where that is another number.

        Raises:
            ValueError: one is not a multiple of 16, the least that a tensor core takes.
        """
        outputs = width if outputs is None else outputs
        for size in (width, outputs):
            if size < 16 or size % 16:
                raise ValueError(f"width {size} is not a multiple of 16")
        split = self.split if outputs % (16 * self.split) == 0 else 1
        columns = outputs // split
        return replace(
            self,
            split=split,
            block_k=min(self.block_k, width & -width),
            block_n=min(self.block_n, columns & -columns),
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """A launch, and the largest sizes that it is for."""

    max_rows: int
    max_tokens: int
    max_hidden: int
    itemsize: int  # bytes of an element of x
    keep: bool  # whether it has the registers for a dropout mask too
    launch: Launch


_ANY = 2**31 - 1


def _rows(
    max_hidden: int, itemsize: int, *shapes: tuple[int, int, bool, tuple[int, ...]]
) -> tuple[Row, ...]:
    names = ("block_m", "block_k", "block_n", "num_warps", "num_stages", "split")
    return tuple(
        Row(
            max_rows=max_rows,
            max_tokens=max_tokens,
            max_hidden=max_hidden,
            itemsize=itemsize,
            keep=keep,
            launch=Launch(**dict(zip(names, sizes, strict=True))),
        )
        for max_rows, max_tokens, keep, sizes in shapes
    )


# rows, tokens, keep, (M, K, N, warps, stages, split); the first that fits is taken.
_ROWS = (
    # Half precision, two experts of 64: the usual case.
    *_rows(
        128,
        2,
        # The last block of a tower, where only token 0 counts: a tile is the least there is.
        (32, 16, True, (16, 64, 64, 4, 3, 4)),
        (_ANY, 16, True, (16, 64, 64, 4, 3, 1)),
        # One image: 52 programs of 197 tokens; fewer would leave most of the device idle.
        (2, _ANY, True, (16, 64, 64, 4, 3, 4)),
        (4, _ANY, True, (32, 64, 64, 8, 3, 4)),
        (16, _ANY, True, (64, 64, 64, 8, 3, 2)),
        (_ANY, 64, True, (64, 64, 32, 8, 3, 1)),
        # 64 columns at a time would take 255 registers of 256 with the LayerNorm.
        (32, _ANY, True, (128, 64, 32, 8, 3, 1)),
        (_ANY, 128, True, (128, 64, 32, 8, 3, 1)),
        # Steps of 32: with the LayerNorm, steps of 64 spill.
        (_ANY, _ANY, False, (256, 32, 32, 8, 4, 1)),
        (_ANY, _ANY, True, (128, 64, 32, 8, 3, 1)),
    ),
    # Twice and four times as many hidden units: half and an eighth of the tokens in as many
    # registers. Four warps of 16 tokens would spill. Pipelines two deep leave no program above 99
    # KB of shared memory, all there is on sm_86 and sm_89.
    *_rows(
        256,
        2,
        (_ANY, 16, True, (16, 64, 32, 8, 3, 4)),
        (2, _ANY, True, (16, 64, 32, 8, 3, 4)),
        (8, _ANY, True, (32, 64, 64, 8, 3, 2)),
        (32, _ANY, True, (64, 64, 32, 8, 3, 1)),
        (_ANY, 64, True, (64, 64, 32, 8, 3, 1)),
        (_ANY, _ANY, False, (128, 32, 32, 8, 2, 1)),
        (_ANY, _ANY, True, (64, 64, 32, 8, 3, 1)),
    ),
    *_rows(
        512,
        2,
        (4, _ANY, True, (16, 32, 32, 8, 2, 4)),
        (_ANY, 16, True, (16, 32, 32, 8, 2, 1)),
        (_ANY, _ANY, True, (32, 32, 32, 8, 2, 1)),
    ),
    # float32, the exact form: products of float32 have no tensor core, and the multiply-adds that
    # stand in for one need so many registers that 128 hidden units are all there is room for.
    *_rows(
        128,
        4,
        (4, _ANY, True, (16, 32, 16, 4, 2, 4)),
        (_ANY, 16, True, (16, 32, 32, 4, 2, 1)),
        (_ANY, _ANY, True, (32, 32, 32, 8, 2, 1)),
    ),
)


def rows() -> tuple[Row, ...]:
    """Return the whole table."""
    return _ROWS


def find(rows: int, tokens: int, *, hidden: int, itemsize: int, keep: bool = False) -> Launch:
    """Return the launch for B rows of L tokens and H = K * R hidden units.

    `keep`: there is a dropout mask.

    Raises:
        ValueError: more hidden units than any row has registers for.
    """
    for row in _ROWS:
        if (
            rows <= row.max_rows
            and tokens <= row.max_tokens
            and hidden <= row.max_hidden
            and itemsize == row.itemsize
            and row.keep >= keep
        ):
            return row.launch
    room = max((row.max_hidden for row in _ROWS if row.itemsize == itemsize), default=0)
    raise ValueError(
        f"{hidden} hidden units (top-k times bottleneck) of {itemsize} bytes, room for {room}"
    )
