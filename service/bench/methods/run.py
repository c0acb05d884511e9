"""A whole run: for each method tasks are made, loaded one by one, and then all under load."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import httpx

from medley.backbone import load_backbone
from medley.journal import Journal
from service.bench.images import Form, write_images
from service.bench.load import Load, LoadError, Ready, visiting
from service.bench.measure import closed_loop
from service.bench.methods.cells import LOADING, TRAFFIC, Kind, Plan, Traffic
from service.bench.methods.tasks import Written, write_tasks
from service.bench.names import MEDLEY, SERVED
from service.bench.scrape import Scrape, scrape
from service.bench.served import FIRST, Served, name_of
from service.bench.servers import Server, medley_server

__all__ = ["measure"]

OnStep = Callable[[int], object]
TIMEOUT_S = 120.0
WARM_UP_S = 0.5
COUNTED = {  # by the server, in images or rows
    "images": "medley_images_total",
    "aggregated": "medley_aggregated_images_total",
    "neighbour_rows": "medley_neighbour_rows_total",
}


def measure(
    journal: Journal, plan: Plan, served: Served, *, on_step: OnStep = lambda _: None
) -> None:
    """Measure all of a plan.

    Args:
        journal: where the lines go.
        plan: what is measured.
        served: by what.
        on_step: hears of each load and each visit.

    Raises:
        LoadError: a server or the visitors' process fails, or the traffic is not what was meant.
        BackboneError: there is no such backbone.
    """
    journal.add(SERVED, served.conditions, MEDLEY)
    backbone = load_backbone(served.backbone, weights=served.weights)
    classifier = served.classifier(backbone, max(plan.tasks.values()))
    with tempfile.TemporaryDirectory(prefix="medley-bench-") as name, visiting() as load:
        folder = Path(name)
        images = write_images(
            folder / "images", Form.JPEG, plan.images, input_size=backbone.image_size
        )
        for kind, count in plan.tasks.items():
            tasks = write_tasks(classifier, folder / kind, kind, count)
            settings = served.settings(count) | {"low_rank_slots": count + 1, "models": count}
            log = folder / f"{kind}.log"
            with (
                medley_server(folder / f"{kind}-store", log, settings) as server,
                httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client,
            ):
                run = _Run(journal, plan, kind, tasks, images, server, client, load, on_step)
                run.traffic(run.loading())


@dataclass(frozen=True)
class _Run:
    """One method on a server of its own."""

    journal: Journal
    plan: Plan
    kind: Kind
    tasks: Written
    images: Sequence[Path]
    server: Server
    client: httpx.Client
    load: Load
    on_step: OnStep

    def loading(self) -> int:
        """Write the line of tasks that are loaded and asked one by one; the last stays."""
        empty_bytes = self.server.rss_bytes()
        upload_s = self._upload()
        first_s, register_s = [], []
        for turn in range(self.plan.loads):
            number = turn % len(self.tasks.bundles)
            start_s = time.perf_counter()
            self._register(number)
            register_s.append(time.perf_counter() - start_s)
            self._ask(f"model={name_of(number)}")
            first_s.append(time.perf_counter() - start_s)
            if turn:  # not sooner: a unified model goes with the last task that names it
                self._send("DELETE", f"/v1/tasks/{name_of((turn - 1) % len(self.tasks.bundles))}")
            self.on_step(1)
        values = {
            "bundle_bytes": float(self.tasks.bundles[0].stat().st_size),
            "unified_bytes": float(self.tasks.unified_bytes),
            "upload_s": upload_s,
            "loaded_bytes": float(self.server.rss_bytes() - empty_bytes),
        }
        self.journal.add(
            LOADING,
            self.plan.conditions(self.kind),
            MEDLEY,
            times_s=first_s,
            values=values,
            series={"register_s": tuple(round(s, 6) for s in register_s)},
        )
        return number

    def traffic(self, live: int) -> None:
        """Write a line for each kind of traffic; their rounds take turns. `live` is loaded."""
        for number in range(len(self.tasks.bundles)):
            if number != live:
                self._register(number)
        start_s = time.perf_counter()
        self._ask(f"model=auto&{self._aggregate}")  # encodes all classes for every neighbour
        first_s = time.perf_counter() - start_s
        for traffic in Traffic:
            self._visit(traffic, WARM_UP_S)
        found: dict[Traffic, list[dict[str, float]]] = {traffic: [] for traffic in Traffic}
        for turn in range(self.plan.rounds):
            first = turn % len(found)
            for traffic in (*list(found)[first:], *list(found)[:first]):
                found[traffic].append(self._visit(traffic, self.plan.seconds))
                self.on_step(1)
        for traffic, rounds in found.items():
            means = {name: fmean(values[name] for values in rounds) for name in rounds[0]}
            self.journal.add(
                TRAFFIC,
                self.plan.conditions(self.kind),
                traffic.value,
                times_s=[1 / values["throughput_hz"] for values in rounds],
                values=means | {"first_aggregated_s": first_s},
            )

    @property
    def _aggregate(self) -> str:
        return f"unclaimed=aggregate&neighbours={self.plan.neighbours}"

    def _visit(self, traffic: Traffic, seconds: float) -> dict[str, float]:
        before = scrape(self.server.url)
        requests = self._requests(traffic)
        outcome = closed_loop(
            self.load,
            self.server,
            requests,
            range(len(requests)),
            seconds=seconds,
            visitors=self.plan.crowd,
        )
        values = outcome.values | _counted(before, scrape(self.server.url))
        if values["errors"] or bool(values["aggregated"]) != traffic.aggregated:
            raise LoadError(
                f"{self.kind}, {traffic}: {values['errors']:.0f} requests failed and "
                f"{values['aggregated']:.2f} of all images were aggregated"
            )
        return values

    def _requests(self, traffic: Traffic) -> list[Ready]:
        """Every image of every task, by turns named and unclaimed as the traffic is."""
        how = self._aggregate if traffic.aggregated else "unclaimed=zero_shot"
        turns, asked = traffic.unclaimed, []
        for number in range(len(self.tasks.bundles)):
            for unclaimed in turns:
                query = f"model=auto&{how}" if unclaimed else f"model={name_of(number)}"
                asked += [(query, image) for image in self.images]
        # Task after task with one image, then with the next.
        return [
            Ready(
                path=f"/v1/classify?{query}",
                content_type=Form.JPEG.content_type,
                body_file=str(image),
            )
            for first in range(len(self.images))
            for query, image in asked[first :: len(self.images)]
        ]

    def _register(self, number: int) -> None:
        path = self.tasks.bundles[number]
        at = f"/v1/tasks/{name_of(number)}/versions/{FIRST}"
        self._send("PUT", at, path.read_bytes())

    def _upload(self) -> float:
        """Upload the unified model, if there is one; return the seconds that it took."""
        start_s = time.perf_counter()
        if self.tasks.unified is not None:
            self._send("PUT", f"/v1/unified/{self.tasks.digest}", self.tasks.unified.read_bytes())
        return time.perf_counter() - start_s

    def _ask(self, query: str) -> None:
        image = self.images[0].read_bytes()
        self._send("POST", f"/v1/classify?{query}", image, Form.JPEG.content_type)

    def _send(self, method: str, path: str, body: bytes = b"", kind: str = "") -> None:
        headers = {"Content-Type": kind} if kind else {}
        answer = self.client.request(method, path, content=body, headers=headers)
        if not answer.is_success:
            raise LoadError(f"{self.kind}: {method} {path} was refused: {answer.text}")


def _counted(before: Scrape, after: Scrape) -> dict[str, float]:
    """Of all images the share that was aggregated, and the rows that one took."""
    images, aggregated, rows = (
        sum(
            value - before.samples.get(sample, 0.0)
            for sample, value in after.samples.items()
            if sample[0] == name
        )
        for name in COUNTED.values()
    )
    return {"aggregated": aggregated / images, "rows": 1 + rows / images}
