"""What is measured: cells of load on one server, and how long each takes. No behaviour."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from medley.journal import Conditions
from service.bench.images import Form
from service.bench.traffic import Mix

__all__ = ["FULL", "QUICK", "Cell", "Plan", "Site"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """What requests look like; its saturation is what the rates of its cells are shares of."""

    form: Form
    tasks: int
    mix: Mix

    @property
    def conditions(self) -> Conditions:
        """Of a line."""
        return {"images": self.form.value, "tasks": self.tasks, "mix": self.mix.value}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One open loop: a share of a site's saturation, with or without a swap every second."""

    site: Site
    percent: int
    swaps: bool
    seconds: float

    @property
    def conditions(self) -> Conditions:
        """Of a line."""
        swaps = "every second" if self.swaps else "none"
        return {**self.site.conditions, "swaps": swaps, "load": self.percent}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All sites and cells of a run, and the seconds of each."""

    forms: tuple[Form, ...] = tuple(Form)
    tasks: tuple[int, ...] = (1, 16, 256)
    percents: tuple[int, ...] = (20, 50, 80, 95)
    long: tuple[int, ...] = (80,)  # of them, those whose p99 is asked for, and with swaps
    cell_s: float = 4.0
    long_s: float = 8.0
    saturation_s: float = 2.5
    warm_up_s: float = 0.5  # at the beginning of each, not counted
    visitors: int = 64  # of an open loop; more than ever wait at the same time
    crowd: int = 16  # of a closed loop: enough to saturate, few enough to be kept in order
    images: int = 16
    rounds: int = 3  # of what is compared in turns
    beside: int = 16  # tasks that are live while HTTP is compared with a bare loop
    alone: int = 40  # images of a round, one at a time
    compared: tuple[tuple[str, tuple[Form, ...]], ...] = (  # architectures, beside infinity
        ("ViT-S-32", tuple(Form)),
        ("ViT-B-32", (Form.JPEG,)),
    )

    def sites(self, tasks: int) -> Iterator[Site]:
        """Those with so many tasks; one task can be asked in one way only."""
        for form in self.forms:
            for mix in (Mix.UNIFORM,) if tasks == 1 else Mix:
                yield Site(form=form, tasks=tasks, mix=mix)

    def cells(self, site: Site) -> Iterator[Cell]:
        """Those of a site, without swaps first."""
        for percent in self.percents:
            seconds = self.long_s if percent in self.long else self.cell_s
            yield Cell(site=site, percent=percent, swaps=False, seconds=seconds)
        for percent in self.long:
            yield Cell(site=site, percent=percent, swaps=True, seconds=self.long_s)

    def steps(self, *, infinity: bool) -> int:
        """How many rows the run has."""
        sites = [site for tasks in self.tasks for site in self.sites(tasks)]
        cells = sum(1 + len(list(self.cells(site))) for site in sites)
        compared = sum(len(forms) for _, forms in self.compared) if infinity else 0
        return cells + 2 * len(self.forms) * (self.beside in self.tasks) + compared


FULL = Plan()
QUICK = Plan(
    tasks=(1, 4),
    percents=(50,),
    long=(50,),
    long_s=2.5,
    saturation_s=1.5,
    images=2,
    rounds=1,
    beside=4,
    alone=4,
    compared=(("ViT-S-32", (Form.JPEG,)),),
)
