"""What Prometheus answers to the queries of a dashboard, by its HTTP API."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from deploy.grafana.panels import Query

__all__ = ["Series", "Source", "Span"]

POINTS = 240  # of a curve: more than a panel has room to show


@dataclass(frozen=True)
class Span:
    """From when to when, in seconds since 1970."""

    begin_s: float
    end_s: float

    @property
    def step_s(self) -> float:
        """Between two points of a curve."""
        return max(1.0, (self.end_s - self.begin_s) / POINTS)


@dataclass(frozen=True)
class Series:
    """One curve with its name and labels; an instant is a curve of one point."""

    name: str
    labels: Mapping[str, str]
    times_s: tuple[float, ...]
    values: tuple[float, ...]


class Source:
    """A Prometheus, and the span of time that is looked at.

    Args:
        http: a client whose base URL is the server's.
        span: what is looked at; an instant is its end.
        rate: the window that rates are taken over.
        job, instance: patterns of what is looked at.
    """

    def __init__(
        self,
        http: httpx.Client,
        span: Span,
        *,
        rate: str = "1m",
        job: str = ".+",
        instance: str = ".+",
    ) -> None:
        self._http = http
        self.span = span
        self._rate = rate
        self._job = job
        self._instance = instance

    def curves(self, query: Query) -> list[Series]:
        """The series of a query over the whole span."""
        span = self.span
        asked = {"start": span.begin_s, "end": span.end_s, "step": span.step_s}
        found = self._ask("query_range", query, asked)
        return [_series(query, one["metric"], one["values"]) for one in found]

    def now(self, query: Query) -> list[Series]:
        """The series of a query at the end of the span."""
        found = self._ask("query", query, {"time": self.span.end_s})
        return [_series(query, one["metric"], [one["value"]]) for one in found]

    def expr(self, query: Query) -> str:
        """A query as it is sent."""
        me = f'job=~"{self._job}", instance=~"{self._instance}"'
        filled = query.filled(me=me, rate=self._rate)
        return filled.replace("$job", self._job).replace("$instance", self._instance)

    def _ask(self, what: str, query: Query, asked: Mapping[str, float]) -> list[Any]:
        form = {"query": self.expr(query)} | {name: str(value) for name, value in asked.items()}
        answer = self._http.post(f"/api/v1/{what}", data=form)
        body = answer.json()
        if answer.is_error:
            raise ValueError(f"{form['query']}: {body.get('error', answer.status_code)}")
        return list(body["data"]["result"])


def _series(query: Query, labels: Mapping[str, str], points: list[list[Any]]) -> Series:
    times_s, values = zip(*((float(time_s), float(value)) for time_s, value in points), strict=True)
    name = re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), query.legend)
    return Series(name.strip(), labels, times_s, values)
