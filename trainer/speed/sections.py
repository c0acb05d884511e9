"""The tables of a report, one function for each bench; they are made of lines and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from medley.journal import Measurement
from medley.markdown import NOTHING, table
from medley.rows import Quartiles, Row, rows_of
from trainer.speed.baselines.columns import DISPATCHER, OURS
from trainer.speed.checks import right
from trainer.speed.low_rank import ALONE
from trainer.speed.mixing import PREDICTED_US, ROUTER
from trainer.speed.scoring import FORWARD
from trainer.speed.swapping import LEAK, PARTS, THROUGHPUT
from trainer.speed.towers import FROZEN, OPEN_CLIP

__all__ = ["SECTIONS"]


def _ceiling(lines: Sequence[Measurement]) -> str:
    rows = []
    for row in rows_of(lines, "ceiling"):
        for name, line in row.columns.items():
            gb, tf = line.values.get("copy_bytes_per_s"), line.values.get("matmul_flop_per_s")
            rows.append((name, f"{gb / 1e9:.1f} GB/s" if gb else f"{(tf or 0) / 1e12:.3f} TFLOP/s"))
    return table(("ceiling, fastest round", "measured"), rows) if rows else ""


def _checks(lines: Sequence[Measurement]) -> str:
    rows = [
        (
            *map(str, row.conditions.values()),
            name,
            NOTHING if line.failure else f"{line.values['error']:.1e}",
            f"{line.values['limit']:.0e}",
            _failure(line.failure) if line.failure else _verdict(line),
        )
        for row in rows_of(lines, "check")
        for name, line in row.columns.items()
    ]
    head = ("shape", "dtype", "batch", "mix", "kernel", "relative error", "limit", "")
    return "Against float64, before anything was timed:\n\n" + table(head, rows) if rows else ""


def _kernels(lines: Sequence[Measurement]) -> str:
    parts = []
    for (dtype, shape), rows in _grouped(rows_of(lines, "kernels"), "dtype", "shape").items():
        names = list(dict.fromkeys(name for row in rows for name in row.columns))
        head, others = ("batch", "mix"), [n for n in names if n not in (DISPATCHER, ROUTER)]
        where = [(str(row.conditions["batch"]), str(row.conditions["mix"])) for row in rows]
        times = [[_milliseconds(row, name) for name in names] for row in rows]
        ratios = [[_times(row.ratio(DISPATCHER, name)) for name in others] for row in rows]
        parts += [
            f"### {shape}, {dtype}\n\nMilliseconds, median (quartiles):",
            table((*head, *names), [(*at, *row) for at, row in zip(where, times, strict=True)]),
            "Times as fast as the dispatcher, median of the ratios within rounds:",
            table((*head, *others), [(*at, *row) for at, row in zip(where, ratios, strict=True)]),
        ]
    return "\n\n".join([*parts, _shares(lines)] if parts else [])


def _shares(lines: Sequence[Measurement]) -> str:
    """Ours against what the machine could do."""
    copy, matmul = _copy(lines), _matmuls(lines)
    rows = []
    for row in rows_of(lines, "kernels"):
        at = row.conditions
        name = f"{OURS}, graph" if f"{OURS}, graph" in row.columns else OURS
        time, line = row.time_s(name), row.columns[name]
        if time is None or not copy:
            continue
        work, operations = line.values["bytes"], line.values["flop"]
        floor_s = max(work / copy, operations / matmul[str(at["dtype"])])
        predicted = PREDICTED_US.get((str(at["shape"]), int(at["batch"])))
        graph = name != OURS and at["dtype"] == "bfloat16" and predicted
        rows.append(
            (
                *(str(at[key]) for key in ("shape", "dtype", "batch", "mix")),
                f"{1e6 * time.median:.1f}",
                f"{predicted:g}" if graph else NOTHING,
                f"{work / time.median / 1e9:.1f}",
                f"{operations / time.median / 1e12:.3f}",
                f"{100 * floor_s / time.median:.0f} %",
                f"{line.values['error']:.1e}",
            )
        )
    head = ("shape", "dtype", "batch", "mix", "us", "predicted us", "GB/s", "TFLOP/s")
    return (
        f"### {OURS}, against the ceiling\n\nBytes are those that must move (x, y, each chosen "
        "expert once); the share is of the time that the measured ceiling allows. The prediction "
        "was made before a device was seen, for one block with many tasks.\n\n"
        + table((*head, "of the ceiling", "error of y"), rows)
    )


def _low_rank(lines: Sequence[Measurement]) -> str:
    rows = []
    for row in rows_of(lines, "low rank"):
        at = [str(row.conditions[key]) for key in ("shape", "dtype", "batch", "mix")]
        for name in row.columns:
            over = _over(row.ratio(name, _like(name, ALONE)))
            rows.append((*at, name, _milliseconds(row, name), over))
    head = ("shape", "dtype", "batch", "mix", "column", "ms, median (quartiles)", "over alone")
    return table(head, rows) if rows else ""


def _model(lines: Sequence[Measurement]) -> str:
    parts = []
    rows = rows_of(lines, "model")
    for (backbone, precision, what), some in _grouped(
        rows, "backbone", "precision", "what"
    ).items():
        body = [
            (str(row.conditions["batch"]), name, *_latency(row, name))
            for row in some
            for name in row.columns
        ]
        head = ("batch", "column", "images/s", "p50 ms", "p99 ms", "rounds")
        over = (f"over {FROZEN}", f"over {OPEN_CLIP}") if what == "tower" else ()
        cut = len(head) + len(over)
        parts += [f"### {backbone}, {precision}, {what}"]
        parts += [table((*head, *over), [row[:cut] for row in body])]
    return "\n\n".join(parts)


def _latency(row: Row, name: str) -> tuple[str, ...]:
    time, p99_s, line = row.time_s(name), row.p99_s(name), row.columns[name]
    if time is None or p99_s is None:
        return (_failure(line.failure), *[NOTHING] * 5)
    return (
        f"{int(row.conditions['batch']) / time.median:.1f}",
        f"{1e3 * time.median:.2f}",
        f"{1e3 * p99_s:.2f}",
        str(len(line.times_s)),
        _over(row.ratio(name, _like(name, FROZEN))),
        _over(row.ratio(name, _like(name, OPEN_CLIP))),
    )


def _ddas(lines: Sequence[Measurement]) -> str:
    rows = rows_of(lines, "ddas")
    if not rows:
        return ""
    names = list(rows[0].columns)
    head = ("backbone", "precision", "batch", *names)
    body = []
    for row in rows:
        at = [str(row.conditions[key]) for key in head[:3]]
        body.append((*at, *(_milliseconds(row, name) for name in names)))
        shares = (_percent(row.ratio(name, _like(name, FORWARD))) for name in names)
        body.append(("", "", "share of a forward", *shares))
    return "Milliseconds, median (quartiles), and shares within rounds:\n\n" + table(head, body)


def _swap(lines: Sequence[Measurement]) -> str:
    parts = []
    for row in rows_of(lines, "swap"):
        at = row.conditions
        where = (
            f"{at['backbone']}, {at['precision']}, batch {at['batch']}, {at['tasks']} tasks stay"
        )
        if at["what"] == PARTS:
            body = [(name, _milliseconds(row, name)) for name in row.columns]
            parts += [f"### Parts of a swap: {where}"]
            parts += [table(("part", "ms, median (quartiles)"), body)]
        elif at["what"] == THROUGHPUT:
            first = next(iter(row.columns))
            rhythms = [
                (name, _rate(row, name), _percent(row.ratio(first, name)), f"{swaps:.0f}")
                for name, line in row.columns.items()
                for swaps in [line.values["swaps"]]
            ]
            parts += [f"### Throughput: {where}"]
            parts += [table(("rhythm", "images/s", f"of {first}", "swaps"), rhythms)]
        elif at["what"] == LEAK:
            parts += [f"### Leaks: {where}", _leak(row)]
    return "\n\n".join(parts)


def _leak(row: Row) -> str:
    (line,) = row.columns.values()
    values = line.values
    return (
        f"{values['swaps']:.0f} swaps; of {values['answers_compared']:.0f} answers of other tasks, "
        f"compared while the slot was empty and after it was filled, "
        f"{values['answers_different']:.0f} differed by a bit. Memory held grew by "
        f"{values['memory_bytes_per_swap']:.0f} bytes a swap over the second half."
    )


def _grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row.conditions[key]) for key in keys), []).append(row)
    return groups


def _copy(lines: Sequence[Measurement]) -> float:
    found = (line.values for line in lines if (line.bench, line.column) == ("ceiling", "copy"))
    return next(found, {}).get("copy_bytes_per_s", 0.0)


def _matmuls(lines: Sequence[Measurement]) -> dict[str, float]:
    return {
        line.column.removeprefix("matmul "): line.values["matmul_flop_per_s"]
        for line in lines
        if "matmul_flop_per_s" in line.values
    }


def _milliseconds(row: Row, name: str) -> str:
    time = row.time_s(name)
    if time is None:
        line = row.columns.get(name)
        return _failure(line.failure) if line else NOTHING
    low, high = 1e3 * time.low, 1e3 * time.high
    return f"{1e3 * time.median:.3g} ({low:.3g} to {high:.3g})"


def _rate(row: Row, name: str) -> str:
    time = row.time_s(name)
    return f"{1 / time.median:.1f}" if time else NOTHING


def _times(ratio: Quartiles | None) -> str:
    return f"{ratio.median:.2f}" if ratio else NOTHING


def _percent(ratio: Quartiles | None) -> str:
    return f"{100 * ratio.median:.3g} %" if ratio else NOTHING


def _over(ratio: Quartiles | None) -> str:
    return f"{100 * (ratio.median - 1):+.1f} %" if ratio else NOTHING


def _like(name: str, base: str) -> str:
    """The column to compare with: a graph with a graph."""
    return f"{base}, graph" if name.endswith(", graph") else base


def _failure(reason: str | None) -> str:
    return f"failed: {reason}"


def _verdict(line: Measurement) -> str:
    return "right" if right(line) else "**wrong**"


SECTIONS: dict[str, tuple[str, Callable[[Sequence[Measurement]], str]]] = {
    "check": ("Correctness", _checks),
    "ceiling": ("What the machine can do", _ceiling),
    "kernels": ("The expert branch of one block", _kernels),
    "low rank": ("Low-rank updates of an MLP's linear layers", _low_rank),
    "model": ("Whole towers", _model),
    "ddas": ("Deciding among tasks", _ddas),
    "swap": ("Swapping tasks", _swap),
}
