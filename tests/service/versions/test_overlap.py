"""A registration warns of tasks that would take each other's images, and never refuses for it."""

from __future__ import annotations

import math

import pytest

from service.versions import overlap
from tests.service.conftest import MakeBundle, OpenApp

NEVER = -1e9  # a threshold that refuses every image


def test_two_tasks_that_accept_everything_are_told_apart_and_warned_of(
    open_app: OpenApp, make: MakeBundle
) -> None:
    """Both accept all: each image goes to whom it is most familiar, and the sums say so."""
    with open_app() as http:
        first = http.put("/v1/tasks/pets/versions/1", content=make(task="pets")[1])
        second = http.put("/v1/tasks/tools/versions/1", content=make(task="tools", seed=1)[1])
        counted = http.get("/metrics").text

    assert first.json()["warnings"] == []
    assert second.status_code == 201
    warnings = second.json()["warnings"]
    assert warnings
    assert all("of task pets" in text or text.startswith("task pets takes") for text in warnings)
    assert f"medley_overlap_warnings_total {len(warnings)}.0" in counted


def test_who_refuses_everything_takes_nothing(open_app: OpenApp, make: MakeBundle) -> None:
    with open_app() as http:
        http.put(
            "/v1/tasks/pets/versions/1", content=make(task="pets", threshold=NEVER)[1]
        ).raise_for_status()
        answer = http.put(
            "/v1/tasks/tools/versions/1", content=make(task="tools", seed=1, threshold=NEVER)[1]
        )

    assert answer.json()["warnings"] == []


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (math.inf, NEVER, "task pets takes 2 of its 2 self-test images"),
        (NEVER, math.inf, "it takes 2 of 2 self-test images of task pets"),
    ],
)
def test_a_warning_says_who_takes_how_many(
    open_app: OpenApp, make: MakeBundle, old: float, new: float, text: str
) -> None:
    with open_app() as http:
        http.put("/v1/tasks/pets/versions/1", content=make(task="pets", threshold=old)[1])
        bundle = make(task="tools", seed=1, threshold=new)[1]
        answer = http.put("/v1/tasks/tools/versions/1", content=bundle)

    assert answer.json()["warnings"] == [text]


def test_it_warns_before_a_version_is_live_and_versions_of_one_task_are_no_overlap(
    open_app: OpenApp, make: MakeBundle
) -> None:
    with open_app() as http:
        http.put("/v1/tasks/pets/versions/1", content=make(task="pets")[1])
        same = http.put("/v1/tasks/pets/versions/2", content=make(task="pets", version="2")[1])
        http.put("/v1/tasks/pets/aliases/live", json={"version": "1"}).raise_for_status()
        bundle = make(task="tools", seed=1, threshold=NEVER)[1]
        answer = http.put("/v1/tasks/tools/versions/1?activate=false", content=bundle)

    assert same.json()["warnings"] == []
    assert answer.json()["live"] is None
    assert answer.json()["warnings"] == ["task pets takes 2 of its 2 self-test images"]


def test_an_operation_has_the_warnings_too(open_app: OpenApp, make: MakeBundle) -> None:
    with open_app() as http:
        http.put("/v1/tasks/pets/versions/1", content=make(task="pets")[1])
        bundle = make(task="tools", seed=1, threshold=NEVER)[1]
        http.put("/v1/tasks/tools/versions/1", content=bundle)
        latest = http.get("/v1/operations").json()["operations"][0]

    assert latest["warnings"] == ["task pets takes 2 of its 2 self-test images"]


def test_what_is_not_known_in_time_is_no_warning_and_no_error(
    open_app: OpenApp, make: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "LONGEST_S", 0.0)
    with open_app() as http:
        http.put("/v1/tasks/pets/versions/1", content=make(task="pets")[1])
        answer = http.put("/v1/tasks/tools/versions/1", content=make(task="tools", seed=1)[1])

    assert answer.status_code == 201
    assert answer.json()["warnings"] == []
