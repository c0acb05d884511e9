"""What the answers say about the traffic: decisions, margins, usage, and who left too early."""

from __future__ import annotations

import socket
from collections.abc import Callable
from itertools import pairwise

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from torch import zeros

from medley.classifier import Ask
from service.answers.engine import Answer
from service.answers.planning import Plan
from service.registry.desired import Desired, VersionRecord
from service.signals.metrics import OTHER, Metrics
from service.signals.reservoir import Reservoir
from service.signals.signals import Signals
from service.versions.live import LabelSet, Live, Resident, Snapshot
from tests.service.conftest import MakeBundle, OpenApp, ServerProcess

NEVER = -1e9  # a threshold that refuses every image
PNG = {"Content-Type": "image/png"}


def value(http: httpx.Client, name: str, **labels: str) -> float:
    """One sample of /metrics; 0 if there is none."""
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return 0.0


def classify(http: httpx.Client, image: bytes, **params: str) -> None:
    http.post("/v1/classify", params=params, content=image, headers=PNG).raise_for_status()


def test_decisions_tell_claimed_unclaimed_and_impossible_apart(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    def decisions(http: httpx.Client) -> dict[str, float]:
        return {
            decision: value(http, "medley_router_decisions_total", decision=decision)
            for decision in ("task", "unclaimed", "no_task")
        }

    with open_app() as http:
        classify(http, image, labels="rose")
        assert decisions(http) == {"task": 0, "unclaimed": 0, "no_task": 1}
        http.put("/v1/tasks/shy/versions/1", content=make(task="shy", threshold=NEVER)[1])
        classify(http, image)
        assert decisions(http) == {"task": 0, "unclaimed": 1, "no_task": 1}
        http.put("/v1/tasks/pets/versions/1", content=make(task="pets")[1])
        classify(http, image)
        classify(http, image, model="pets")  # nothing is decided for it
        assert decisions(http) == {"task": 1, "unclaimed": 1, "no_task": 1}


def test_an_unclaimed_image_is_a_negative_margin_of_the_task_that_knew_it_best(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    def margins(http: httpx.Client, task: str) -> tuple[float, float]:
        name = "medley_router_margin"
        below = value(http, f"{name}_bucket", task=task, le="-10.0")
        return below, value(http, f"{name}_count", task=task)

    with open_app() as http:
        http.put("/v1/tasks/shy/versions/1", content=make(task="shy", threshold=NEVER)[1])
        classify(http, image)
        assert margins(http, "shy") == (1, 1)
        http.put("/v1/tasks/wide/versions/1", content=make(task="wide", threshold=1e9)[1])
        classify(http, image)
        assert margins(http, "wide") == (0, 1)
        http.put("/v1/tasks/all/versions/1", content=make(task="all", seed=1)[1])
        http.delete("/v1/tasks/wide")
        classify(http, image)  # by a task without a threshold: there is no margin
        assert margins(http, "all") == (0, 0)


def test_usage_is_images_and_their_share_of_the_device(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    with open_app() as http:
        _, data = make(task="pets")
        http.put("/v1/tasks/pets/versions/1", content=data)
        http.put("/v1/tasks/idle/versions/1", content=make(task="idle", threshold=NEVER)[1])
        fresh = http.get("/v1/tasks/pets/usage").json()
        for _ in range(3):
            classify(http, image, model="pets")
        classify(http, image, model="base")
        used = http.get("/v1/tasks/pets/usage").json()
        idle = http.get("/v1/tasks/idle/usage").json()
        counted = value(http, "medley_task_forward_seconds_total", task="pets")
        http.delete("/v1/tasks/pets")
        gone = http.get("/v1/tasks/pets/usage")
        http.put("/v1/tasks/pets/versions/1", content=data)
        anew = http.get("/v1/tasks/pets/usage").json()

    assert (fresh["images"], fresh["forward_s"], fresh["forward_share"]) == (0, 0, 0)
    assert used["images"] == 3
    assert 0 < used["forward_share"] < 1
    assert used["forward_s"] == pytest.approx(counted)
    assert used["bundle_bytes"] == len(data)
    assert used["resident_bytes"] > 0
    assert (idle["images"], idle["forward_share"]) == (0, 0)
    assert (gone.status_code, gone.json()["code"]) == (404, "unknown_task")
    assert anew["images"] == 0, "a new task of an old name begins anew"


def test_images_that_shared_a_batch_share_its_time(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    """The parts of all tasks add up to the time of the forwards."""
    with open_app(max_wait_ms=200) as http:
        http.put("/v1/tasks/pets/versions/1", content=make(task="pets")[1])
        before = value(http, "medley_stage_duration_seconds_sum", stage="forward")
        files = [("file", image)] * 4
        http.post("/v1/classify", files=files, data={"model": "pets"}).raise_for_status()
        spent = value(http, "medley_stage_duration_seconds_sum", stage="forward") - before
        share = value(http, "medley_task_forward_seconds_total", task="pets")

    assert share == pytest.approx(spent, rel=1e-6)


class TestSeriesOfTasksThatAreGone:
    """What is counted late is counted under no task's name."""

    def test_an_answer_after_its_task_is_deleted_is_counted_as_other(
        self, signals: Signals, live: Live, metrics: Metrics
    ) -> None:
        live.publish(Snapshot(desired_with("pets"), {}, {}))
        plan = Plan(live.snapshot, Ask(path=-1), "explicit", "pets")
        signals.answered(answer(), plan, b"")
        resident = resident_of("pets")
        plan = Plan(
            Snapshot(desired_with("pets"), {("pets", "1"): resident}), Ask(path=0), "explicit", ""
        )
        live.publish(Snapshot(desired_with()))
        signals.answered(answer(path=0), plan, b"")
        tasks = {s.labels["task"] for f in metrics.images.collect() for s in f.samples}

        assert tasks == {OTHER, "zero_shot"}
        assert signals.used("pets").images == 0

    def test_a_thousand_tasks_that_come_and_go_leave_no_series(
        self, signals: Signals, live: Live, metrics: Metrics
    ) -> None:
        for number in range(1000):
            task = f"task-{number}"
            snapshot = Snapshot(desired_with(task), {(task, "1"): resident_of(task)})
            live.publish(snapshot)
            plan = Plan(snapshot, Ask(eligible=frozenset({0})), "auto", "auto")
            signals.answered(answer(path=0), plan, b"")
            live.publish(Snapshot())
            signals.forget(task)
            signals.answered(answer(path=0), plan, b"")  # it was in flight
        series = [s for family in metrics.registry.collect() for s in family.samples]
        named = {s.labels["task"] for s in series if "task" in s.labels}

        assert named == {OTHER}


def test_beyond_the_cap_a_server_counts_tasks_together(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    with open_app(task_series=2) as http:
        for number in range(4):
            bundle = make(task=f"t{number}", threshold=NEVER)[1]
            http.put(f"/v1/tasks/t{number}/versions/1", content=bundle).raise_for_status()
            classify(http, image, model=f"t{number}")
        text = http.get("/metrics").text
        together = value(
            http, "medley_bundle_resident", task=OTHER, version=OTHER, tier="device", pinned="false"
        )
        folded = value(http, "medley_folded_tasks")
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]

    assert {s.labels["task"] for s in samples if "task" in s.labels} == {"t0", "t1", OTHER}
    assert (together, folded) == (2, 2)


def test_a_client_that_leaves_is_counted_once_as_such(
    server: ServerProcess, http: httpx.Client
) -> None:
    def gone() -> float:
        labels = {"operation": "POST /v1/classify", "status": "499"}
        return value(http, "medley_requests_total", **labels)

    before, url = gone(), httpx.URL(server.url)
    with socket.create_connection((url.host, url.port or 80)) as raw:
        raw.sendall(
            b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
            b"Content-Length: 1000\r\n\r\nhalf"
        )

    assert any(gone() == before + 1 for _ in range(1000))
    assert gone() == before + 1


def test_requests_are_counted_exactly_once_each(open_app: OpenApp, image: bytes) -> None:
    def counted(http: httpx.Client) -> float:
        return sum(
            sample.value
            for family in text_string_to_metric_families(http.get("/metrics").text)
            for sample in family.samples
            if sample.name == "medley_requests_total"
        )

    with open_app() as http:
        counts = []
        asks: list[Callable[[], object]] = [
            lambda: http.get("/readyz"),
            lambda: http.get("/nowhere"),
            lambda: http.post("/v1/classify", content=b"", headers=PNG),
            lambda: http.post("/v1/classify", json={"images": []}),
            lambda: http.delete("/v1/tasks/none"),
        ]
        for ask in asks:
            counts.append(counted(http))
            ask()
        counts.append(counted(http))

    assert [after - before for before, after in pairwise(counts)] == [2] * 5, "itself and a scrape"


def test_problems_are_counted_by_code_of_requests_and_of_single_images(
    open_app: OpenApp, image: bytes
) -> None:
    with open_app() as http:
        files = [("file", image), ("file", b"no image"), ("file", b"")]
        http.post("/v1/classify", files=files, data={"labels": ["rose"]}).raise_for_status()
        http.post("/v1/classify", content=b"no image", headers=PNG, params={"labels": "rose"})
        http.get("/v1/tasks/none")
        found = {
            code: value(http, "medley_problems_total", code=code)
            for code in ("not_an_image", "empty", "unknown_task")
        }

    assert found == {"not_an_image": 2, "empty": 1, "unknown_task": 1}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def live() -> Live:
    return Live(unload=lambda path: None)


@pytest.fixture
def signals(live: Live, metrics: Metrics, tmp_path_factory: pytest.TempPathFactory) -> Signals:
    folder = tmp_path_factory.mktemp("unclaimed")
    reservoir = Reservoir(folder, images=0, max_bytes=1, metrics=metrics)
    return Signals(live=live, metrics=metrics, reservoir=reservoir)


def answer(*, path: int = -1) -> Answer:
    return Answer(
        path=path,
        features_E=zeros(1),
        scores={0: 0.5},
        accepted={0: True},
        queue_s=0.0,
        forward_s=0.1,
        batch_images=1,
        batch_rows=1,
    )


def record_of(task: str) -> VersionRecord:
    return VersionRecord(task, "1", f"sha256:{task}", "2026-01-01T00:00:00Z")


def desired_with(*tasks: str) -> Desired:
    return Desired(1, "", tuple(map(record_of, tasks)), {task: {"live": "1"} for task in tasks})


def resident_of(task: str) -> Resident:
    labels = LabelSet("task", ("x",), zeros(1, 2))
    return Resident(record_of(task), 0, ("a {}",), labels, labels, threshold=1.0)
