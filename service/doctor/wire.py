"""Checks of HTTP itself: probes, limits, keys, problems, metrics, the clock."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from email.utils import parsedate_to_datetime
from uuid import uuid4

from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from service.doctor.findings import Finding, judged, skipped
from service.doctor.site import Reply, Site

__all__ = [
    "check_access",
    "check_clock",
    "check_limits",
    "check_metrics",
    "check_probes",
    "check_problems",
    "check_slowness",
    "needs_read_key",
]

HUGE = 10**12
MANY_IMAGES = 2000
SKEW_S = 5.0
SLOW_S = 90.0  # three times what a server gives a body by default
READS = (
    ("GET", "/v1/tasks"),
    ("GET", "/v1/models"),
    ("GET", "/v1/operations"),
    ("GET", "/v2"),
    ("GET", "/metrics"),
    ("POST", "/v1/classify"),
    ("POST", "/v1/route"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v2/repository/index"),
)
REFUSED = (401, 403)


class Started(BaseModel):
    """What /startupz says."""

    started: bool


class Live(BaseModel):
    """What /livez says."""

    live: bool


class Ready(BaseModel):
    """What /readyz says, as far as the doctor looks."""

    ready: bool


def check_probes(site: Site) -> Iterator[Finding]:
    """Three truths, for which nobody needs a key."""
    truths: tuple[tuple[str, type[BaseModel]], ...] = (
        ("/startupz", Started),
        ("/livez", Live),
        ("/readyz", Ready),
    )
    for path, model in truths:
        reply = site.ask("GET", path, bearer="")
        found = reply.read(model) if reply.status == 200 else None
        yield judged(
            f"probes: {path}",
            found is not None and all(found.model_dump().values()),
            expected="200 and its own truth, without a key",
            came=reply.said,
            advice="wait until it is ready, or look into its log; probes must reach the server",
        )


def check_limits(site: Site) -> Iterator[Finding]:
    """What is too large, or lies about it, is turned away."""
    kind = "Content-Type: image/png"
    huge = site.raw(site.head("POST", "/v1/classify", kind, f"Content-Length: {HUGE}"))
    yield judged(
        "limits: a body of a terabyte",
        huge.status == 413,
        expected="413 before a byte of it is sent",
        came=huge.said,
        advice="set MEDLEY_MAX_REQUEST_BYTES, and a limit at the proxy",
    )
    early = site.head("POST", "/v1/classify", kind, "Content-Length: 100000") + b"x"
    yield _survives(site, "limits: a body that ends early", site.raw(early, end=True))
    late = site.head("POST", "/v1/classify", kind, "Content-Length: 1") + b"x" * 1000
    yield _survives(site, "limits: a body longer than it says", site.raw(late))
    lengths = ("Content-Length: 1", "Content-Length: 2")
    yield _not_smuggled(site, "limits: two lengths", *lengths)
    yield _not_smuggled(
        site, "limits: length and chunks", "Content-Length: 1", "Transfer-Encoding: chunked"
    )
    files = [("file", (str(index), b"x")) for index in range(MANY_IMAGES)]
    many = site.ask("POST", "/v1/classify", files=files, data={"model": "base", "labels": "x"})
    yield judged(
        "limits: 2000 images at once",
        many.is_refusal,
        expected="413",
        came=many.said,
        advice="set MEDLEY_MAX_IMAGES",
    )
    for name, lines in (
        ("one header of 1 MB", ["X-Large: " + "x" * 2**20]),
        ("10,000 headers", [f"X-{index}: x" for index in range(10_000)]),
    ):
        yield _headers(name, site.raw(site.head("GET", "/livez", *lines)))


def check_slowness(site: Site) -> Iterator[Finding]:
    """Who sends slowly is not waited for: it holds a place that others need."""
    body = site.head("POST", "/v1/classify", "Content-Type: image/png", "Content-Length: 9") + b"x"
    for name, data in (("body", body), ("headers", site.head("GET", "/livez")[:-2])):
        start_s = time.monotonic()
        reply = site.raw(data, timeout_s=SLOW_S)
        yield judged(
            f"slow: {name}",
            reply.status == 408 or reply.error.startswith("closed"),
            expected=f"408, or closed, within {SLOW_S:g} s",
            came=f"{reply.said} after {time.monotonic() - start_s:.0f} s",
            advice="set MEDLEY_BODY_TIMEOUT_S and MEDLEY_HEADER_TIMEOUT_S, and the proxy's",
        )


def needs_read_key(site: Site) -> bool:
    """Whether reading needs a key that the doctor was not given."""
    return site.ask("GET", "/v1/tasks").status in REFUSED


def check_access(site: Site) -> Iterator[Finding]:
    """Changes need a key, and reading is open or closed as a whole."""
    absent = f"/v1/tasks/doctor-{uuid4().hex[:12]}"  # nothing can happen to it
    changes = (
        ("DELETE", absent),
        ("DELETE", f"{absent}/versions/1"),
        ("DELETE", f"{absent}/aliases/live"),
        ("DELETE", f"{absent}/rollout"),
        ("POST", f"{absent}:rollback"),
        ("POST", absent.replace("/v1/tasks", "/v2/repository/models") + "/unload"),
    )
    replies = {f"{m} {p}": site.ask(m, p, bearer="") for m, p in changes}
    refused = [reply.status in REFUSED for reply in replies.values()]
    absence = [reply.status == 404 and reply.problem is not None for reply in replies.values()]
    yield judged(
        "keys: changes without one",
        all(refused) or (site.is_here and not site.has_key and all(absence)),
        expected="401 or 403, or nothing to change, on this machine without any key",
        came=_counted(replies.values()),
        advice="set MEDLEY_ADMIN_KEY, and listen on a loopback address until you have",
    )
    foreign = [
        site.ask(m, p, bearer="", headers={"Origin": "http://elsewhere.invalid"})
        for m, p in changes
    ]
    yield judged(
        "keys: changes by another site's page",
        all(reply.status in REFUSED for reply in foreign),
        expected="401 or 403",
        came=_counted(foreign),
        advice="any page in a browser on that machine may change tasks: set MEDLEY_ADMIN_KEY",
    )
    yield from _check_keys(site, changes[0][1], keyless=not all(refused))
    reads = [site.ask(method, path, bearer="") for method, path in READS]
    closed = [reply.status in REFUSED for reply in reads]
    yield judged(
        "keys: reading",
        len(set(closed)) == 1 and all(0 < reply.status < 500 for reply in reads),
        expected="all of it open, or all of it closed",
        came=_counted(reads),
        advice="a proxy opens or closes some paths only, or a route has no rule",
    )


def check_problems(site: Site) -> Iterator[Finding]:
    """Whatever is refused is refused in the one shape that programs can read."""
    nobody = f"doctor-{uuid4().hex[:12]}"
    asked = (
        ("an unknown route", 404, site.ask("GET", f"/{nobody}")),
        ("an unknown query", 422, site.ask("GET", "/v1/tasks", params={nobody: 1})),
        ("another method", 405, site.ask("POST", "/livez")),
        ("an unknown task", 404, site.ask("GET", f"/v1/tasks/{nobody}")),
        ("an unknown operation", 404, site.ask("GET", f"/v1/operations/{nobody}")),
        ("not JSON", 400, _classify(site, b"{", "application/json")),
        ("JSON of something else", 422, _classify(site, b"[1]", "application/json")),
        ("an unknown content type", 415, _classify(site, b"x", "text/x-doctor")),
    )
    for name, status, reply in asked:
        yield judged(
            f"problems: {name}",
            reply.status == status and reply.is_refusal,
            expected=f"{status} as application/problem+json",
            came=reply.said,
            advice="a proxy answers in the server's place: let it pass errors on",
        )
    reply = site.ask("GET", "/livez", headers={"X-Request-Id": nobody})
    yield judged(
        "problems: the request's id",
        reply.headers.get("x-request-id") == nobody,
        expected="the X-Request-Id that was sent",
        came=reply.headers.get("x-request-id", "none"),
        advice="without ids nobody finds a request in the logs: let the proxy pass them on",
    )


def check_metrics(site: Site) -> Iterator[Finding]:
    """Prometheus can read them."""
    reply = site.ask("GET", "/metrics")
    try:
        families = list(text_string_to_metric_families(reply.body.decode()))
    except ValueError as error:
        families, told = [], f"not to be parsed: {error}"
    else:
        told = f"{len(families)} metrics" if reply.status == 200 else reply.said
    names = {family.name for family in families}
    yield judged(
        "metrics",
        reply.status == 200 and {"medley_requests", "medley_inflight_requests"} <= names,
        expected="text for Prometheus with medley_requests_total",
        came=told,
        advice="let /metrics through to whoever scrapes, with the read key if there is one",
    )


def check_clock(site: Site) -> Iterator[Finding]:
    """The server's clock is about ours; logs and traces of both go together then."""
    before_s = time.time()
    reply = site.ask("GET", "/livez", bearer="")
    ours_s = (before_s + time.time()) / 2
    try:
        # The header has whole seconds, cut off.
        skew_s = parsedate_to_datetime(reply.headers.get("date", "")).timestamp() + 0.5 - ours_s
    except ValueError:
        skew_s = float("nan")
    yield judged(
        "clock",
        abs(skew_s) <= SKEW_S,
        expected=f"within {SKEW_S:g} s of ours",
        came=f"{skew_s:+.1f} s" if skew_s == skew_s else "no Date header",
        advice="let both machines keep time by NTP",
    )


def _check_keys(site: Site, absent: str, *, keyless: bool) -> Iterator[Finding]:
    """With a wrong key and with the right one; `absent` is the path of no task."""
    if keyless:
        yield skipped("keys: a wrong one", "changes need none here")
    else:
        wrong = site.ask("DELETE", absent, bearer=f"doctor-{uuid4().hex}")
        yield judged(
            "keys: a wrong one",
            wrong.status in REFUSED,
            expected="401 or 403",
            came=wrong.said,
            advice="every key opens this server: is there a proxy that adds the right one?",
        )
    if not site.has_key:
        yield skipped("keys: the right one", "no --key was given")
        return
    right = site.ask("DELETE", absent)
    yield judged(
        "keys: the right one",
        right.status == 404 and right.problem is not None,
        expected="404, as there is no such task",
        came=right.said,
        advice="--key is not this server's MEDLEY_ADMIN_KEY",
    )


def _classify(site: Site, body: bytes, kind: str) -> Reply:
    return site.ask("POST", "/v1/classify", content=body, headers={"Content-Type": kind})


def _survives(site: Site, check: str, reply: Reply) -> Finding:
    ready = site.ask("GET", "/readyz", bearer="")
    refused = 400 <= reply.status < 500 or reply.error.startswith("closed")
    return judged(
        check,
        refused and ready.status == 200,
        expected="a 4xx, or closed; ready afterwards",
        came=f"{reply.said}, then {ready.said}",
        advice="the server trusts what clients say of themselves",
    )


def _not_smuggled(site: Site, check: str, *lines: str) -> Finding:
    body = b"0\r\n\r\nGET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    reply = site.raw(site.head("POST", "/v1/classify", "Content-Type: image/png", *lines) + body)
    return judged(
        check,
        reply.status == 400 or reply.error.startswith("closed"),
        expected="400, or closed",
        came=reply.said,
        advice="a second request can be hidden in the body of the first: look at the proxy",
    )


def _headers(name: str, reply: Reply) -> Finding:
    return judged(
        f"limits: {name}",
        reply.status in (400, 413, 431) or reply.error.startswith("closed"),
        expected="431, or closed",
        came=reply.said,
        advice="set MEDLEY_MAX_HEADER_BYTES and MEDLEY_MAX_HEADERS, and the proxy's limits",
    )


def _counted(replies: Iterable[Reply]) -> str:
    said = [reply.said for reply in replies]
    return ", ".join(f"{said.count(one)}x {one}" for one in dict.fromkeys(said))
