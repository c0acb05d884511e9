"""One order of visits to a server, and what it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.bench.load import Load, LoadError, Order, Ready, Visits
from service.bench.servers import Server
from service.bench.traffic import arrivals

__all__ = ["Outcome", "Timing", "closed_loop", "open_loop", "outcome_of"]

QUANTILES = {"p50_s": 0.5, "p95_s": 0.95, "p99_s": 0.99}
MOST_PER_S = 2000  # visits a second that a closed loop has ready; no server here comes near


@dataclass(frozen=True)
class Outcome:
    """Numbers of one order, and the latency of each visit that was answered."""

    values: dict[str, float]
    latencies_s: tuple[float, ...]

    @property
    def throughput_hz(self) -> float:
        """Answers a second."""
        return self.values["throughput_hz"]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long an open loop lasts, and how much of its beginning does not count."""

    seconds: float
    warm_up_s: float


def open_loop(
    load: Load,
    server: Server,
    requests: Sequence[Ready],
    picks: Sequence[int],
    *,
    rate_hz: float,
    timing: Timing,
    visitors: int,
    seed: int = 0,
) -> Outcome:
    """Visit at a fixed mean rate; latency counts from the moment at which a visit was due.

    Raises:
        LoadError: the server or the visitors have ended.
    """
    due_s = arrivals(rate_hz, timing.seconds, seed=seed)
    order = Order(
        url=server.url,
        requests=requests,
        picks=_as_many(picks, len(due_s)),
        due_s=tuple(due_s),
        visitors=visitors,
    )
    outcome = _carry_out(load, server, order, timing)
    outcome.values["rate_hz"] = rate_hz
    return outcome


def closed_loop(
    load: Load,
    server: Server,
    requests: Sequence[Ready],
    picks: Sequence[int],
    *,
    seconds: float,
    visitors: int,
) -> Outcome:
    """Let each visitor come again as soon as it is answered: with many, the server's saturation.

    All of it counts, from the first request to the last answer, so that a server which answers
    whole batches at once is not measured by how many of them end within a window.

    Raises:
        LoadError: it has answered nothing.
    """
    count = int(MOST_PER_S * seconds)
    order = Order(
        url=server.url,
        requests=requests,
        picks=_as_many(picks, count),
        due_s=(0.0,) * count,
        visitors=visitors,
        stop_s=seconds,
    )
    outcome = _carry_out(load, server, order, None)
    if not outcome.throughput_hz:
        raise LoadError(f"{server.name} has answered nothing in {seconds} s")
    return outcome


def outcome_of(visits: Visits, timing: Timing | None) -> Outcome:
    """Put visits together.

    Args:
        visits: all of an order.
        timing: the order's; None: a closed loop, where latency counts from when a visit was sent.
    """
    due_s, sent_s, done_s = (np.asarray(x) for x in (visits.due_s, visits.sent_s, visits.done_s))
    answered = np.asarray(visits.status) == 200
    if timing is None:
        begun_s, counted, inside = sent_s, np.ones_like(answered), answered
        window_s = float(done_s.max()) if done_s.size else 1.0
    else:
        begun_s, counted = due_s, due_s >= timing.warm_up_s
        inside = answered & (done_s >= timing.warm_up_s) & (done_s < timing.seconds)
        window_s = timing.seconds - timing.warm_up_s
    latency_s = (done_s - begun_s)[counted & answered]
    values = {
        "visits": float(counted.sum()),
        "errors": float((counted & ~answered).sum()),
        "throughput_hz": float(inside.sum()) / window_s,
        "visitor_wait_s": float((sent_s - begun_s)[counted].mean()) if counted.any() else 0.0,
    }
    if latency_s.size:
        values |= {name: float(np.quantile(latency_s, q)) for name, q in QUANTILES.items()}
    return Outcome(values, tuple(latency_s.round(6).tolist()))


def _carry_out(load: Load, server: Server, order: Order, timing: Timing | None) -> Outcome:
    cpu_s = server.cpu_s()
    visits = load.visit(order)
    outcome = outcome_of(visits, timing)
    answers = max(1, len(visits.status))
    outcome.values["server_cpu_s"] = (server.cpu_s() - cpu_s) / answers
    outcome.values["visitor_cpu_s"] = visits.cpu_s / answers
    outcome.values["rss_bytes"] = float(server.rss_bytes())
    return outcome


def _as_many(picks: Sequence[int], count: int) -> tuple[int, ...]:
    return tuple(picks[index % len(picks)] for index in range(count))
