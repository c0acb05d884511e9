"""The report of a benchmark: records of several seeds to Markdown with tables and pictures.

It measures nothing: every number comes from the records, through `metrics.py`; what others
published stands apart and is marked as quoted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from medley.markdown import NOTHING, table
from trainer.bench.aggregate_report import aggregation, cost_cell, is_detail, storage
from trainer.bench.anchors import Anchor, anchors
from trainer.bench.gallery import Picture, gallery
from trainer.bench.goals import goals
from trainer.bench.metrics import over_seeds
from trainer.bench.record import Record, Routing
from trainer.bench.results import Result, check_comparable, results_of, routed_right, routers_of
from trainer.bench.tables import cell, cells
from trainer.checkpoint import make_folder, write_whole

__all__ = ["markdown", "write_report"]

COST_COLUMNS = {  # heading: field, scale, format
    "trained": ("trained_parameters", 1.0, ",.0f"),
    "stored": ("stored_parameters", 1.0, ",.0f"),
    "active": ("active_parameters", 1.0, ",.0f"),
    "seconds": ("seconds", 1.0, ".1f"),
    "CPU seconds": ("cpu_seconds", 1.0, ".1f"),
    "peak memory, MB": ("peak_memory_bytes", 1e-6, ",.0f"),
}


def markdown(records: Sequence[Record]) -> str:
    """The report; its pictures by the names under which `write_report` puts them beside it.

    Raises:
        DataError: no record, two of one seed, or records that cannot be compared.
    """
    check_comparable(records)
    results = results_of(records)
    shown = [result for result in results if not is_detail(result.key[1])]
    sections = [
        _what_was_run(records),
        goals(records, shown),
        _main_table(records, shown),
        aggregation(records, results),
        _by_data_set(records, shown),
        _routing(records),
        _costs(records),
        storage(records),
        _pictures(gallery(records, shown)),
        _settings(records[0]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def write_report(folder: Path, records: Sequence[Record]) -> None:
    """Write ``report.md`` and its pictures, each whole, the text last.

    Raises:
        DataError: as `markdown`, or the folder cannot be written.
    """
    text = markdown(records)
    make_folder(folder)
    for picture in gallery(records, results_of(records)):
        write_whole(folder / picture.name, picture.draw())
    write_whole(folder / "report.md", text.encode())


def _what_was_run(records: Sequence[Record]) -> str:
    first = records[0]
    train, test = np.sum([*first.images.values(), (0, 0)], axis=0)
    seeds = "1 seed" if len(records) == 1 else f"{len(records)} seeds"
    rows = {
        "command": f"`{first.command}`" if first.command else NOTHING,
        "order": ", ".join(first.order),
        "backbone": first.backbone,
        "images": f"{train} to learn from, {test} to test on",
        "learnt from": "all of them" if first.shots is None else f"{first.shots} a class",
        "seeds": ", ".join(str(record.seed) for record in records),
        "machine": "; ".join(dict.fromkeys(record.machine for record in records)),
    }
    quoted = ", except rows marked as quoted" if _quoted(first) else "; nothing is quoted"
    return (
        f"# The {first.suite} suite, task after task, {seeds}\n\n{table(('', ''), rows.items())}"
        "\n\nAccuracy is top-1 in per cent, every image on its own; +- is the sample standard "
        "deviation over the seeds, left out where they agree exactly. All numbers were measured by "
        f"this command{quoted}."
    )


def _main_table(records: Sequence[Record], results: Sequence[Result]) -> str:
    def numbers(result: Result) -> list[str]:
        shares = cells(map(result.of, ("transfer", "average", "last")), len(records))
        return [*shares, cell(result.of("forgetting"), len(records), form=".2f")]

    measured = [(*result.key, *numbers(result)) for result in results]
    quoted = [_anchor_row(anchor) for anchor in _quoted(records[0])]
    head = ("method", "router", "protocol", "Transfer", "Average", "Last", "Forgetting")
    return (
        "## Transfer, Average, Last\n\n"
        "Protocols: *told*, among the data set's own classes, the task is named; *agnostic*, the "
        "same classes, a router decides for each image; *union*, among the classes of all data "
        "sets, seen and unseen. Transfer is the accuracy before a task was learnt, Last that after "
        "the whole sequence, Average that over all of it, Forgetting what was lost since the best."
        f"\n\n{table(head, [*measured, *quoted])}"
    )


def _by_data_set(records: Sequence[Record], results: Sequence[Result]) -> str:
    def lines(metric: str) -> str:
        rows = [
            (f"{result.protocol}: {result.name}", *cells(result.by_task(metric), len(records)))
            for result in results
        ]
        return table((metric.capitalize(), *records[0].order), rows)

    return f"## By data set\n\n{lines('last')}\n\n{lines('transfer')}"


def _routing(records: Sequence[Record]) -> str:
    routers, seeds = routers_of(records), len(records)
    if not routers:
        return ""
    rows = [
        (
            router,
            cell(over_seeds(routed_right(each)[0] for each in found), seeds),
            cell(over_seeds(each.auroc for each in found), seeds, scale=1, form=".3f"),
            cell(over_seeds(float(np.mean(each.false_reject)) for each in found), seeds),
            NOTHING if found[0].alpha is None else f"{100 * found[0].alpha:.1f}",
            cell(over_seeds(float(np.mean(each.false_accept)) for each in found), seeds),
        )
        for router, found in routers.items()
    ]
    head = ("router", "accuracy", "AUROC", "false reject", "alpha", "false accept")
    return (
        "## Routing\n\n"
        "Every image on its own, all tasks learnt. Accuracy: images that went to their own task. "
        "AUROC: images of known tasks against those of a task that is absent, mean over which. "
        "False reject: refused by their own task; alpha was promised at most. False accept: taken "
        "by any task while their own was absent. In per cent but for AUROC; rejects and accepts "
        f"are means over the tasks.\n\n{table(head, rows)}\n\n"
        + _routing_by_task(records[0].order, routers, seeds)
    )


def _routing_by_task(
    order: Sequence[str], routers: Mapping[str, Sequence[Routing]], seeds: int
) -> str:
    shares: dict[str, Callable[[Routing], Sequence[float]]] = {
        "accuracy": lambda routing: routed_right(routing)[1],
        "false reject": lambda routing: routing.false_reject,
        "false accept": lambda routing: routing.false_accept,
    }

    def row(found: Sequence[Routing], of: Callable[[Routing], Sequence[float]]) -> list[str]:
        return cells(map(over_seeds, zip(*map(of, found), strict=True)), seeds)

    return "\n\n".join(
        table((name, *order), [(router, *row(found, of)) for router, found in routers.items()])
        for name, of in shares.items()
    )


def _costs(records: Sequence[Record]) -> str:
    methods = dict.fromkeys(cost.method for record in records for cost in record.costs)
    if not methods:
        return ""
    rows = [
        (method, *(cost_cell(records, method, *column) for column in COST_COLUMNS.values()))
        for method in methods
    ]
    return (
        "## Cost of a task\n\n"
        "Means over the tasks. Parameters are counted apart: trained; stored for each task; active "
        "for each image on top of the backbone. Memory is the rise while the task was learnt.\n\n"
        + table(("method", *COST_COLUMNS), rows)
    )


def _pictures(pictures: Sequence[Picture]) -> str:
    return "## Pictures\n\n" + "\n\n".join(f"![{p.caption}]({p.name})" for p in pictures)


def _settings(record: Record) -> str:
    rows = [(name, f"`{json.dumps(value)}`") for name, value in record.settings.items()]
    return f"## Settings\n\n{table(('', ''), rows)}" if rows else ""


def _quoted(record: Record) -> Sequence[Anchor]:
    return anchors(record.suite, record.order, record.shots)


def _anchor_row(anchor: Anchor) -> tuple[str, ...]:
    shares = (anchor.transfer, anchor.average, anchor.last)
    numbers = [NOTHING if share is None else f"{share:.1f}" for share in shares]
    return (anchor.method, f"quoted: {anchor.source}", anchor.protocol, *numbers, NOTHING)
