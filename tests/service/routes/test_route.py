"""`POST /v1/route`: what a classification would do, and that it does nothing else."""

import re
from typing import Any

import httpx
import pytest

from tests.service.conftest import MakeBundle, OpenApp
from tests.service.made import image_bytes
from tests.service.routes.test_classify import b64, classify

NEVER = -1e9  # a threshold that no image meets
TASKS: dict[str, dict[str, Any]] = {
    "pets": {"class_names": ("cat", "dog")},
    "tools": {"class_names": ("hammer", "saw"), "seed": 1},
    "birds": {"class_names": ("owl", "crow"), "seed": 2, "threshold": NEVER},
}


def serve(http: httpx.Client, make: MakeBundle, **tasks: dict[str, Any]) -> None:
    for task, fields in tasks.items():
        data = make(task=task, **fields)[1]
        assert http.put(f"/v1/tasks/{task}/versions/1", content=data).status_code == 201


def decide(http: httpx.Client, image: bytes, **fields: object) -> dict[str, Any]:
    body = {"image": {"bytes_b64": b64(image)}} | fields
    response = http.post("/v1/route", json=body)
    assert response.status_code == 200, response.text
    (result,) = response.json()["results"]
    return dict(result)


def test_a_decision_is_what_a_classification_then_does(open_app: OpenApp, make: MakeBundle) -> None:
    asked: list[dict[str, object]] = [
        {},
        {"labels": ["cat"]},
        {"labels": ["saw", "hammer"]},
        {"labels": ["owl", "crow"]},
        {"labels": ["cat", "saw"]},
        {"model": "base"},
        {"model": "birds"},
        {"model": "pets@1"},
    ]
    with open_app() as http:
        serve(http, make, **TASKS)
        for fields in asked:
            for seed in range(3):
                image = image_bytes(seed)
                decision = decide(http, image, **fields)
                done = classify(http, image, **({"labels": None, "explain": True} | fields))
                (result,) = done.json()["results"]
                assert decision["path"] == result["path"]
                assert decision["routed_by"] == result["routed_by"]
                for task, score in decision["scores"].items():
                    extra = {"margin": score.get("margin"), "eligible": score["eligible"]}
                    assert score == result["scores"][task] | {
                        k: v for k, v in extra.items() if v is not None
                    }


def test_the_most_familiar_of_the_tasks_that_may_answer_is_chosen(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    with open_app() as http:
        serve(http, make, **TASKS)
        decision = decide(http, image)
        limited = decide(http, image, labels=["hammer"])

    scores = decision["scores"]
    assert scores.keys() == TASKS.keys()
    accepted = {task: s["score"] for task, s in scores.items() if s["accepted"]}
    assert accepted.keys() == {"pets", "tools"}
    assert decision["path"]["task"] == min(accepted, key=lambda task: accepted[task])
    assert {t for t, s in limited["scores"].items() if s["eligible"]} == {"tools"}
    assert limited["path"]["task"] == "tools"
    birds = scores["birds"]
    assert birds["margin"] == pytest.approx(birds["threshold"] - birds["score"])
    assert "margin" not in scores["pets"]  # it accepts whatever comes: no threshold to compare with


def test_no_task_is_zero_shot_and_needs_no_labels(open_app: OpenApp, image: bytes) -> None:
    with open_app() as http:
        assert decide(http, image) == {
            "path": {"kind": "zero_shot"},
            "routed_by": "auto",
            "scores": {},
        }


def test_a_decision_is_not_counted_as_one_that_was_carried_out(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    with open_app() as http:
        serve(http, make, pets=TASKS["pets"])
        decide(http, image)
        metrics = http.get("/metrics").text

    assert not re.search(r"^medley_router_decisions_total\{.*\} [1-9]", metrics, re.MULTILINE)
    assert not re.search(r'^medley_images_total\{.*task="pets"', metrics, re.MULTILINE)


def test_all_three_forms_and_single_errors_are_those_of_a_classification(
    http: httpx.Client, image: bytes
) -> None:
    as_json = http.post("/v1/route", json={"image": {"bytes_b64": b64(image)}})
    as_form = http.post("/v1/route", files={"file": image})
    as_raw = http.post("/v1/route", content=image, headers={"content-type": "image/png"})
    assert as_json.json()["results"] == as_form.json()["results"] == as_raw.json()["results"]

    some = http.post(
        "/v1/route", json={"images": [{"bytes_b64": text} for text in (b64(image), "?")]}
    )
    assert some.status_code == 200
    assert some.json()["results"][1]["error"]["code"] == "bad_base64"
    alone = http.post("/v1/route", content=b"x", headers={"content-type": "image/png"})
    assert (alone.status_code, alone.json()["code"]) == (415, "not_an_image")
    unknown = http.post("/v1/route", files={"file": image}, data={"model": "nobody"})
    assert unknown.json()["code"] == "unknown_task"
    assert http.post("/v1/route?surprise=1", files={"file": image}).status_code == 422
