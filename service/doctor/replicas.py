"""Checks over several servers: do they serve the same, and how far behind is one of them?"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from pydantic import BaseModel

from service.doctor.findings import Finding, judged
from service.doctor.site import Site

__all__ = ["check_replicas"]

LOOK_AGAIN_S = 0.25


class Serving(BaseModel):
    """What /readyz says of what is served."""

    generation: int
    fingerprint: str


def check_replicas(sites: Sequence[Site]) -> Iterator[Finding]:
    """All servers answer from one generation of the registry, soon at least, and one backbone."""
    headers = {site.name: _header(site) for site in sites}
    yield judged(
        "generation: told with every answer",
        all(header.isdecimal() for header in headers.values()),
        expected="the header X-Registry-Generation",
        came=_listed({name: header or "none" for name, header in headers.items()}),
        advice="let the proxy pass the header on",
    )
    patience_s = max(site.patience_s for site in sites)
    start_s = time.monotonic()
    serving = _serving(sites)
    while not _agree(serving) and time.monotonic() < start_s + patience_s:
        time.sleep(LOOK_AGAIN_S)
        serving = _serving(sites)
    found = {name: one.generation for name, one in serving.items() if one is not None}
    lag = max(found.values(), default=0) - min(found.values(), default=0)
    told = {name: str(found.get(name, "none")) for name in serving}
    yield judged(
        "generation: the same everywhere",
        _agree(serving),
        expected=f"one generation, after {patience_s:g} s at most",
        came=f"{_listed(told)}; {lag} behind" if lag else _listed(told),
        advice="servers with stores of their own, or one that no longer hears of changes",
    )
    if len(sites) > 1:
        prints = {name: one.fingerprint[:19] if one else "none" for name, one in serving.items()}
        yield judged(
            "backbone: the same everywhere",
            len(set(prints.values())) == 1 and "none" not in prints.values(),
            expected="one fingerprint",
            came=_listed(prints),
            advice="start all servers with the same MEDLEY_BACKBONE and MEDLEY_WEIGHTS",
        )


def _header(site: Site) -> str:
    return site.ask("GET", "/readyz", bearer="").headers.get("x-registry-generation", "")


def _serving(sites: Sequence[Site]) -> dict[str, Serving | None]:
    return {site.name: site.ask("GET", "/readyz", bearer="").read(Serving) for site in sites}


def _agree(serving: dict[str, Serving | None]) -> bool:
    return len({one.generation if one else None for one in serving.values()} | {None}) == 2 and (
        None not in serving.values()
    )


def _listed(by_name: dict[str, str]) -> str:
    if len(by_name) == 1:
        return next(iter(by_name.values()))
    return ", ".join(f"{name}: {value}" for name, value in by_name.items())
