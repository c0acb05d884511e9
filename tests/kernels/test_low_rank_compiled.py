"""The low-rank kernel compiles without a spill for the layers that are served, without a GPU."""

from __future__ import annotations

import pytest
import torch
from triton.runtime import JITFunction

from kernels.compiled import Architecture, compiled, source
from kernels.expert_mixing import fused_low_rank as fused
from kernels.expert_mixing.table import Launch, find, rows
from kernels.launching import Call

Layer = tuple[int, int]
VIT_B_16: tuple[Layer, ...] = ((768, 3072), (3072, 768))
LAYERS: tuple[Layer, ...] = (
    *VIT_B_16,
    (1024, 4096),
    (4096, 1024),
    (512, 2048),
    (2048, 512),
    (256, 1024),
    (1024, 256),
)


def call(
    layer: Layer,
    launch: Launch | None,
    *,
    B: int = 8,
    L: int = 197,
    S: int = 16,
    R: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> Call:
    """A launch on the meta device."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    inputs, outputs = layer
    return fused.prepare(
        empty(B, L, outputs),
        empty(B, L, inputs),
        empty(B, dtype=torch.int64),
        empty(S, R, inputs),
        empty(S, R, outputs),
        empty(S, dtype=torch.float32),
        launch=launch,
    )


def assert_good(prepared: Call, dtype: torch.dtype, architecture: Architecture) -> None:
    found = compiled(fused.kernel, prepared, architecture)
    # What is compiled for sm_80 should have room on its smaller kin too.
    assert found.fits("sm_86" if architecture == "sm_80" else architecture), found
    assert bool(found.wgmma or found.mma) == (dtype.itemsize == 2)  # none multiplies float32


@pytest.mark.parametrize("layer", VIT_B_16, ids=str)
@pytest.mark.parametrize("batch", [1, 8, 256])
def test_the_layers_of_a_vit_b_16_compile_without_a_spill(batch: int, layer: Layer) -> None:
    launch = find(batch, 197, hidden=64, itemsize=2)
    assert_good(call(layer, launch), torch.bfloat16, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_row_of_the_table_compiles_without_a_spill(
    layer: Layer, architecture: Architecture
) -> None:
    for row in rows():
        dtype = {2: torch.bfloat16, 4: torch.float32}[row.itemsize]
        ranks = (16, 64, 128) if row.max_hidden == 128 else (row.max_hidden,)
        for R in ranks:
            if R == 128 and row.itemsize == 4:
                continue  # 8 bytes on the stack on sm_90, at 80 registers of 255
            assert_good(call(layer, row.launch, R=R, dtype=dtype), dtype, architecture)


def test_neither_batch_nor_tokens_nor_slots_compile_the_kernel_again() -> None:
    assert isinstance(fused.kernel, JITFunction)
    launch = find(8, 197, hidden=64, itemsize=2)
    hashes = {
        source(fused.kernel, call((768, 3072), launch, B=B, L=L, S=S)).hash()
        for B in (1, 7, 16)
        for L in (1, 16, 197)
        for S in (1, 16, 20)
    }
    assert len(hashes) == 1
