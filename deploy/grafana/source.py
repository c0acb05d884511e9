"""What Prometheus answers to the queries of a dashboard, by its HTTP API."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
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
        """Between two points of a curve: whole seconds."""
        return max(1.0, math.ceil((self.end_s - self.begin_s) / POINTS))

    @property
    def times_s(self) -> tuple[float, ...]:
        """Of the points of a curve."""
        count = int((self.end_s - self.begin_s) / self.step_s) + 1
        return tuple(self.begin_s + number * self.step_s for number in range(count))


@dataclass(frozen=True)
class Series:
    """One curve with its name and labels; an instant is a curve of one point.

    `values` are those at the times of the span, NaN where there is none.
    """

    name: str
    labels: Mapping[str, str]
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
        return [self._curve(query, one) for one in found]

    def now(self, query: Query) -> list[Series]:
        """The series of a query at the end of the span."""
        found = self._ask("query", query, {"time": self.span.end_s})
        return [_series(query, one["metric"], [float(one["value"][1])]) for one in found]

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

    def _curve(self, query: Query, one: Mapping[str, Any]) -> Series:
        values = [math.nan] * len(self.span.times_s)
        for time_s, value in one["values"]:
            values[round((time_s - self.span.begin_s) / self.span.step_s)] = float(value)
        return _series(query, one["metric"], values)


def _series(query: Query, labels: Mapping[str, str], values: Sequence[float]) -> Series:
    name = re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), query.legend)
    return Series(name.strip(), labels, tuple(values))
