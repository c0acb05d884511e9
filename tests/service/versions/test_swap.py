"""Answers while tasks come and go: no error, no wrong version, no neighbour's influence."""

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
from fastapi import FastAPI

from tests.service.conftest import MakeBundle, OpenApp, ServerProcess
from tests.service.made import image_bytes
from tests.service.routes.test_classify import b64, classify
from tests.service.versions.test_tasks import put


@contextmanager
def asking(
    server: ServerProcess, ask: Callable[[httpx.Client], httpx.Response], *, clients: int = 1
) -> Iterator[list[list[httpx.Response]]]:
    """Ask in a loop from several clients; at least once before the block and once after it."""
    answers: list[list[httpx.Response]] = [[] for _ in range(clients)]
    stop = threading.Event()
    asked = threading.Barrier(clients + 1)

    def loop(own: list[httpx.Response]) -> None:
        with server.client() as http:
            own.append(ask(http))
            asked.wait()
            while not stop.is_set():
                own.append(ask(http))
            own.append(ask(http))

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(loop, own) for own in answers]
        asked.wait()
        try:
            yield answers
        finally:
            stop.set()
        for one in running:
            one.result()


def test_answers_flip_once_from_zero_shot_to_the_task_while_it_is_registered(
    server: ServerProcess, http: httpx.Client, make: MakeBundle, image: bytes
) -> None:
    names = ("flip one", "flip two")
    data = make(task="flip", class_names=names)[1]

    with asking(server, lambda client: classify(client, image, labels=names)) as (answers,):
        assert put(http, data, "flip").status_code == 201

    assert {answer.status_code for answer in answers} == {200}
    kinds = [answer.json()["results"][0]["path"]["kind"] for answer in answers]
    assert [kind for kind, _ in itertools.groupby(kinds)] == ["zero_shot", "task"]
    by_kind = {k: a.json()["results"] for k, a in zip(kinds, answers, strict=True)}
    for kind, answer in zip(kinds, answers, strict=True):
        assert answer.json()["results"] == by_kind[kind]


def test_every_answer_under_many_swaps_is_exactly_that_of_the_version_it_names(
    server: ServerProcess, http: httpx.Client, make: MakeBundle, image: bytes
) -> None:
    first, second = (make(task="swap", version=v, seed=int(v))[1] for v in "12")
    put(http, first, "swap", "1")
    put(http, second, "swap", "2")
    expected = {
        version: classify(http, image, model=f"swap@{version}", labels=None).json()["results"]
        for version in "12"
    }

    def ask(client: httpx.Client) -> httpx.Response:
        return classify(client, image, model="swap", labels=None)

    with asking(server, ask, clients=3) as answers:
        for _ in range(6):
            http.put("/v1/tasks/swap/aliases/live", json={"version": "1"}).raise_for_status()
            http.delete("/v1/tasks/swap/versions/2").raise_for_status()
            put(http, second, "swap", "2").raise_for_status()
            http.post("/v1/tasks/swap:rollback").raise_for_status()

    seen = set()
    for answer in itertools.chain(*answers):
        assert answer.status_code == 200
        version = answer.json()["results"][0]["path"]["version"]
        seen.add(version)
        assert answer.json()["results"] == expected[version]
    assert seen == {"1", "2"}


def test_more_versions_than_there_is_room_for_answer_each_as_itself(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    """Four versions, room for three of which one is live: clients push each other's out."""
    with open_app(paths=3) as http, ThreadPoolExecutor(4) as pool:
        expected = {}
        for version in "1234":
            data = make(task="crowd", version=version, seed=int(version))[1]
            query = "?activate=false" if version > "1" else ""
            http.put(f"/v1/tasks/crowd/versions/{version}{query}", content=data).raise_for_status()
            answer = classify(http, image, model=f"crowd@{version}", labels=None)
            expected[version] = answer.json()["results"]

        def ask(version: str) -> httpx.Response:
            return classify(http, image, model=f"crowd@{version}", labels=None)

        asked = "1234" * 8
        answers = list(pool.map(ask, asked))
        metrics = http.get("/metrics").text

    for version, answer in zip(asked, answers, strict=True):
        assert answer.status_code == 200, answer.text
        assert answer.json()["results"] == expected[version]
    assert value_of(metrics, "medley_bundle_evictions_total ") > 4


def test_a_version_that_has_left_the_device_is_rolled_back_to(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    with open_app(paths=2) as http:
        for version in "12":
            put(http, make(task="back", version=version, seed=int(version))[1], "back", version)
        other = make(task="guest", seed=5)[1]
        hidden = http.put("/v1/tasks/guest/versions/1?activate=false", content=other)
        assert hidden.status_code == 201, hidden.text
        assert 'task="back",tier="host",version="1"' in http.get("/metrics").text

        http.post("/v1/tasks/back:rollback").raise_for_status()
        (result,) = classify(http, image, model="back", labels=None).json()["results"]

        assert result["path"]["version"] == "1"
        assert 'task="guest",tier="host",version="1"' in http.get("/metrics").text


def test_a_new_task_does_not_change_an_older_one_by_a_bit(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    with open_app() as http:
        put(http, make()[1])
        before = classify(http, image, model="pets", labels=None).json()["results"]
        for n in range(4):
            name = f"more-{n}"
            put(http, make(task=name, seed=10 + n)[1], name).raise_for_status()
        after = classify(http, image, model="pets", labels=None).json()["results"]

    assert after == before


def test_a_server_of_another_precision_and_several_buckets_serves_the_same_bundles(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    answers = []
    others: dict[str, object] = {"precision": "bf16", "buckets": "1,2,8"}
    for fields in ({}, others):
        with open_app(**fields) as http:
            put(http, make()[1]).raise_for_status()
            (result,) = classify(http, image, model="pets", labels=None).json()["results"]
            http.delete("/v1/tasks/pets").raise_for_status()
        answers.append(result["label"])

    assert answers[0] == answers[1]


def test_neighbours_in_a_batch_do_not_matter(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    """One request of several images and many concurrent ones make mixed batches."""
    models = ["pets", "tools", "base"]
    others = [{"bytes_b64": b64(image_bytes(seed=s))} for s in (5, 6)]
    with open_app(max_wait_ms=20) as http:
        put(http, make()[1])
        put(http, make(task="tools", seed=1)[1], "tools")

        def ask(model: str) -> object:
            return classify(http, image, model=model, labels=["x", "y"]).json()["results"][0]

        alone = {model: ask(model) for model in models}
        several = classify(
            http,
            b"",
            image=None,
            images=[*others, {"bytes_b64": b64(image)}],
            model="pets",
            labels=["x", "y"],
        )
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(ask, models * 4))
        metrics = http.get("/metrics").text

    assert several.json()["results"][2] == alone["pets"]
    assert together == [alone[model] for model in models * 4]
    alike = 'medley_batch_distinct_tasks_bucket{le="1.0"} '
    total = "medley_batch_distinct_tasks_count "
    assert value_of(metrics, alike) < value_of(metrics, total), "no batch was mixed"


def value_of(metrics: str, name: str) -> float:
    return next(float(li.removeprefix(name)) for li in metrics.splitlines() if li.startswith(name))


def test_more_images_than_may_wait_are_told_to_come_again(open_app: OpenApp, image: bytes) -> None:
    with (
        open_app(queue_limit=2, max_images=2, max_wait_ms=0) as http,
        ThreadPoolExecutor(16) as pool,
    ):
        answers = list(pool.map(lambda _: classify(http, image), range(64)))

    statuses = {answer.status_code for answer in answers}
    assert statuses <= {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["code"] == "queue_full"


def test_an_engine_that_has_ended_is_neither_ready_nor_alive(
    open_app: OpenApp, image: bytes
) -> None:
    with open_app() as http:
        assert http.get("/livez").status_code == 200
        app: FastAPI = http.app  # type: ignore[attr-defined]
        app.state.service.engine.stop()

        assert http.get("/livez").json()["code"] == "engine_dead"
        assert http.get("/readyz").json()["code"] == "not_ready"
        assert classify(http, image).json()["code"] == "draining"
