"""`/v1/tasks`: what is taken in, what is refused, and who may change anything; over HTTP."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save

from medley import sealed
from tests.models import tiny_backbone
from tests.service.conftest import MakeBundle, OpenApp, ServerProcess
from tests.service.test_classify import classify


def put(http: httpx.Client, data: bytes, task: str = "pets", version: str = "1") -> httpx.Response:
    return http.put(f"/v1/tasks/{task}/versions/{version}", content=data)


def test_a_task_is_registered_listed_and_deleted(
    http: httpx.Client, make: MakeBundle, image: bytes
) -> None:
    bundle, data = make(task="listed")

    created = put(http, data, "listed")

    assert created.status_code == 201
    assert created.json() == http.get("/v1/tasks/listed").json() | {"warnings": []}
    assert created.json()["live"] == "1"
    assert created.json()["class_names"] == ["cat", "dog", "hamster"]
    (version,) = created.json()["versions"]
    assert (version["digest"], version["state"]) == (bundle.digest, "live")
    assert "listed" in [task["task"] for task in http.get("/v1/tasks").json()["tasks"]]
    (result,) = classify(http, image, model="listed", labels=None).json()["results"]
    assert result["path"]["digest"] == bundle.digest

    assert http.delete("/v1/tasks/listed").status_code == 204
    assert http.get("/v1/tasks/listed").json()["code"] == "unknown_task"
    assert classify(http, image, model="listed").status_code == 404


def test_the_same_bundle_again_changes_nothing(http: httpx.Client, make: MakeBundle) -> None:
    data = make(task="again")[1]
    first = put(http, data, "again")
    second = put(http, data, "again")

    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() == second.json()


def test_a_version_that_exists_with_another_digest_is_a_conflict(
    http: httpx.Client, make: MakeBundle
) -> None:
    first = put(http, make(task="conflict")[1], "conflict")
    response = put(http, make(task="conflict", seed=5)[1], "conflict")

    assert (response.status_code, response.json()["code"]) == (409, "version_exists")
    assert http.get("/v1/tasks/conflict").json()["versions"] == first.json()["versions"]


def test_a_version_can_wait_and_be_made_live_and_rolled_back(
    http: httpx.Client, make: MakeBundle, image: bytes
) -> None:
    put(http, make(task="staged")[1], "staged")
    waiting = http.put(
        "/v1/tasks/staged/versions/2?activate=false",
        content=make(task="staged", version="2", seed=2)[1],
    )

    def answered(model: str = "staged") -> str:
        (result,) = classify(http, image, model=model, labels=None).json()["results"]
        return result["path"]["version"]

    assert (waiting.json()["live"], answered(), answered("staged@2")) == ("1", "1", "2")
    assert http.put("/v1/tasks/staged/aliases/live", json={"version": "2"}).json()["live"] == "2"
    assert (answered(), answered("staged@1")) == ("2", "1")
    assert http.delete("/v1/tasks/staged/versions/2").json()["code"] == "version_live"
    assert http.post("/v1/tasks/staged:rollback").json()["live"] == "1"
    assert answered() == "1"
    last = http.post("/v1/tasks/staged:rollback")
    assert (last.status_code, last.json()["code"]) == (409, "no_earlier_version")
    assert http.delete("/v1/tasks/staged/versions/2").status_code == 204
    assert classify(http, image, model="staged@2").json()["code"] == "unknown_version"


def test_a_task_without_a_live_version_answers_by_version_only(
    http: httpx.Client, make: MakeBundle, image: bytes
) -> None:
    data = make(task="hidden")[1]
    http.put("/v1/tasks/hidden/versions/1?activate=false", content=data)

    assert classify(http, image, model="hidden").json()["code"] == "no_live_version"
    assert classify(http, image, model="hidden@1").status_code == 200
    assert classify(http, image, model="hidden@").json()["code"] == "unknown_version"
    assert put(http, data, "hidden").json()["live"] == "1"
    http.delete("/v1/tasks/hidden")


def resealed(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """Change tensors and seal the file anew, as a careless or a hostile maker would."""

    def changed(data: bytes) -> bytes:
        file = sealed.unpack(data)
        change(file.tensors)
        body = {k: v for k, v in json.loads(file.text).items() if k != "seal"}
        return sealed.pack(json.dumps(body), file.tensors)

    return changed


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda data: b"", "not_safetensors"),
        (lambda data: b"no safetensors", "not_safetensors"),
        (lambda data: data[:7], "not_safetensors"),
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[:-1], "truncated"),
        (lambda data: data + b"\0", "damaged"),
        (lambda data: flipped(data, 3), "not_safetensors"),
        (lambda data: flipped(data, 60), "damaged"),
        (lambda data: flipped(data, 400), "damaged"),
        (lambda data: flipped(data, len(data) // 2), "damaged"),
        (lambda data: flipped(data, len(data) - 1), "damaged"),
        (lambda data: save({"x": torch.zeros(2)}), "not_a_bundle"),
        (resealed(lambda t: t.pop("class_text_features")), "bundle_invalid"),
        (resealed(lambda t: t.update(extra=torch.zeros(1))), "bundle_invalid"),
        (resealed(lambda t: t.update(class_text_features=torch.zeros(2, 2))), "bundle_invalid"),
        (resealed(lambda t: t["class_text_features"].fill_(torch.nan)), "bundle_invalid"),
        (resealed(lambda t: t["vision.0.experts.up"].fill_(torch.inf)), "bundle_invalid"),
    ],
)
def test_a_damaged_bundle_is_refused_with_what_is_wrong(
    http: httpx.Client, make: MakeBundle, spoil: Callable[[bytes], bytes], code: str
) -> None:
    before = http.get("/v1/tasks").json()

    response = put(http, spoil(make(task="spoilt")[1]), "spoilt")

    assert (response.status_code, response.json()["code"]) == (422, code)
    assert response.json()["problems"]
    assert http.get("/v1/tasks").json() == before
    assert http.get("/readyz").status_code == 200


def test_a_bundle_for_another_backbone_is_refused(http: httpx.Client, make: MakeBundle) -> None:
    response = put(http, make(task="foreign", backbone=tiny_backbone(seed=9))[1], "foreign")

    assert (response.status_code, response.json()["code"]) == (422, "wrong_backbone")
    assert any("fingerprint" in problem for problem in response.json()["problems"])


def test_a_bundle_that_answers_otherwise_than_promised_is_refused(
    http: httpx.Client, make: MakeBundle
) -> None:
    response = put(http, make(task="liar", self_test_error=0.01)[1], "liar")

    assert (response.status_code, response.json()["code"]) == (422, "self_test_failed")
    assert http.get("/v1/tasks/liar").status_code == 404


@pytest.mark.parametrize("feature", ["block9:mean", "stem:mean"])
def test_a_bundle_whose_selector_looks_at_what_is_not_there_is_refused(
    http: httpx.Client, make: MakeBundle, feature: str
) -> None:
    response = put(http, make(task="blind", feature=feature)[1], "blind")

    assert response.status_code == 422, response.text
    assert response.json()["problems"]


def test_a_bundle_under_another_name_is_refused(http: httpx.Client, make: MakeBundle) -> None:
    data = make(task="named")[1]

    for task, version in (("other", "1"), ("named", "2")):
        response = put(http, data, task, version)
        assert (response.status_code, response.json()["code"]) == (422, "name_mismatch")


@pytest.mark.parametrize("task", ["auto", "base"])
def test_a_task_cannot_take_a_reserved_name(
    http: httpx.Client, make: MakeBundle, task: str
) -> None:
    response = put(http, make(task=task)[1], task)

    assert (response.status_code, response.json()["code"]) == (422, "reserved_name")


def test_a_bundle_over_the_limit_is_refused_and_leaves_nothing(
    open_app: OpenApp, make: MakeBundle, tmp_path: object
) -> None:
    with open_app(max_bundle_bytes=1000) as http:
        response = put(http, make()[1])
        assert (response.status_code, response.json()["code"]) == (413, "too_large")
        assert http.get("/v1/tasks").json()["tasks"] == []


def test_a_task_that_finds_no_slot_disturbs_nothing(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    with open_app(paths=1) as http:
        put(http, make()[1])
        before = classify(http, image, labels=None).json()["results"]
        response = put(http, make(task="more", seed=3)[1], "more")

        assert (response.status_code, response.json()["code"]) == (507, "no_slot")
        assert classify(http, image, labels=None).json()["results"] == before
        http.delete("/v1/tasks/pets")
        assert put(http, make(task="more", seed=3)[1], "more").status_code == 201


def test_the_same_version_registered_by_many_at_once_is_created_once(
    server: ServerProcess, make: MakeBundle
) -> None:
    data = make(task="many")[1]

    def register(_: int) -> int:
        with server.client() as http:
            return put(http, data, "many").status_code

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(register, range(6))) == [200] * 5 + [201]
    with server.client() as http:
        assert len(http.get("/v1/tasks/many").json()["versions"]) == 1


def test_different_bundles_under_one_version_leave_one_winner(
    server: ServerProcess, make: MakeBundle
) -> None:
    made = [make(task="race", seed=seed) for seed in range(4)]

    def register(data: bytes) -> int:
        with server.client() as http:
            return put(http, data, "race").status_code

    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(register, [data for _, data in made]))
    assert sorted(statuses) == [201, 409, 409, 409]
    winner = made[statuses.index(201)][0]
    with server.client() as http:
        (version,) = http.get("/v1/tasks/race").json()["versions"]
    assert version["digest"] == winner.digest


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("DELETE", "/v1/tasks/nobody", 404, "unknown_task"),
        ("DELETE", "/v1/tasks/nobody/versions/1", 404, "unknown_task"),
        ("POST", "/v1/tasks/nobody:rollback", 404, "unknown_task"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("DELETE", "/v1/classify", 405, "method_not_allowed"),
        ("PUT", "/v1/tasks/nobody/versions/1?activate=perhaps", 422, "invalid_request"),
        ("PUT", "/v1/tasks/nobody/aliases/live", 422, "invalid_request"),
    ],
)
def test_every_error_is_a_problem(
    http: httpx.Client, method: str, path: str, status: int, code: str
) -> None:
    response = http.request(method, path)

    assert (response.status_code, response.json()["code"]) == (status, code)
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["instance"].endswith(response.headers["x-request-id"])


def test_live_takes_only_a_version(http: httpx.Client) -> None:
    bodies: list[Any] = [{}, {"version": 1}, {"version": "1", "more": 1}, [], "1"]
    for body in bodies:
        assert http.put("/v1/tasks/nobody/aliases/live", json=body).status_code == 422
    assert http.put("/v1/tasks/nobody/aliases/live", json={"version": "1"}).status_code == 404


def test_the_key_opens_every_change(open_app: OpenApp, make: MakeBundle) -> None:
    with open_app(admin_key="s3cret", host="0.0.0.0") as http:
        http.headers["authorization"] = "Bearer s3cret"
        assert put(http, make()[1]).status_code == 201
        assert http.delete("/v1/tasks/pets").status_code == 204
