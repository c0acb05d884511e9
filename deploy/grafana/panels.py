"""Panels and dashboards as we think of them; no word of Grafana's JSON, nothing drawn.

Expressions are PromQL with two words of ours: ME, the matchers of the servers that are looked at,
and RATE, a window that suits the resolution of the picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = ["COLUMNS", "Board", "Kind", "Panel", "Place", "Query", "Unit"]

COLUMNS = 24  # of a dashboard, as Grafana has them
HEIGHT, LOW = 8, 4
Kind = Literal["lines", "stacked", "number", "heatmap", "table"]
Unit = Literal["", "s", "bytes", "share", "requests/s", "images/s", "1/s", "cores"]


@dataclass(frozen=True)
class Query:
    """One expression; `legend` names its series by their labels, as in `{{instance}}`."""

    expr: str
    legend: str = ""

    def filled(self, *, me: str, rate: str) -> str:
        """The expression with its two words replaced."""
        return re.sub(r"\bME\b", lambda _: me, self.expr).replace("[RATE]", f"[{rate}]")


@dataclass(frozen=True)
class Panel:
    """One picture with its title; `about` is what a reader wants to know of it."""

    title: str
    queries: tuple[Query, ...]
    about: str
    unit: Unit = ""
    kind: Kind = "lines"
    width: int = 12
    limit: float | None = None  # of an alert: drawn as a line
    gpu_only: bool = False  # empty where the device is a CPU
    columns: tuple[str, ...] = ()  # of a table: labels, and what the number is

    @property
    def height(self) -> int:
        """Numbers are low."""
        return LOW if self.kind == "number" else HEIGHT


@dataclass(frozen=True)
class Place:
    """A panel and where its upper left corner is."""

    panel: Panel
    x: int
    y: int


@dataclass(frozen=True)
class Board:
    """A dashboard: panels fill its columns line by line."""

    uid: str
    title: str
    about: str
    panels: tuple[Panel, ...]

    def places(self) -> Iterator[Place]:
        """Every panel with its place; a panel that does not fit begins a new line."""
        x = y = line_height = 0
        for panel in self.panels:
            if x + panel.width > COLUMNS:
                x, y, line_height = 0, y + line_height, 0
            yield Place(panel, x, y)
            x, line_height = x + panel.width, max(line_height, panel.height)
