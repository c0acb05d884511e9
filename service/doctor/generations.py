"""Checks of generations: do servers serve the same one, and what does asking for one do?"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from pydantic import BaseModel

from service.doctor.findings import Finding, judged, skipped
from service.doctor.site import Reply, Site
from service.wire.headers import GENERATION_HEADER, MIN_GENERATION_HEADER

__all__ = ["check_generations", "listed"]

LOOK_AGAIN_S = 0.25
NEVER = 10**14  # a generation that no registry reaches
READ = "/v1/tasks"


class Serving(BaseModel):
    """What /readyz says of what is served."""

    generation: int
    fingerprint: str


def check_generations(sites: Sequence[Site], *, slow: bool = False) -> Iterator[Finding]:
    """All answer from one generation, soon at least, by one backbone, and never from before it.

    Args:
        sites: at least one.
        slow: also wait for a generation that never comes.
    """
    headers = {site.name: _generation(site.ask("GET", "/readyz", bearer="")) for site in sites}
    yield judged(
        "generation: told with every answer",
        all(header.isdecimal() for header in headers.values()),
        expected=f"the header {GENERATION_HEADER}",
        came=listed({name: header or "none" for name, header in headers.items()}),
        advice="let the proxy pass the header on",
    )
    serving = _agreed(sites)
    found = {name: one.generation for name, one in serving.items() if one is not None}
    lag = max(found.values(), default=0) - min(found.values(), default=0)
    told = listed({name: str(found.get(name, "none")) for name in serving})
    yield judged(
        "generation: the same everywhere",
        _agree(serving),
        expected=f"one generation, after {_patience_s(sites):g} s at most",
        came=f"{told}; {lag} behind" if lag else told,
        advice="one cannot follow (`medley replicas` says why), or they share no registry",
    )
    if len(sites) > 1:
        prints = {name: one.fingerprint[:19] if one else "none" for name, one in serving.items()}
        yield judged(
            "backbone: the same everywhere",
            len(set(prints.values())) == 1 and "none" not in prints.values(),
            expected="one fingerprint",
            came=listed(prints),
            advice="start all servers with the same MEDLEY_BACKBONE and MEDLEY_WEIGHTS",
        )
    yield from _asked_for(sites, max(found.values(), default=0), slow)


def _asked_for(sites: Sequence[Site], newest: int, slow: bool) -> Iterator[Finding]:
    replies = _ask(sites, str(newest))
    yield judged(
        "generation: asked for",
        all(r.status == 200 and _reached(r, newest) for r in replies.values()),
        expected=f"200 from generation {newest} or later",
        came=listed({n: f"{r.said} from {_generation(r) or 'none'}" for n, r in replies.items()}),
        advice=f"let the proxy pass {MIN_GENERATION_HEADER} on; else a replica cannot follow",
    )
    replies = _ask(sites, "soon")
    yield judged(
        "generation: nonsense asked for",
        all(reply.is_refusal for reply in replies.values()),
        expected="a 4xx problem",
        came=listed({name: reply.said for name, reply in replies.items()}),
        advice=f"let the proxy pass {MIN_GENERATION_HEADER} on",
    )
    if not slow:
        yield skipped("generation: one that never comes", "takes seconds: --slow")
        return
    replies = _ask(sites, str(NEVER))
    yield judged(
        "generation: one that never comes",
        all(_is_behind(reply) for reply in replies.values()),
        expected="503 behind, with Retry-After",
        came=listed({name: reply.said for name, reply in replies.items()}),
        advice="MEDLEY_GENERATION_WAIT_S must be shorter than the proxy's time-out",
    )


def listed(by_name: dict[str, str]) -> str:
    """What each server said, or what the only one did."""
    if len(by_name) == 1:
        return next(iter(by_name.values()))
    return ", ".join(f"{name}: {value}" for name, value in by_name.items())


def _ask(sites: Sequence[Site], generation: str) -> dict[str, Reply]:
    """All at once: each may take its time."""
    headers = {MIN_GENERATION_HEADER: generation}
    with ThreadPoolExecutor(len(sites)) as pool:
        replies = pool.map(lambda site: site.ask("GET", READ, headers=headers), sites)
        return dict(zip([site.name for site in sites], replies, strict=True))


def _agreed(sites: Sequence[Site]) -> dict[str, Serving | None]:
    """What all serve, once they agree or patience is at its end."""
    end_s = time.monotonic() + _patience_s(sites)
    while not _agree(serving := _serving(sites)) and time.monotonic() < end_s:
        time.sleep(LOOK_AGAIN_S)
    return serving


def _serving(sites: Sequence[Site]) -> dict[str, Serving | None]:
    return {site.name: site.ask("GET", "/readyz", bearer="").read(Serving) for site in sites}


def _agree(serving: dict[str, Serving | None]) -> bool:
    return None not in serving.values() and (
        len({one.generation for one in serving.values() if one}) == 1
    )


def _patience_s(sites: Sequence[Site]) -> float:
    return max(site.patience_s for site in sites)


def _generation(reply: Reply) -> str:
    return reply.headers.get(GENERATION_HEADER.lower(), "")


def _reached(reply: Reply, generation: int) -> bool:
    told = _generation(reply)
    return told.isdecimal() and int(told) >= generation


def _is_behind(reply: Reply) -> bool:
    problem = reply.problem
    return problem is not None and problem.code == "behind" and "retry-after" in reply.headers
