"""Checks of replicas by what they say of each other: are they one service, and does each have all?

What each of them serves is `service/doctor/generations.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter

from service.doctor.findings import Finding, judged, skipped
from service.doctor.generations import listed
from service.doctor.site import Site
from service.doctor.wire import needs_read_key
from service.wire.replica_schemas import ReplicaAnswer, ReplicasAnswer

__all__ = ["check_replicas"]

Replicas = dict[str, ReplicaAnswer]  # by id
SHARED = "MEDLEY_REGISTRY, MEDLEY_REGISTRY_PREFIX and MEDLEY_BUNDLE_STORE"


def check_replicas(sites: Sequence[Site]) -> Iterator[Finding]:
    """All servers know the same replicas, each of which is ready and has what the others have."""
    if any(needs_read_key(site) for site in sites):
        yield skipped("replicas", "reading needs a key: give --key")
        return
    answers = {site.name: site.ask("GET", "/v1/replicas").read(ReplicasAnswer) for site in sites}
    told = {name: answer.replicas if answer else [] for name, answer in answers.items()}
    known = {name: sorted(one.name for one in replicas) for name, replicas in told.items()}
    yield judged(
        "replicas: told of",
        all(sum(one.this for one in replicas) == 1 for replicas in told.values()),
        expected="a list, with the one that answers in it",
        came=listed({name: ", ".join(names) or "none" for name, names in known.items()}),
        advice="its registry may be away: look at /readyz and its log",
    )
    if len(sites) > 1:
        yield judged(
            "replicas: the same ones known everywhere",
            len({frozenset(one.id for one in replicas) for replicas in told.values()}) == 1,
            expected="one list",
            came=listed({name: ", ".join(names) or "none" for name, names in known.items()}),
            advice=f"give all of them the same {SHARED}",
        )
    if found := {one.id: one for replicas in told.values() for one in replicas}:
        yield from _examined(found)


def _examined(replicas: Replicas) -> Iterator[Finding]:
    yield judged(
        "replicas: ready",
        all(one.ready for one in replicas.values()),
        expected="all of them",
        came=_each(replicas, attrgetter("phase")),
        advice="look into the log of one that is not; /startupz says how far it is",
    )
    for name, field in (("version of Medley", "version"), ("backbone", "fingerprint")):
        yield judged(
            f"replicas: {name}",
            len({getattr(one, field) for one in replicas.values()}) == 1,
            expected="one",
            came=_each(replicas, attrgetter(field)),
            advice="start all of them from one image with the same settings",
        )
    wrong = _lacking(replicas)
    yield judged(
        "replicas: each has every version",
        not wrong,
        expected="nothing failed, nothing lacking",
        came="; ".join(wrong) or f"{len(replicas)} have all",
        advice="the reason says which: a bundle store out of reach, a bundle that was damaged",
    )
    apart = _different(replicas)
    yield judged(
        "replicas: the same bundles",
        not apart,
        expected="one digest for each version",
        came=", ".join(apart) or "the same",
        advice=f"give all of them the same {SHARED}",
    )


def _lacking(replicas: Replicas) -> list[str]:
    """What some replica cannot serve, and why."""
    return [
        f"{one.name}: {version}: {reason}"
        for one in replicas.values()
        for version, reason in (
            *((lack.version, lack.reason) for lack in one.lacking),
            *((v, s.reason or "failed") for v, s in one.versions.items() if s.state == "failed"),
        )
    ]


def _different(replicas: Replicas) -> list[str]:
    """Versions that are not the same bundle everywhere."""
    digests: dict[str, set[str]] = {}
    for one in replicas.values():
        for version, state in one.versions.items():
            digests.setdefault(version, set()).add(state.digest)
    return sorted(version for version, found in digests.items() if len(found) > 1)


def _each(replicas: Replicas, told: Callable[[ReplicaAnswer], str]) -> str:
    """Of several replicas; a fingerprint's start is enough to tell it from another."""
    return ", ".join(f"{one.name}: {told(one)[:19]}" for one in replicas.values())
