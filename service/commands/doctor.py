"""`medley doctor`: look at running servers from outside."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from service.commands.console import AdminKey, Json, err, fail, one_line_errors, out, table_of

if TYPE_CHECKING:
    from service.doctor.findings import Finding
    from service.doctor.site import Site

__all__ = ["doctor"]

STYLES = {"pass": "green", "fail": "bold red", "skip": "yellow"}


def doctor(
    urls: Annotated[list[str], typer.Argument(help="Where servers are.", envvar="MEDLEY_URL")],
    key: AdminKey = None,
    slow: Annotated[bool, typer.Option("--slow", help="Also what takes minutes.")] = False,
    drain: Annotated[
        bool, typer.Option("--drain", help="Stop the server in the end, to see how it leaves.")
    ] = False,
    pid: Annotated[int | None, typer.Option(min=2, help="Its process, for --drain.")] = None,
    patience: Annotated[
        float, typer.Option(help="Seconds to wait for servers to agree, or to refuse nonsense.")
    ] = 5.0,
    as_json: Json = False,
) -> None:
    """Check servers from outside: poison, limits, keys, problems, lag. Changes nothing of them.

    Of several, the replicas of one service, also whether they serve the same. Status 1 if a check
    fails.
    """
    from service.doctor.examine import examine

    if drain != (pid is not None):
        fail("--drain stops a server: it needs --pid, and --pid is for --drain")
    if drain and len(urls) > 1:
        fail("--drain stops one server: give one URL")
    with one_line_errors(), ExitStack() as stack:
        sites = [stack.enter_context(_site(url, key, patience)) for url in urls]
        findings = examine(sites, slow=slow, pid=pid)
        failures = _print_lines(findings) if as_json else _print_table(findings)
    if failures:
        raise typer.Exit(1)


def _site(url: str, key: str | None, patience_s: float) -> Site:
    """A server that answers at all."""
    from pydantic import SecretStr

    from service.doctor.site import Site

    try:
        site = Site(url, SecretStr(key) if key else None, patience_s=patience_s)
    except ValueError as error:
        fail(str(error))
    first = site.ask("GET", "/livez", bearer="")
    if not first.status:
        fail(f"no answer from {site.name}: {first.error}")
    return site


def _print_lines(findings: Iterable[Finding]) -> int:
    failures = 0
    for finding in findings:
        failures += finding.outcome == "fail"
        out.print_json(json.dumps(finding.fields()), indent=None)
    return failures


def _print_table(findings: Iterable[Finding]) -> int:
    table = table_of("", "check", "expected", "came", "what to do")
    counts = Counter[str]()
    with err.status("examining"):
        for finding in findings:
            counts[finding.outcome] += 1
            style = STYLES[finding.outcome]
            words = (finding.check, finding.expected, finding.came, finding.advice)
            table.add_row(f"[{style}]{finding.outcome}[/{style}]", *map(escape, words))
    out.print(table)
    out.print(", ".join(f"{counts[outcome]} {outcome}" for outcome in STYLES))
    return counts["fail"]
