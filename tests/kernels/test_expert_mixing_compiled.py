"""Every row of the launch table compiles without a spill in the forms that routing does not need.

The form with router and LayerNorm is compiled in `test_compiled.py`.
"""

from __future__ import annotations

import pytest
import torch

from kernels.compiled import Architecture, compiled
from kernels.expert_mixing import fused
from kernels.expert_mixing.table import Row, find, rows
from kernels.launching import Call

BOTTLENECK = 64


def call(row: Row, *, form: str, width: int = 768) -> Call:
    """A launch at a row's own size, on the meta device."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[row.itemsize]
    B, L, E = min(row.max_rows, 64), min(row.max_tokens, 197), 32
    K, R = row.max_hidden // BOTTLENECK, BOTTLENECK

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device="meta")

    def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    router = fused.Router(
        paths_B=ints(B), routers_PDE=floats(64, width, E), top_k_P=ints(64), scale_P=floats(64)
    )
    x_BLD = floats(B, L, width, dtype=dtype)
    return fused.prepare(
        x_BLD,
        x_BLD.clone(),
        weights_S2RD=floats(128, 2, R, width, dtype=dtype),
        biases_SF=floats(128, R + width),
        slots=ints(64, E) if form == "plain" else ints(B, K),
        max_top_k=K,
        router=router if form == "plain" else None,
        gates_BK=None if form == "plain" else floats(B, K),
        keep_BLH=floats(B, L, K * R, dtype=dtype) if form == "keep" else None,
        launch=row.launch,
    )


def programs() -> list[tuple[Row, str]]:
    """Each different program once."""
    return list(
        {
            (row.launch, row.max_hidden, row.itemsize, form): (row, form)
            for row in rows()
            for form in ("plain", "mix", "keep")
            if row.keep or form != "keep"
        }.values()
    )


def assert_good(row: Row, form: str, architecture: Architecture) -> None:
    found = compiled(fused.kernel, call(row, form=form), architecture)
    # What is compiled for sm_80 should have room on its smaller kin too.
    assert found.fits("sm_86" if architecture == "sm_80" else architecture), found
    assert bool(found.wgmma or found.mma) == (row.itemsize == 2)  # none multiplies float32


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("row", "form"), programs(), ids=lambda v: v if isinstance(v, str) else str(v.max_hidden)
)
def test_a_row_compiles_without_a_spill(row: Row, form: str, architecture: Architecture) -> None:
    assert_good(row, form, architecture)


@pytest.mark.parametrize("form", ["mix", "keep"])
def test_the_largest_tiles_of_training_compile_without_a_spill(form: str) -> None:
    launch = find(256, 197, hidden=128, itemsize=2, keep=form == "keep")
    row = next(r for r in rows() if r.launch == launch and (r.keep or form != "keep"))
    assert_good(row, form, "sm_90")
