"""Load on one server, site by site: saturation first, then every cell at its share of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from medley.journal import Journal
from service.bench.cells import Cell, Plan, Site
from service.bench.images import Form
from service.bench.load import Load, Ready
from service.bench.measure import Outcome, Timing, closed_loop, open_loop
from service.bench.names import LOAD, MEDLEY, SATURATION
from service.bench.scrape import between, scrape
from service.bench.served import name_of
from service.bench.servers import Server
from service.bench.swaps import swapping
from service.bench.traffic import choices

__all__ = ["OnStep", "Sites"]

OnStep = Callable[[int], object]
PICKS = 20_000  # drawn once a site; more visits go round again


@dataclass(frozen=True, kw_only=True)
class Sites:
    """A server under load, with what is needed to put it there."""

    journal: Journal
    plan: Plan
    server: Server
    load: Load
    images: Mapping[Form, Sequence[Path]]
    swapped: Mapping[str, bytes]  # the first task's versions
    on_step: OnStep

    def measure(self, site: Site) -> None:
        """Write the line of a site's saturation and those of its cells."""
        requests, picks = self.requests(site)
        self.saturate(requests, picks, seconds=self.plan.warm_up_s)  # not counted
        saturation = self.saturate(requests, picks)
        self._write(SATURATION, site.conditions, saturation)
        for cell in self.plan.cells(site):
            self._measure(cell, requests, picks, saturation.throughput_hz * cell.percent / 100)

    def requests(self, site: Site) -> tuple[list[Ready], list[int]]:
        """Every image asked of every task, and which of them the visits make."""
        images = self.images[site.form]
        requests = [
            Ready(
                path=f"/v1/classify?model={name_of(task)}",
                content_type=site.form.content_type,
                body_file=str(image),
            )
            for task in range(site.tasks)
            for image in images
        ]
        tasks = choices(PICKS, site.tasks, site.mix, seed=1)
        picks = [t * len(images) + visit % len(images) for visit, t in enumerate(tasks)]
        return requests, picks

    def saturate(
        self,
        requests: Sequence[Ready],
        picks: Sequence[int],
        *,
        visitors: int | None = None,
        seconds: float | None = None,
    ) -> Outcome:
        """As many answers a second as the server has for a crowd that always comes again."""
        before = scrape(self.server.url)
        outcome = closed_loop(
            self.load,
            self.server,
            requests,
            picks,
            seconds=seconds or self.plan.saturation_s,
            visitors=visitors or self.plan.crowd,
        )
        outcome.values.update(between(before, scrape(self.server.url)))
        return outcome

    def _measure(
        self, cell: Cell, requests: Sequence[Ready], picks: Sequence[int], rate_hz: float
    ) -> None:
        timing = Timing(seconds=cell.seconds, warm_up_s=self.plan.warm_up_s)
        before = scrape(self.server.url)
        swaps_s: Sequence[float] = ()
        with ExitStack() as stack:
            if cell.swaps:
                swaps = swapping(self.server.url, name_of(0), self.swapped)
                swaps_s = stack.enter_context(swaps).times_s
            outcome = open_loop(
                self.load,
                self.server,
                requests,
                picks,
                rate_hz=rate_hz,
                timing=timing,
                visitors=self.plan.visitors,
                seed=cell.percent,
            )
        outcome.values.update(between(before, scrape(self.server.url)))
        self._write(LOAD, cell.conditions, outcome, swaps_s)

    def _write(
        self,
        bench: str,
        conditions: Mapping[str, str | int],
        outcome: Outcome,
        swaps_s: Sequence[float] = (),
    ) -> None:
        series = {"swap_s": tuple(round(s, 6) for s in swaps_s)} if swaps_s else {}
        self.journal.add(
            bench,
            conditions,
            MEDLEY,
            times_s=outcome.latencies_s,
            values=outcome.values,
            series=series,
        )
        self.on_step(1)
