"""Find launches for the tables of the two kernels: `python -m kernels.tune KERNEL`.

Every candidate is compiled first, and what spills or does not fit is left out. On a CUDA device the
rest is checked against the reference and timed, and the fastest becomes a row to paste into
`table.py`. Without one, --compile-only ranks the candidates by what they need. Never part of
serving: a table is static.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import track

from kernels.autoencoder_errors.table import Launch as ScoringLaunch
from kernels.compiled import ARCHITECTURES, Architecture, Compiled, compiled
from kernels.expert_mixing.table import Launch as MixingLaunch
from kernels.problems import Mixing, Scoring

__all__ = ["SPACES", "Space", "Trial", "compile_all", "main", "time_us"]

# Inputs take turns, so that none is left in the L2 cache (50 MB on an H100) from its last turn.
_ROTATED_BYTES = 200 * 2**20
_MAX_ROTATED = 64


@dataclass(frozen=True)
class Space:
    """What is tried for one kernel.

    Attributes:
        problems: one for each row of the table that is looked for.
        launches: the candidates.
        tolerance: the greatest relative error of bfloat16 inputs.
        row: a problem and its best launch as a line of `table.py`.
    """

    problems: tuple[Any, ...]
    launches: tuple[Any, ...]
    tolerance: float
    row: Callable[[Any, Any], str]


@dataclass(frozen=True)
class Trial:
    """One candidate for one problem."""

    problem: Any
    launch: Any
    needs: Compiled
    error: float | None = None
    median_us: float | None = field(default=None)

    def as_json(self) -> dict[str, Any]:
        """Return what is written to the file."""
        problem = asdict(self.problem) | {"dtype": str(self.problem.dtype)}
        return asdict(self) | {"problem": problem}


def _mixing_row(problem: Mixing, launch: MixingLaunch) -> str:
    sizes = tuple(asdict(launch).values())
    return f"({problem.rows}, {problem.tokens}, False, {sizes}),  # D {problem.width}"


def _scoring_row(problem: Scoring, launch: ScoringLaunch) -> str:
    sizes = ", ".join(str(size) for size in asdict(launch).values())
    return f"_row({problem.images}, {problem.codes}, {sizes}),  # F {problem.width}"


SPACES = {
    "expert_mixing": Space(
        problems=tuple(
            Mixing(rows=rows, tokens=tokens, width=width)
            for (tokens, width), rows in product(((197, 768), (257, 1024)), (1, 2, 8, 32, 64, 256))
        ),
        launches=tuple(
            MixingLaunch(
                block_m=m, block_k=k, block_n=n, num_warps=warps, num_stages=stages, split=split
            )
            for m, (k, n), warps, stages, split in product(
                (16, 32, 64, 128, 256), ((32, 32), (64, 32), (64, 64)), (4, 8), (3, 4), (1, 2, 4)
            )
        ),
        # Of y, which is what is left of r, rounded, after x: a few roundings to 8 bits.
        tolerance=3e-2,
        row=_mixing_row,
    ),
    "autoencoder_errors": Space(
        problems=tuple(
            Scoring(images=images, codes=codes)
            for codes, images in product((32, 64, 100), (1, 16, 64, 256))
        ),
        launches=tuple(
            ScoringLaunch(block_m=m, block_n=n, num_warps=warps, num_stages=stages)
            for m, n, warps, stages in product(
                (16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (2, 3, 4)
            )
        ),
        # float32 sums on tensor cores, which cut off where others round.
        tolerance=3e-5,
        row=_scoring_row,
    ),
}


def compile_all(
    space: Space, architecture: Architecture, *, processes: int, console: Console
) -> list[Trial]:
    """Compile every candidate for every problem; return those that fit, the leanest first."""
    # A number of rows does not recompile, so that most problems share their programs.
    alike: dict[Any, list[Any]] = {}
    for problem in space.problems:
        alike.setdefault(_shape(problem), []).append(problem)
    jobs = [(problems, launch) for problems in alike.values() for launch in space.launches]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        needs = pool.map(
            _needs,
            [problems[0] for problems, _ in jobs],
            [launch for _, launch in jobs],
            [architecture] * len(jobs),
        )
        trials = [
            Trial(problem, launch, need)
            for (problems, launch), need in track(
                zip(jobs, needs, strict=True), "compiling", len(jobs), console=console
            )
            if need is not None and need.fits(architecture)
            for problem in problems
        ]
    return sorted(trials, key=lambda t: (t.needs.registers, t.needs.shared_bytes))


def time_us(problem: Any, launch: Any, *, device: str, tolerance: float) -> tuple[float, float]:
    """Return the error of one launch and the median microseconds of it within a CUDA graph.

    The time is NaN where the error is above the tolerance.
    """
    first = replace(problem, device=device)
    error = first.error(launch)
    if not error <= tolerance:
        return error, float("nan")
    copies = min(_MAX_ROTATED, 1 + _ROTATED_BYTES // first.size_bytes)
    calls = [replace(first, seed=seed).call(launch) for seed in range(copies)]
    times_ms = triton.testing.do_bench_cudagraph(
        lambda: [c.run() for c in calls], return_mode="all"
    )
    return error, statistics.median(times_ms) * 1e3 / copies


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, 2 where there is no CUDA device to time on."""
    options = _parse(arguments)
    console = Console()
    if not (options.compile_only or torch.cuda.is_available()):
        console.print("No CUDA device to time on; --compile-only needs none.")
        return 2
    space = SPACES[options.kernel]
    space = replace(space, launches=space.launches[: options.candidates])
    architecture = options.architecture
    if not options.compile_only:
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
        if architecture not in ARCHITECTURES:
            console.print(f"{architecture} is none of {', '.join(sorted(ARCHITECTURES))}.")
            return 2
    trials = compile_all(space, architecture, processes=options.processes, console=console)
    if not options.compile_only:
        trials = _timed(trials, space, console=console)
    _report(trials, space, console=console)
    if options.json:
        options.json.write_text(json.dumps([t.as_json() for t in trials], indent=1) + "\n")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m kernels.tune", description=__doc__)
    parser.add_argument("kernel", choices=sorted(SPACES))
    parser.add_argument("--compile-only", action="store_true", help="rank by needs, time nothing")
    parser.add_argument(
        "--architecture",
        choices=sorted(ARCHITECTURES),
        default="sm_90",
        help="what to compile for without a device",
    )
    parser.add_argument("--candidates", type=int, help="try only the first so many")
    parser.add_argument("--processes", type=int, default=2, help="compilers at a time")
    parser.add_argument("--json", type=Path, help="write every trial to this file")
    return parser.parse_args(arguments)


def _shape(problem: Any) -> Any:
    """What of a problem a program is compiled for."""
    rows = "rows" if isinstance(problem, Mixing) else "images"
    return replace(problem, **{rows: 16})


def _needs(problem: Any, launch: Any, architecture: Architecture) -> Compiled | None:
    """Compile in a process of its own; None is what the compiler refuses."""
    try:
        return compiled(problem.kernel, problem.call(launch), architecture)
    except triton.TritonError:
        return None


def _timed(trials: list[Trial], space: Space, *, console: Console) -> list[Trial]:
    timed = []
    for trial in track(trials, "timing", console=console):
        error, median_us = time_us(
            trial.problem, trial.launch, device="cuda", tolerance=space.tolerance
        )
        timed.append(replace(trial, error=error, median_us=median_us))
    right = [t for t in timed if t.median_us == t.median_us]
    return sorted(right, key=lambda t: t.median_us or 0.0)


def _report(trials: list[Trial], space: Space, *, console: Console) -> None:
    """Print the best row of each problem; trials are in order."""
    for problem in space.problems:
        best = next((t for t in trials if t.problem == problem), None)
        if best is None:
            console.print(f"{problem}: no candidate fits", markup=False)
            continue
        time = "" if best.median_us is None else f", {best.median_us:.2f} us"
        needs = f"{best.needs.registers} registers, {best.needs.shared_bytes} bytes shared"
        console.print(f"{space.row(problem, best.launch)}; {needs}{time}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
