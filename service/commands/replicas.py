"""`medley replicas`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.markup import escape

from service.commands.console import (
    DEFAULT_URL,
    Json,
    ReadKey,
    Url,
    one_line_errors,
    open_client,
    out,
    table_of,
)

if TYPE_CHECKING:
    from service.wire.replica_schemas import ReplicaAnswer

__all__ = ["replicas"]


def replicas(url: Url = DEFAULT_URL, key: ReadKey = None, as_json: Json = False) -> None:
    """Show all replicas: which generation each serves, and what it has."""
    with one_line_errors(), open_client(url, key) as client:
        answer = client.replicas()
    if as_json:
        for one in answer.replicas:
            out.print_json(one.model_dump_json(), indent=None)
        return
    table = table_of("replica", "id", "state", "generation", "live", "ready", "failed", "since")
    for one in answer.replicas:
        states = Counter(version.state for version in one.versions.values())
        counts = (str(states[state]) for state in ("live", "ready", "failed"))
        name = f"{one.name or '-'}{' (asked)' if one.this else ''}"
        table.add_row(escape(name), one.id[:8], one.phase, str(one.generation), *counts, one.since)
    out.print(table)
    for one in answer.replicas:
        for line in _troubles(one):
            out.print(line, markup=False, highlight=False, soft_wrap=True)


def _troubles(replica: ReplicaAnswer) -> list[str]:
    """What a replica cannot serve, a line each."""
    who = replica.name or replica.id[:8]
    failed = [
        f"{who}: {version} failed: {state.reason}"
        for version, state in replica.versions.items()
        if state.state == "failed"
    ]
    return failed + [f"{who}: waits for {one.version}: {one.reason}" for one in replica.lacking]
