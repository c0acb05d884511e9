"""Every row of both tables compiles without a GPU: no spill, memory enough, on tensor cores.

A row is compiled for the shapes that are served. The ordinary run takes each different program of
the usual kind (bfloat16, two experts of 64; scoring), for sm_90; `slow` the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from kernels.autoencoder_errors import table as scoring_table
from kernels.compiled import Architecture, Compiled, compiled, source
from kernels.expert_mixing import table as mixing_table
from kernels.problems import Mixing, Scoring

SERVED_WIDTHS = (768, 1024, 512)
OVERSIZED = scoring_table.Launch(block_m=64, block_n=64, num_warps=4, num_stages=3)


@dataclass(frozen=True)
class Program:
    """A problem, how a table cuts it up, and for what."""

    problem: Mixing | Scoring
    launch: Any
    architecture: Architecture

    def compiled(self) -> Compiled:
        """Compile it; seconds."""
        return compiled(self.problem.kernel, self.problem.call(self.launch), self.architecture)

    @property
    def warp_groups(self) -> bool:
        """Whether its products are large enough for the instructions of a warp group."""
        return self.architecture == "sm_90" and self.launch.block_m >= 64

    def __str__(self) -> str:
        sizes = "-".join(str(size) for size in vars(self.launch).values())
        p = self.problem
        inner = (
            f"K{p.top_k}-{p.dtype}" if isinstance(p, Mixing) else f"C{p.codes}-{p.output}-{p.dtype}"
        )
        return f"{type(p).__name__}-{p.width}-{inner}-{sizes}-{self.architecture}"


def mixing_programs(row: mixing_table.Row, architecture: Architecture) -> Iterator[Program]:
    for width in SERVED_WIDTHS:
        problem = Mixing(
            rows=min(row.max_rows, 256),
            tokens=min(row.max_tokens, 197),
            width=width,
            top_k=row.max_hidden // 64,
            dtype={2: torch.bfloat16, 4: torch.float32}[row.itemsize],
        )
        yield Program(problem, row.launch, architecture)


def scoring_programs(row: scoring_table.Row, architecture: Architecture) -> Iterator[Program]:
    for codes in (row.max_codes, row.max_codes - 4):  # the second is no multiple of 16
        for output, dtype in (("sigmoid", torch.bfloat16), ("linear", torch.float32)):
            images = min(row.max_images or 256, 256)
            problem = Scoring(images=images, codes=codes, output=output, dtype=dtype)
            yield Program(problem, row.launch, architecture)


def is_usual(program: Program) -> bool:
    p = program.problem
    if program.architecture != "sm_90" or p.width != 768:
        return False
    if isinstance(p, Mixing):
        return p.dtype == torch.bfloat16 and p.top_k == 2
    return p.codes % 16 == 0 and p.output == "sigmoid" and p.dtype == torch.bfloat16


def distinct(programs: Iterator[Program]) -> list[Program]:
    """Leave out what differs only in how often it is launched."""
    return list({(str(p)): p for p in programs}.values())


EVERY = distinct(
    program
    for architecture in ("sm_90", "sm_80")
    for programs in (
        *(mixing_programs(row, architecture) for row in mixing_table.rows()),
        *(scoring_programs(row, architecture) for row in scoring_table.rows()),
    )
    for program in programs
)
USUAL = [program for program in EVERY if is_usual(program)]
UNUSUAL = [program for program in EVERY if not is_usual(program)]


def assert_good(program: Program, found: Compiled) -> None:
    assert found.spilled_bytes == 0
    assert found.fits(program.architecture)
    if program.problem.dtype == torch.float32 and isinstance(program.problem, Mixing):
        assert (found.wgmma, found.mma) == (0, 0)  # the exact form; none multiplies float32
    elif program.warp_groups:
        assert found.wgmma > 0
    else:
        assert found.mma > 0


def _compile_together(programs: list[Program]) -> Iterator[dict[Program, Compiled]]:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield dict(zip(programs, pool.map(Program.compiled, programs), strict=True))


@pytest.fixture(scope="module")
def usual() -> Iterator[dict[Program, Compiled]]:
    yield from _compile_together(USUAL)


@pytest.fixture(scope="module")
def unusual() -> Iterator[dict[Program, Compiled]]:
    yield from _compile_together(UNUSUAL)


@pytest.mark.parametrize("program", USUAL, ids=str)
def test_a_row_compiles_to_a_good_program(usual: dict[Program, Compiled], program: Program) -> None:
    assert_good(program, usual[program])


@pytest.mark.slow
@pytest.mark.parametrize("program", UNUSUAL, ids=str)
def test_a_row_compiles_to_a_good_program_for_every_other_shape(
    unusual: dict[Program, Compiled], program: Program
) -> None:
    assert_good(program, unusual[program])


def test_a_spill_is_seen() -> None:
    program = Program(Scoring(images=64, codes=128), OVERSIZED, "sm_90")
    found = program.compiled()
    assert found.spilled_bytes > 0
    assert not found.fits("sm_90")


def test_shared_memory_is_held_against_the_architecture() -> None:
    found = Compiled(registers=64, spilled_bytes=0, shared_bytes=164 * 1024, wgmma=0, mma=1)
    assert found.fits("sm_90")
    assert not found.fits("sm_80")


def real_problems() -> list[Mixing | Scoring]:
    return [
        Mixing(rows=3, tokens=5, width=64, bottleneck=16, device="cpu"),
        Scoring(images=1, codes=8, width=32, tasks=2, device="cpu"),
        Scoring(images=16, codes=1, width=41, tasks=2, device="cpu", dtype=torch.float16),
    ]


@pytest.mark.parametrize("problem", real_problems(), ids=lambda p: type(p).__name__)
def test_what_is_compiled_is_what_a_launch_would_compile(problem: Mixing | Scoring) -> None:
    kernel: Any = problem.kernel
    call = problem.call()
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**call.arguments, **call.constants, enable_fp_fusion=True)
    _, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, options
    )
    ours = source(kernel, call)
    assert ours.signature == signature
    assert ours.constants == constants
    assert ours.attrs == {at: value for at, value in attributes.items() if value}


def test_images_and_tasks_do_not_recompile() -> None:
    hashes = {
        source(p.kernel, p.call(OVERSIZED)).hash()
        for images in (1, 7, 16, 300)
        for tasks in (1, 16, 1000)
        for p in [Scoring(images=images, tasks=tasks, codes=32)]
    }
    assert len(hashes) == 1


def test_rows_and_tokens_do_not_recompile() -> None:
    launch = mixing_table.find(8, 197, hidden=128, itemsize=2)
    hashes = {
        source(p.kernel, p.call(launch)).hash()
        for rows in (1, 7, 16, 300)
        for tokens in (1, 16, 197)
        for p in [Mixing(rows=rows, tokens=tokens, width=768)]
    }
    assert len(hashes) == 1


def test_what_is_no_compiled_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="is TRITON_INTERPRET set"):
        compiled(len, Scoring(images=1, codes=8).call(), "sm_90")


def test_an_argument_without_a_type_is_refused() -> None:
    p = Scoring(images=1, codes=8, dtype=torch.complex64)
    with pytest.raises(ValueError, match="a launch cannot take"):
        source(p.kernel, p.call())


def test_a_missing_tool_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = type(knobs.nvidia).__dict__["cuobjdump"]
    monkeypatch.delenv(tool.key, raising=False)
    monkeypatch.setattr(tool, "default_path", str(tmp_path / "cuobjdump"))
    with pytest.raises(RuntimeError, match="cuobjdump ships with Triton for Linux and is not here"):
        Program(Scoring(images=1, codes=8), scoring_table.find(1, 8), "sm_90").compiled()
