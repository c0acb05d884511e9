"""A request that knows of a change is not answered from before it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.service.conftest import MakeBundle, OpenApp, ServerProcess

HEADER = "X-Min-Generation"


@pytest.fixture
def generation(http: httpx.Client, make: MakeBundle) -> int:
    """What the registration of a task was answered with."""
    put = http.put("/v1/tasks/consistent/versions/1", content=make(task="consistent")[1])
    return int(put.headers["X-Registry-Generation"])


def test_a_request_is_answered_from_the_generation_it_asks_for_or_a_later_one(
    http: httpx.Client, generation: int, image: bytes
) -> None:
    headers = {HEADER: str(generation), "Content-Type": "image/png"}

    answer = http.post("/v1/classify?model=consistent", content=image, headers=headers)

    assert answer.status_code == 200
    assert int(answer.headers["X-Registry-Generation"]) >= generation


def test_a_generation_that_is_not_there_in_time_is_behind_and_says_when_to_come_again(
    open_app: OpenApp,
) -> None:
    with open_app(generation_wait_s=0.01) as app:
        answer = app.get("/v1/tasks", headers={HEADER: "7"})

    assert answer.status_code == 503
    assert answer.json()["code"] == "behind"
    assert answer.headers["Retry-After"] == "1"


def test_a_waiting_request_goes_on_once_its_generation_is_served(
    server: ServerProcess, http: httpx.Client, make: MakeBundle
) -> None:
    data = make(task="awaited")[1]
    next_one = int(http.get("/v1/tasks").headers["X-Registry-Generation"]) + 1
    with server.client() as other, ThreadPoolExecutor() as threads:
        waiting = threads.submit(other.get, "/v1/tasks/awaited", headers={HEADER: str(next_one)})
        put = http.put("/v1/tasks/awaited/versions/1", content=data)

        assert put.status_code == 201
        assert waiting.result().status_code == 200


@pytest.mark.parametrize("value", ["", "-1", "soon", "1.5", "1" * 16, "\u0661"])
def test_what_is_no_generation_is_refused(http: httpx.Client, value: str) -> None:
    answer = http.get("/v1/tasks", headers={HEADER.encode(): value.encode()})

    assert answer.status_code == 422
    assert answer.json()["errors"][0]["where"] == f"header.{HEADER}"


def test_probes_do_not_wait(http: httpx.Client) -> None:
    assert http.get("/livez", headers={HEADER: "999999"}).status_code == 200
