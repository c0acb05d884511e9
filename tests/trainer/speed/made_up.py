"""Lines as a run would write them, from numbers made up."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from medley.journal import Conditions, Journal, Run

RUN = Run(
    command="medley bench speed", machine="a desk", device="cpu", versions="1", started="2026-11-22"
)
KERNELS: Conditions = {
    "shape": "ViT-B/16",
    "tokens": 197,
    "width": 768,
    "dtype": "float32",
    "batch": 8,
}
TOWER: Conditions = {"backbone": "tiny", "precision": "fp32", "tasks": 256, "first_expert_block": 0}
WORK = {"bytes": 1e6, "flop": 1e8, "error": 1e-7, "first_call_s": 0.1}
SWAPS: Conditions = {"backbone": "tiny", "precision": "fp32", "batch": 2, "tasks": 3}


def rows(
    journal: Journal,
    bench: str,
    conditions: Conditions,
    times: Mapping[str, Sequence[float]],
    values: Mapping[str, float] | None = None,
) -> None:
    for column, times_s in times.items():
        journal.add(bench, conditions, column, times_s=times_s, values=values)


def lines(folder: Path, *, branch: float = 4.0, different: float = 0.0) -> Journal:
    """One row of each bench; the branch is so many times as fast as the dispatcher."""
    journal = Journal(folder, RUN)
    at: Conditions = {"shape": "text", "dtype": "float32", "batch": 8, "mix": "11 tasks"}
    journal.add("check", at, "expert_mixing", values={"error": 1e-3, "limit": 1e-5})
    journal.add("ceiling", {}, "copy", times_s=[1.0], values={"copy_bytes_per_s": 1e10})
    journal.add("ceiling", {}, "matmul float32", values={"matmul_flop_per_s": 1e11})
    times = {"medley": [1.0, 2.0, 3.0], "dispatcher": [branch, 2 * branch, 3 * branch]}
    rows(journal, "kernels", {**KERNELS, "mix": "11 tasks"}, times, WORK)
    journal.add("kernels", {**KERNELS, "mix": "11 tasks"}, "grouped", failure="NoKernel: on a CPU")
    times = {"open_clip": [1.0], "frozen": [1.0], "11 tasks mixed": [1.05]}
    times |= {"1 task of many": [1.0], "all of many": [1.25]}
    rows(journal, "model", {**TOWER, "batch": 8, "what": "tower"}, times)
    times = {"forward": [1.0], "10 tasks": [0.009], "1000 tasks": [0.2]}
    rows(journal, "ddas", {"backbone": "tiny", "precision": "fp32", "batch": 1, "width": 4}, times)
    values = {"swaps": 9.0, "answers_compared": 18.0, "answers_different": different}
    leak = values | {"memory_bytes_per_swap": 12.0}
    journal.add("swap", {**SWAPS, "what": "leak"}, "other tasks", values=leak)
    journal.add("swap", {**SWAPS, "what": "parts"}, "experts enter", times_s=[1e-3])
    for name in ("no swaps", "a swap every second"):
        series = {"batch_end_s": (0.1, 0.2, 0.4), "swap_s": (0.2,)}
        where: Conditions = {**SWAPS, "what": "throughput"}
        journal.add("swap", where, name, times_s=[0.05], values={"swaps": 1.0}, series=series)
    return journal
