"""All checks in order. What each of them looks at is in the modules beside this one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from service.doctor import images, wire
from service.doctor.drain import check_drain
from service.doctor.findings import Finding, skipped
from service.doctor.generations import check_generations
from service.doctor.replicas import check_replicas
from service.doctor.site import Site

__all__ = ["examine"]

Check = Callable[[Site], Iterator[Finding]]
ANYBODY: tuple[Check, ...] = (wire.check_probes, wire.check_access)
READERS: tuple[Check, ...] = (
    wire.check_problems,
    images.check_same,
    images.check_poison,
    images.check_deadlines,
    images.check_addresses,
    wire.check_limits,
    wire.check_metrics,
)


def examine(
    sites: Sequence[Site], *, slow: bool = False, pid: int | None = None
) -> Iterator[Finding]:
    """Examine servers, each by itself and all of them together.

    Args:
        sites: at least one.
        slow: also what takes minutes.
        pid: of the only site's process, which is stopped in the end.

    Raises:
        OSError: there is no such process, or it is not ours.
    """
    if pid is not None:
        os.kill(pid, 0)  # raises now rather than in the end
    for site in sites:
        for finding in _examined(site, slow=slow):
            many = len(sites) > 1
            yield replace(finding, check=f"{site.name} {finding.check}") if many else finding
    yield from check_generations(sites, slow=slow)
    yield from check_replicas(sites)
    if pid is not None:
        yield from check_drain(sites[0], pid)


def _examined(site: Site, *, slow: bool) -> Iterator[Finding]:
    for check in ANYBODY:
        yield from check(site)
    if wire.needs_read_key(site):
        for check in READERS:
            yield skipped(check.__name__.removeprefix("check_"), "reading needs a key: give --key")
    else:
        for check in READERS:
            yield from check(site)
    yield from wire.check_clock(site)
    if slow:
        yield from wire.check_slowness(site)
    else:
        yield skipped("slow", "takes minutes: --slow")
