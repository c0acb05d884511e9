"""What is documented is what is exported, named by Prometheus's rules, and its series are few."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
import pytest
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.middleware import RequestContext
from service.signals.metrics import OTHER, Metrics
from tests.service.conftest import MakeBundle, OpenApp

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"
ROW = re.compile(r"\| `(medley_[a-z_]+)` \| (\w+) \| ([\w, ]*) ?\| .+ \|")
BASE_UNITS = ("_seconds", "_bytes", "_ratio", "_info")
NOT_BASE = re.compile(r"_(ms|millis|milliseconds|us|minutes|kb|mb|mib|percent|count|sum)$")


def documented() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Kind and labels by name, as the page has them."""
    rows = [row for line in PAGE.read_text().splitlines() if (row := ROW.fullmatch(line))]
    return {
        name: (kind, tuple(part for part in labels.strip().split(", ") if part))
        for name, kind, labels in (row.groups() for row in rows)
    }


def exported(metrics: Metrics) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Kind and labels by name, as the app has them."""
    found = {}
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            family = next(iter(metric.describe()))
            name = f"{family.name}_total" if isinstance(metric, Counter) else family.name
            found[name] = family.type, tuple(metric._labelnames)
    return found


def families(text: str) -> dict[str, Metric]:
    """What a Prometheus server reads."""
    return {family.name: family for family in text_string_to_metric_families(text)}


def tasks_of(text: str) -> set[str]:
    """Every value of a task label."""
    samples = (sample for family in families(text).values() for sample in family.samples)
    return {sample.labels["task"] for sample in samples if "task" in sample.labels}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(task_series=3)


def test_the_page_has_every_metric_with_its_kind_and_labels_and_no_other(metrics: Metrics) -> None:
    assert documented() == exported(metrics)


def test_every_metric_of_the_registry_is_a_field_of_metrics(metrics: Metrics) -> None:
    fields = {name.removesuffix("_total") for name in exported(metrics)}
    ours = {f.name for f in metrics.registry.collect() if not f.name.startswith("process_")}

    assert ours == fields


def test_names_follow_the_rules_of_prometheus(metrics: Metrics) -> None:
    for metric in vars(metrics).values():
        if isinstance(metric, Counter | Gauge | Histogram):
            family = next(iter(metric.describe()))
            assert re.fullmatch(r"medley(_[a-z]+)+", family.name), "one prefix, no colon"
            assert not NOT_BASE.search(family.name), f"{family.name}: not a base unit"
            assert not family.name.endswith("_total"), "the library adds it, to counters only"
            assert family.documentation
            assert not {"image", "request_id", "path", "label"} & set(metric._labelnames)


def test_a_real_server_text_is_read_back_by_prometheus_own_parser(
    http: httpx.Client, make: MakeBundle, image: bytes
) -> None:
    _, data = make(task="counted")
    http.put("/v1/tasks/counted/versions/1", content=data)
    http.post("/v1/classify", content=image, headers={"Content-Type": "image/png"})
    answer = http.get("/metrics")
    read = families(answer.text)

    assert answer.headers["content-type"].startswith("text/plain")
    names = {f"{n}_total" if f.type == "counter" else n for n, f in read.items()}
    assert {name for name in names if name.startswith("medley_")} == set(documented())
    assert all(not name.endswith("_created") for name in read)
    of_process = {name for name in names if name.startswith("process_")}
    assert "process_resident_memory_bytes" in of_process
    assert all(f"`{name}`" in PAGE.read_text() for name in of_process)


def test_the_series_of_a_deleted_task_are_gone(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    with open_app() as http:
        _, data = make(task="pets")
        assert http.put("/v1/tasks/pets/versions/1", content=data).status_code == 201
        http.post("/v1/classify", content=image, headers={"Content-Type": "image/png"})
        before = http.get("/metrics").text
        http.delete("/v1/tasks/pets")
        after = http.get("/metrics").text

    assert "pets" in tasks_of(before)
    assert "pets" not in tasks_of(after)


def test_a_thousand_tasks_are_a_few_series_and_it_is_said_how_many_were_folded(
    metrics: Metrics,
) -> None:
    for number in range(1000):
        metrics.count_image(f"task-{number}", "auto")
    samples = [s for family in metrics.images.collect() for s in family.samples]

    assert {s.labels["task"] for s in samples} == {"task-0", "task-1", "task-2", OTHER}
    assert sum(s.value for s in samples) == 1000
    assert metrics.registry.get_sample_value("medley_folded_tasks") == 997


def test_a_name_that_becomes_free_goes_to_the_next_task(metrics: Metrics) -> None:
    for task in "abcd":
        metrics.count_image(task, "auto")
    metrics.forget_task("a")
    metrics.count_image("d", "auto")
    labels = {s.labels["task"] for family in metrics.images.collect() for s in family.samples}

    assert labels == {"b", "c", "d", OTHER}
    assert metrics.registry.get_sample_value("medley_folded_tasks") == 0


def test_churn_of_tasks_leaves_nothing_behind(metrics: Metrics) -> None:
    for number in range(1000):
        metrics.count_image(f"task-{number}", "auto")
        metrics.router_margin.labels(metrics.task_label(f"task-{number}")).observe(1)
        metrics.forget_task(f"task-{number}")

    assert not [s for family in metrics.images.collect() for s in family.samples]
    assert metrics.registry.get_sample_value("medley_folded_tasks") == 0


class TestEveryRequestIsCountedOnce:
    """Whatever becomes of it."""

    def test_one_that_the_end_of_the_server_cuts_off(self, metrics: Metrics) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await asyncio.Event().wait()

        async def cut_off() -> None:
            task = asyncio.create_task(served(app, metrics, []))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(cut_off())

        assert counts(metrics) == {"503": 1}
        assert metrics.registry.get_sample_value("medley_inflight_requests") == 0

    def test_one_whose_client_leaves_before_the_answer(self, metrics: Metrics) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await send({"type": "http.response.start", "status": 400, "headers": []})

        asyncio.run(served(app, metrics, [{"type": "http.disconnect"}]))

        assert counts(metrics) == {"499": 1}

    def test_one_whose_client_leaves_after_the_answer(self, metrics: Metrics) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"all"})
            await receive()

        asyncio.run(served(app, metrics, [{"type": "http.disconnect"}]))

        assert counts(metrics) == {"200": 1}

    def test_one_whose_answer_breaks_off(self, metrics: Metrics) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            raise ZeroDivisionError

        asyncio.run(served(app, metrics, []))

        assert counts(metrics) == {"500": 1}

    def test_what_is_no_request_is_not_counted(self, metrics: Metrics) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            pass

        asyncio.run(served(app, metrics, [], kind="lifespan"))

        assert counts(metrics) == {}


def counts(metrics: Metrics) -> dict[str, float]:
    """Requests by status."""
    samples = [s for family in metrics.requests.collect() for s in family.samples]
    return {s.labels["status"]: s.value for s in samples}


async def served(
    app: ASGIApp, metrics: Metrics, messages: list[Message], kind: str = "http"
) -> None:
    """Pass one request through the middleware; its client sends `messages`."""

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        pass

    scope = {"type": kind, "method": "GET", "path": "/", "headers": []}
    await RequestContext(app, metrics=metrics, generation=lambda: 1)(scope, receive, send)
