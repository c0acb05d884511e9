"""A whole run: two clusters, one that hints reach and one that they do not, into a journal."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from medley.backbone import load_backbone
from medley.journal import Journal
from service.bench.images import Form, write_images
from service.bench.load import Ready, visiting
from service.bench.measure import closed_loop
from service.bench.names import MEDLEY, SERVED
from service.bench.replicas.cells import CONVERGENCE, Cell, Change, Plan
from service.bench.replicas.changes import KEPT, Changes
from service.bench.replicas.cluster import replicas
from service.bench.replicas.underload import VISITORS, Underload, underload
from service.bench.served import FIRST, SECOND, Served, name_of, write_tasks
from service.bench.servers import Server

__all__ = ["measure"]

OnStep = Callable[[int], object]
DISTINCT = 2 * KEPT  # tasks that are registered in turn: when one comes again, nobody has it


def measure(
    journal: Journal, plan: Plan, served: Served, *, on_step: OnStep = lambda _: None
) -> None:
    """Measure all of a plan.

    Args:
        journal: where the lines go.
        plan: what is measured.
        served: by what.
        on_step: hears of each line.

    Raises:
        LoadError: a server or a process of visitors fails.
        BackboneError: there is no such backbone.
    """
    journal.add(SERVED, served.conditions, MEDLEY)
    backbone = load_backbone(served.backbone, weights=served.weights)
    with tempfile.TemporaryDirectory(prefix="medley-bench-") as name:
        folder, tasks = Path(name), DISTINCT + 1
        bundles = write_tasks(served.classifier(backbone, tasks), folder / "tasks", tasks)
        size = backbone.image_size
        images = write_images(folder / "images", Form.JPEG, plan.images, input_size=size)
        for hints in (True, False):
            with replicas(
                plan.replicas,
                folder / ("hints" if hints else "none"),
                served.settings(tasks),
                hints=hints,
            ) as servers:
                others = [files[FIRST] for files in bundles[1:]]
                with Changes(servers, others, images[0]) as changes:
                    for version in (FIRST, SECOND):
                        data = bundles[0][version].read_bytes()
                        changes.converge(changes.register(name_of(0), version, data))
                    for cell in plan.cells(hints=hints):
                        _measure(journal, plan, cell, servers, changes, images)
                        on_step(1)


def _measure(
    journal: Journal,
    plan: Plan,
    cell: Cell,
    servers: Sequence[Server],
    changes: Changes,
    images: Sequence[Path],
) -> None:
    requests = [
        Ready(
            path=f"/v1/classify?model={name_of(0)}",
            content_type=Form.JPEG.content_type,
            body_file=str(image),
        )
        for image in images
    ]
    rate_hz = _share_hz(plan, servers[0], requests) / len(servers) if cell.loaded else 0.0
    urls = [server.url for server in servers] if cell.loaded else []
    with underload(urls, requests, rate_hz) as load:
        found = [_change(cell, changes) for _ in range(plan.changes)]
    journal.add(
        cell.bench,
        cell.conditions(len(servers)),
        MEDLEY,
        times_s=[all_s for all_s, _ in found],
        values=_told(load, rate_hz),
        series={"change_s": tuple(round(took_s, 6) for _, took_s in found)},
    )


def _change(cell: Cell, changes: Changes) -> tuple[float, float]:
    """Seconds from the acknowledgement until all were there, and those of the change itself."""
    changed = changes.next_task() if cell.change is Change.REGISTER else changes.activate()
    if cell.bench == CONVERGENCE:
        return changes.converge(changed), changed.took_s
    return changes.read(changed), changed.took_s


def _share_hz(plan: Plan, server: Server, requests: Sequence[Ready]) -> float:
    """Of what one server can do while the others rest."""
    with visiting() as load:
        saturated = closed_loop(
            load, server, requests, (0,), seconds=plan.saturation_s, visitors=VISITORS
        )
    return saturated.throughput_hz * plan.percent / 100


def _told(load: Underload, rate_hz: float) -> dict[str, float]:
    return {"rate_hz": rate_hz, "visits": float(load.visits), "errors": float(load.errors)}
