"""A candidate beside the live version: who answers, what is counted, when it is taken out."""

import asyncio
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from medley.classifier import Ask
from service.answers.engine import Answer
from service.answers.planning import Plan, make_plan
from service.answers.rollouts import Rollouts, takes
from service.errors import EngineError
from service.registry.desired import Desired, VersionRecord
from service.signals.metrics import Metrics
from service.versions.live import LabelSet, Live, Resident, Snapshot
from service.wire.rollout_schemas import Rollout, RolloutRecord
from tests.service.conftest import MakeBundle, OpenApp
from tests.service.made import image_bytes
from tests.service.routes.test_classify import b64, classify
from tests.service.versions.test_swap import value_of
from tests.service.versions.test_tasks import put

ALIKE, OTHER = 0, 7  # seeds of the candidate's weights: the live version's, and others


@contextmanager
def tried(
    open_app: OpenApp, make: MakeBundle, *, seed: int, **rollout: object
) -> Iterator[httpx.Client]:
    """A server with pets@1 live and pets@2 as candidate."""
    with open_app() as http:
        put(http, make()[1])
        data = make(version="2", seed=seed)[1]
        http.put("/v1/tasks/pets/versions/2?activate=false", content=data).raise_for_status()
        start(http, **rollout).raise_for_status()
        yield http


def start(http: httpx.Client, **rollout: object) -> httpx.Response:
    return http.put("/v1/tasks/pets/rollout", json={"version": "2", "share": 1.0} | rollout)


def standing(http: httpx.Client) -> dict[str, object]:
    answer: dict[str, object] = http.get("/v1/tasks/pets/rollout").json()
    return answer


def versions(http: httpx.Client, count: int, model: str = "pets") -> list[str]:
    images = [{"bytes_b64": b64(image_bytes(seed=seed))} for seed in range(count)]
    answer = classify(http, b"", image=None, images=images, model=model, labels=None)
    assert answer.status_code == 200
    return [result["path"]["version"] for result in answer.json()["results"]]


def until(http: httpx.Client, **expected: object) -> dict[str, object]:
    """The rollout as soon as it stands so; a shadow is compared after the answer has gone."""
    for _ in range(1000):
        now = standing(http)
        if {key: now[key] for key in expected} == expected:
            return now
    raise AssertionError(f"{now} never became {expected}")


@pytest.mark.parametrize("model", ["pets", "auto"])
def test_a_shadow_computes_and_the_live_version_answers(
    open_app: OpenApp, make: MakeBundle, model: str
) -> None:
    with tried(open_app, make, seed=ALIKE) as http:
        assert versions(http, 8, model) == ["1"] * 8
        until(http, same=8, different=0, errors=0, stopped=None)
        metrics = http.get("/metrics").text

    assert value_of(metrics, 'medley_rollout_images_total{result="same",task="pets"} ') == 8
    assert value_of(metrics, 'medley_rollout_acceptance_total{accepted="both",task="pets"} ') == 8


@pytest.mark.parametrize("model", ["pets", "auto"])
def test_a_canary_answers_its_share_and_the_same_images_each_time(
    open_app: OpenApp, make: MakeBundle, model: str
) -> None:
    with tried(open_app, make, seed=ALIKE, mode="canary", share=0.5) as http:
        first, second = versions(http, 24, model), versions(http, 24, model)

        assert first == second
        assert set(first) == {"1", "2"}
        assert standing(http)["same"] == 2 * first.count("2")


def test_both_versions_of_an_image_meet_in_one_batch(open_app: OpenApp, make: MakeBundle) -> None:
    with tried(open_app, make, seed=ALIKE, mode="canary") as http:
        before = value_of(http.get("/metrics").text, "medley_batch_distinct_tasks_sum ")
        versions(http, 1)
        after = value_of(http.get("/metrics").text, "medley_batch_distinct_tasks_sum ")

    assert after - before == 2


def test_who_names_a_version_gets_that_one(open_app: OpenApp, make: MakeBundle) -> None:
    with tried(open_app, make, seed=ALIKE, mode="canary") as http:
        assert versions(http, 4, "pets@1") == ["1"] * 4
        assert versions(http, 4, "pets@live") == ["2"] * 4


@pytest.mark.parametrize("mode", ["shadow", "canary"])
def test_a_candidate_that_disagrees_is_taken_out_by_itself(
    open_app: OpenApp, make: MakeBundle, mode: str
) -> None:
    with tried(open_app, make, seed=OTHER, mode=mode, min_images=8, max_disagreement=0.05) as http:
        for _ in range(4):
            versions(http, 8)
        stopped = until(http, live="1")
        while stopped["stopped"] is None:
            stopped = standing(http)

        assert "labels differ" in str(stopped["stopped"])
        assert versions(http, 8) == ["1"] * 8
        metrics = http.get("/metrics").text
        assert value_of(metrics, 'medley_rollout_stops_total{task="pets"} ') == 1
        assert classify(http, image_bytes(), model="pets@2", labels=None).status_code == 200

        again = start(http, mode=mode, min_images=8, max_disagreement=0.05).json()
        assert (again["stopped"], again["same"], again["different"]) == (None, 0, 0)
        for _ in range(4):
            versions(http, 8)
        while standing(http)["stopped"] is None:
            pass


def test_a_rollout_outlives_the_server_and_its_version_stays(
    open_app: OpenApp, make: MakeBundle
) -> None:
    with tried(open_app, make, seed=ALIKE, mode="canary") as http:
        refused = http.delete("/v1/tasks/pets/versions/2")
        assert (refused.status_code, refused.json()["code"]) == (409, "version_in_use")
    with open_app() as http:
        assert versions(http, 4) == ["2"] * 4


def test_a_candidate_is_promoted_or_forgotten(open_app: OpenApp, make: MakeBundle) -> None:
    with tried(open_app, make, seed=ALIKE) as http:
        assert http.delete("/v1/tasks/pets/rollout").status_code == 204
        assert http.get("/v1/tasks/pets/rollout").json()["code"] == "no_rollout"
        assert http.delete("/v1/tasks/pets/rollout").json()["code"] == "no_rollout"
        start(http).raise_for_status()
        promoted = http.post("/v1/tasks/pets/rollout:promote")
        assert promoted.json()["live"] == "2"
        assert versions(http, 2) == ["2", "2"]
        assert http.get("/v1/tasks/pets/rollout").status_code == 404
        assert start(http).json()["code"] == "version_live"
        assert http.post("/v1/tasks/pets:rollback").json()["live"] == "1"


def test_what_cannot_be_tried_is_refused(open_app: OpenApp, make: MakeBundle) -> None:
    with open_app() as http:
        assert start(http).json()["code"] == "unknown_task"
        put(http, make()[1])
        assert start(http).json()["code"] == "unknown_version"
        assert start(http, version="live").json()["code"] == "unknown_version"
        for bad in ({"share": 0}, {"share": 2}, {"mode": "x"}, {"more": 1}, {"min_images": 0}):
            assert start(http, **bad).status_code == 422
        stale = http.put(
            "/v1/tasks/pets/rollout", json={"version": "1"}, headers={"If-Match": '"99"'}
        )
        assert stale.status_code in (409, 412)


@given(st.floats(0.01, 1.0), st.integers(0, 2**31))
def test_a_larger_share_keeps_the_images_of_a_smaller_one(share: float, seed: int) -> None:
    pixels_CHW = torch.randint(
        0, 256, (3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    if takes(Rollout(version="2", share=share), pixels_CHW):
        assert takes(Rollout(version="2", share=min(1.0, share + 0.1)), pixels_CHW)
    assert takes(Rollout(version="2", share=1.0), pixels_CHW)


def test_a_share_is_about_that_share_of_the_images() -> None:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2000, 3, 4, 4), dtype=torch.uint8, generator=random)
    taken = sum(takes(Rollout(version="2", share=0.2), image) for image in images)
    assert abs(taken - 400) < 5 * math.sqrt(2000 * 0.2 * 0.8)  # five standard deviations


class FailingCandidate:
    """Queues images; the candidate's path, 1, fails, or answers with no number."""

    def __init__(self, *, nan: bool) -> None:
        self.nan = nan

    def __call__(self, pixels: object, asks: Sequence[Ask]) -> list[asyncio.Future[Answer]]:
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in asks]
        for ask, future in zip(asks, futures, strict=True):
            value = math.nan if ask.path == 1 and self.nan else 1.0
            if ask.path == 1 and not self.nan:
                future.set_exception(EngineError("the batch failed"))
            else:
                features_E = torch.full((2,), value)
                future.set_result(Answer(ask.path or 0, features_E, {}, {}, 0.0, 0.0, 1, 1))
        return futures


@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("mode", ["shadow", "canary"])
def test_a_candidate_that_fails_costs_no_answer_and_is_taken_out(mode: str, nan: bool) -> None:
    record = RolloutRecord.model_validate(
        {"id": "1", "rollout": {"version": "2", "mode": mode, "share": 1}}
    )
    stopped: list[RolloutRecord] = []

    async def stop(task: str, record: RolloutRecord) -> None:
        stopped.append(record)

    async def ask() -> list[Answer]:
        live = Live(unload=lambda path: None)
        live.publish(two_versions(record))
        rollouts = Rollouts(live, Metrics(), stop=stop)
        plan: Plan = make_plan(live.snapshot, "pets")
        answers = await rollouts.answers([black()], plan, FailingCandidate(nan=nan))
        await rollouts.close()
        return answers

    (answer,) = asyncio.run(ask())
    assert answer.path == 0
    assert [record.stopped for record in stopped] == ["1 images failed, 0 may"]


class FailingTogether(FailingCandidate):
    """A batch with the candidate's row in it fails as a whole."""

    def __call__(self, pixels: object, asks: Sequence[Ask]) -> list[asyncio.Future[Answer]]:
        if all(ask.path != 1 for ask in asks):
            return super().__call__(pixels, asks)
        futures = [asyncio.get_running_loop().create_future() for _ in asks]
        for future in futures:
            future.set_exception(EngineError("the batch failed"))
        return futures


def test_a_candidate_that_fails_the_batch_it_shares_costs_no_answer() -> None:
    record = RolloutRecord.model_validate({"id": "1", "rollout": {"version": "2", "share": 1}})

    async def stop(task: str, record: RolloutRecord) -> None:
        pass

    async def ask() -> tuple[list[Answer], int]:
        live = Live(unload=lambda path: None)
        live.publish(two_versions(record))
        rollouts = Rollouts(live, Metrics(), stop=stop)
        plan = make_plan(live.snapshot, "pets")
        answers = await rollouts.answers([black()], plan, FailingTogether(nan=False))
        await rollouts.close()
        return answers, rollouts.tally("pets", record).error

    answers, errors = asyncio.run(ask())
    assert ([answer.path for answer in answers], errors) == ([0], 1)


def two_versions(record: RolloutRecord) -> Snapshot:
    """pets@1 on path 0 is live, pets@2 on path 1 is tried."""
    labels = LabelSet("task", ("cat", "dog"), torch.eye(2))
    first = VersionRecord("pets", "1", "sha256:1", "2026")
    one = Resident(first, 0, ("{}",), labels, labels, threshold=0.0)
    two = replace(one, record=replace(first, version="2"), path=1)
    desired = Desired(
        1,
        versions=(one.record, two.record),
        aliases={"pets": {"live": "1"}},
        rollouts={"pets": record.model_dump_json()},
    )
    return Snapshot(desired, {("pets", "1"): one, ("pets", "2"): two})


def black() -> Tensor:
    return torch.zeros(3, 4, 4, dtype=torch.uint8)
