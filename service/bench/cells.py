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
    swapped: tuple[int, ...] = (80,)  # of them, also while tasks are swapped
    cell_s: float = 7.0
    saturation_s: float = 4.0
    warm_up_s: float = 1.0  # at the beginning of each, not counted
    visitors: int = 64  # of an open loop; more than ever wait at the same time
    crowd: int = 16  # of a closed loop: enough to saturate, few enough to be kept in order
    beside: int = 16  # tasks that are live while HTTP is compared with a bare loop
    alone: int = 60  # images of a round, one at a time
    images: int = 16
    rounds: int = 3  # of what is compared in turns
    compared: tuple[str, ...] = ("ViT-S-32", "ViT-B-32")  # architectures, beside infinity

    def mixes(self, tasks: int) -> tuple[Mix, ...]:
        """One task can be asked in one way only."""
        return (Mix.UNIFORM,) if tasks == 1 else tuple(Mix)

    def sites(self, tasks: int) -> Iterator[Site]:
        """Those with so many tasks."""
        for form in self.forms:
            for mix in self.mixes(tasks):
                yield Site(form=form, tasks=tasks, mix=mix)

    def cells(self, site: Site) -> Iterator[Cell]:
        """Those of a site, without swaps first."""
        for percent in self.percents:
            yield Cell(site=site, percent=percent, swaps=False)
        for percent in self.swapped:
            yield Cell(site=site, percent=percent, swaps=True)


FULL = Plan()
QUICK = Plan(
    tasks=(1, 4),
    percents=(50,),
    swapped=(50,),
    cell_s=1.5,
    saturation_s=1.0,
    warm_up_s=0.3,
    images=2,
    beside=4,
    alone=4,
    rounds=1,
    compared=("ViT-S-32",),
)
