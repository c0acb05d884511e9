"""`/v1/tasks`: what is taken in, what is refused, and who may change anything; over HTTP."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save

from medley import sealed
from tests.models import tiny_backbone
from tests.service.conftest import MakeBundle, OpenApp, ServerProcess, StartServer
from tests.service.raw import Raw
from tests.service.routes.test_classify import classify


def put(http: httpx.Client, data: bytes, task: str = "pets", version: str = "1") -> httpx.Response:
    return http.put(f"/v1/tasks/{task}/versions/{version}", content=data)


def without_warnings(registered: httpx.Response) -> dict[str, Any]:
    """An answer but for what it says of other tests' tasks, which accept every image."""
    return {key: value for key, value in registered.json().items() if key != "warnings"}


def test_a_task_is_registered_listed_and_deleted(
    http: httpx.Client, make: MakeBundle, image: bytes
) -> None:
    bundle, data = make(task="listed")

    created = put(http, data, "listed")

    assert created.status_code == 201
    assert without_warnings(created) == http.get("/v1/tasks/listed").json()
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
    assert without_warnings(first) == without_warnings(second)


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

    for task, version in (("another", "1"), ("named", "2")):
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
        ("PUT", "/v1/tasks/nobody/versions/1?wait=-1", 422, "invalid_request"),
        ("PUT", "/v1/tasks/nobody/aliases/live", 415, "unsupported_media_type"),
        ("PUT", "/v1/tasks/nobody/aliases/-", 422, "invalid_request"),
        ("DELETE", "/v1/tasks/nobody/aliases/live", 404, "unknown_task"),
        ("PUT", "/v1/tasks/nobody/versions/1/pin", 404, "unknown_task"),
        ("DELETE", "/v1/tasks/nobody/versions/1/pin", 404, "unknown_task"),
        ("GET", "/v1/operations/none", 404, "unknown_operation"),
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


def alias(http: httpx.Client, task: str, name: str, version: str, **headers: str) -> httpx.Response:
    path, body = f"/v1/tasks/{task}/aliases/{name}", {"version": version}
    return http.put(path, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})


def two_versions(http: httpx.Client, make: MakeBundle, task: str) -> None:
    """Registers 1 and 2; 2 is live."""
    for version in "12":
        data = make(task=task, version=version, seed=int(version))[1]
        put(http, data, task, version).raise_for_status()


def test_an_alias_is_another_name_of_a_version(
    http: httpx.Client, make: MakeBundle, image: bytes
) -> None:
    two_versions(http, make, "named-twice")
    changed = alias(http, "named-twice", "stable", "1")
    assert changed.status_code == 200
    assert changed.json()["aliases"] == {"live": "2", "stable": "1"}
    assert [v["aliases"] for v in changed.json()["versions"]] == [["stable"], ["live"]]
    (result,) = classify(http, image, model="named-twice@stable").json()["results"]
    assert result["path"]["version"] == "1"

    again = alias(http, "named-twice", "stable", "1")
    assert again.json() == changed.json(), "what is so already is no change"
    refused = http.delete("/v1/tasks/named-twice/versions/1")
    assert (refused.status_code, refused.json()["code"]) == (409, "version_in_use")
    gone = http.delete("/v1/tasks/named-twice/aliases/stable")
    assert gone.json()["aliases"] == {"live": "2"}
    assert http.delete("/v1/tasks/named-twice/aliases/stable").json()["code"] == "unknown_alias"
    assert http.delete("/v1/tasks/named-twice/versions/1").status_code == 204


@pytest.mark.parametrize(
    ("name", "version", "status", "code"),
    [
        ("1", "2", 409, "alias_conflict"),
        ("best", "3", 404, "unknown_version"),
        ("auto", "1", 422, "reserved_name"),
        ("base", "1", 422, "reserved_name"),
        ("-x", "1", 422, "invalid_request"),
        ("x" * 40, "1", 422, "invalid_request"),
    ],
)
def test_an_alias_that_would_confuse_is_refused(
    http: httpx.Client, make: MakeBundle, name: str, version: str, status: int, code: str
) -> None:
    two_versions(http, make, "confused")
    response = alias(http, "confused", name, version)

    assert (response.status_code, response.json()["code"]) == (status, code)


def test_a_version_cannot_take_the_name_of_an_alias(http: httpx.Client, make: MakeBundle) -> None:
    two_versions(http, make, "taken")
    alias(http, "taken", "best", "1").raise_for_status()

    for name in ("best", "live"):
        response = put(http, make(task="taken", version=name)[1], "taken", name)
        assert (response.status_code, response.json()["code"]) == (409, "alias_conflict")


def test_a_task_without_its_live_alias_is_out_of_service_but_not_gone(
    http: httpx.Client, make: MakeBundle, image: bytes
) -> None:
    two_versions(http, make, "paused")
    assert http.delete("/v1/tasks/paused/aliases/live").json()["live"] is None

    assert classify(http, image, model="paused").json()["code"] == "no_live_version"
    assert classify(http, image, model="paused@2").status_code == 200
    assert http.post("/v1/tasks/paused:rollback").json()["code"] == "no_earlier_version"
    assert alias(http, "paused", "live", "1").json()["live"] == "1"


def test_a_version_says_where_it_is_how_large_and_whether_it_is_pinned(
    http: httpx.Client, make: MakeBundle
) -> None:
    data = make(task="told")[1]
    (version,) = put(http, data, "told").json()["versions"]
    assert (version["tier"], version["pinned"], version["size_bytes"]) == (
        "device",
        False,
        len(data),
    )

    pinned = http.put("/v1/tasks/told/versions/1/pin")
    assert pinned.json()["versions"][0]["pinned"] is True
    assert http.put("/v1/tasks/told/versions/1/pin").headers["etag"] == pinned.headers["etag"]
    unpinned = http.delete("/v1/tasks/told/versions/1/pin")
    assert unpinned.json()["versions"][0]["pinned"] is False


def test_who_has_the_newest_state_is_told_so_and_nothing_else(
    http: httpx.Client, make: MakeBundle
) -> None:
    two_versions(http, make, "tagged")
    for path in ("/v1/tasks/tagged", "/v1/tasks"):
        first = http.get(path)
        tag = first.headers["etag"]
        for known in (tag, f"W/{tag}", f'"x", {tag}', "*"):
            second = http.get(path, headers={"If-None-Match": known})
            assert (second.status_code, second.content) == (304, b"")
            assert second.headers["etag"] == tag
        assert http.get(path, headers={"If-None-Match": '"0"'}).json() == first.json()

    tag = http.get("/v1/tasks/tagged").headers["etag"]
    put(http, make(task="tagged-other")[1], "tagged-other").raise_for_status()
    assert http.get("/v1/tasks/tagged").headers["etag"] == tag, "another task is another task"
    assert alias(http, "tagged", "live", "1").headers["etag"] != tag


CHANGES: list[tuple[str, str, dict[str, Any]]] = [
    ("PUT", "/versions/3", {"content": b"never read"}),
    ("PUT", "/aliases/live", {"json": {"version": "1"}}),
    ("PUT", "/aliases/best", {"json": {"version": "1"}}),
    ("DELETE", "/aliases/live", {}),
    ("PUT", "/versions/1/pin", {}),
    ("DELETE", "/versions/1/pin", {}),
    ("POST", ":rollback", {}),
    ("DELETE", "/versions/1", {}),
    ("DELETE", "", {}),
]


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
def test_a_change_by_who_has_not_seen_the_last_one_is_refused(
    http: httpx.Client, make: MakeBundle, method: str, path: str, body: dict[str, Any]
) -> None:
    two_versions(http, make, "seen")
    now = http.get("/v1/tasks/seen").headers["etag"]
    for known in (f'"{int(now[1:-1]) - 1}"', f"W/{now}", '"x"', "", now[1:-1]):
        response = http.request(
            method, f"/v1/tasks/seen{path}", headers={"If-Match": known}, **body
        )
        assert (response.status_code, response.json()["code"]) == (412, "precondition_failed")
    assert http.get("/v1/tasks/seen").headers["etag"] == now

    if path == "/versions/3":
        body = {"content": make(task="seen", version="3")[1]}
    allowed = http.request(
        method, f"/v1/tasks/seen{path}", headers={"If-Match": f'"0", {now}'}, **body
    )
    assert allowed.is_success
    http.delete("/v1/tasks/seen")


def test_a_registration_can_insist_on_being_the_first(http: httpx.Client, make: MakeBundle) -> None:
    url, data = "/v1/tasks/first/versions/1", make(task="first")[1]
    for condition in ("*", '"1"'):
        nobody = http.put(url, content=data, headers={"If-Match": condition})
        assert nobody.json()["code"] == "precondition_failed"
    assert http.put(url, content=data, headers={"If-None-Match": '"1"'}).status_code == 422
    assert http.put(url, content=data, headers={"If-None-Match": "*"}).status_code == 201
    again = http.put(url, content=data, headers={"If-None-Match": "*"})
    assert (again.status_code, again.json()["code"]) == (412, "precondition_failed")
    assert http.put(url, content=data, headers={"If-Match": "*"}).status_code == 200


def test_of_many_who_change_what_they_saw_one_wins(server: ServerProcess, make: MakeBundle) -> None:
    with server.client() as http:
        two_versions(http, make, "contested")
        seen = http.get("/v1/tasks/contested").headers["etag"]

    def change(number: int) -> int:
        with server.client() as http:
            return alias(http, "contested", f"mine-{number}", "1", if_match=seen).status_code

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(change, range(6))) == [200] + [412] * 5


def test_different_versions_of_a_task_at_once_are_all_there(
    server: ServerProcess, make: MakeBundle
) -> None:
    versions = [str(n) for n in range(1, 6)]
    made = {v: make(task="crowd", version=v, seed=int(v))[1] for v in versions}

    def register(version: str) -> int:
        with server.client() as http:
            return put(http, made[version], "crowd", version).status_code

    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(register, versions)) == [201] * 5
    with server.client() as http:
        task = http.get("/v1/tasks/crowd").json()
    assert sorted(v["version"] for v in task["versions"]) == versions
    assert [v["state"] for v in task["versions"]].count("live") == 1


def test_a_task_deleted_while_it_is_registered_is_there_or_not(
    server: ServerProcess, make: MakeBundle, image: bytes
) -> None:
    data = make(task="undone")[1]

    def register(_: int) -> int:
        with server.client() as http:
            return put(http, data, "undone").status_code

    def delete(_: int) -> int:
        with server.client() as http:
            return http.delete("/v1/tasks/undone").status_code

    with ThreadPoolExecutor(4) as pool:
        registered, deleted = pool.map(register, range(8)), pool.map(delete, range(8))
        statuses = set(registered), set(deleted)
    assert statuses[0] <= {200, 201}
    assert statuses[1] <= {204, 404}
    with server.client() as http:
        is_there = http.get("/v1/tasks/undone").status_code == 200
        assert classify(http, image, model="undone").status_code == (200 if is_there else 404)
        assert put(http, data, "undone").status_code == (200 if is_there else 201)


def test_a_version_that_left_the_device_is_back_before_it_is_live(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    with open_app(paths=2) as http:
        for version in "123":
            data = make(version=version, seed=int(version))[1]
            put(http, data, version=version).raise_for_status()
        tiers = {v["version"]: v["tier"] for v in http.get("/v1/tasks/pets").json()["versions"]}
        assert tiers["3"] == "device"
        assert "host" in tiers.values()

        assert http.post("/v1/tasks/pets:rollback").json()["live"] == "2"
        back = alias(http, "pets", "live", "1").json()
        assert {v["version"]: v["tier"] for v in back["versions"]}["1"] == "device"
        (result,) = classify(http, image, model="pets").json()["results"]
        assert result["path"]["version"] == "1"


def test_a_version_that_cannot_be_brought_back_changes_nothing(
    open_app: OpenApp, make: MakeBundle, tmp_path: Path
) -> None:
    first = make(version="1", seed=1)[0]
    with open_app(paths=2, host_bytes=0) as http:
        for version in "123":
            data = make(version=version, seed=int(version))[1]
            put(http, data, version=version).raise_for_status()
        (file,) = (tmp_path / "store" / "bundles").glob(f"{first.digest[7:]}*")
        file.write_bytes(b"damaged")
        before = http.get("/v1/tasks/pets")
        refused = alias(http, "pets", "live", "1")

        assert (refused.status_code, refused.json()["code"]) == (503, "version_failed")
        after = http.get("/v1/tasks/pets")
        assert (after.json()["live"], after.headers["etag"]) == ("3", before.headers["etag"])
        assert after.json()["versions"][0]["state"] == "failed"
        assert put(http, make(version="1", seed=1)[1]).json()["live"] == "1"


def test_a_body_that_says_it_is_too_large_is_refused_unread(server: ServerProcess) -> None:
    head = b"HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n"
    for path in (b"versions/1", b"aliases/live"):
        with Raw(server.url) as raw:
            kind = b"Content-Type: application/json\r\n" if path == b"aliases/live" else b""
            answer = raw.ask(b"PUT /v1/tasks/huge/" + path + b" " + head + kind + b"\r\n")
        assert (answer.status, answer.json()["code"]) == (413, "too_large")


def test_a_body_without_a_length_is_cut_off_at_the_limit(
    start_server: StartServer, tmp_path: Path
) -> None:
    """Also one that claims fewer bytes than it has is read no further than it claims."""
    with start_server(tmp_path, "max_bundle_bytes=100000", "upload_timeout_s=0.2") as small:
        with Raw(small.url) as raw:
            raw.send(b"PUT /v1/tasks/a/versions/1 HTTP/1.1\r\nHost: x\r\n")
            raw.send(b"Transfer-Encoding: chunked\r\n\r\n")
            raw.send(b"1ffff\r\n" + bytes(0x1FFFF) + b"\r\n")
            answer = raw.answer()
        assert (answer.status, answer.json()["code"]) == (413, "too_large")

        with Raw(small.url) as raw:  # more is promised than comes
            answer = raw.ask(
                b"PUT /v1/tasks/a/versions/1 HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx"
            )
        assert (answer.status, answer.json()["code"]) == (408, "request_timeout")

        with Raw(small.url) as raw:  # less is promised than comes: the rest is no request
            raw.send(
                b"PUT /v1/tasks/a/versions/1 HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
                + bytes(1000)
            )
            raw.is_closed()
        with small.client() as http:
            assert http.get("/v1/tasks").json()["tasks"] == []
        assert list((tmp_path / "incoming").iterdir()) == []


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", "image/png"])
def test_a_bundle_of_another_content_type_is_refused(http: httpx.Client, kind: str) -> None:
    headers = {"Content-Type": kind}
    response = http.put("/v1/tasks/typed/versions/1", content=b"x", headers=headers)

    assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")


def test_a_store_that_takes_nothing_more_refuses_bundles_and_nothing_else(
    open_app: OpenApp, make: MakeBundle, image: bytes, tmp_path: Path
) -> None:
    with open_app() as http:
        two_versions(http, make, "pets")
        (tmp_path / "store" / "incoming").rmdir()
        refused = put(http, make(task="tools")[1], "tools")
        assert (refused.status_code, refused.json()["code"]) == (507, "storage_failed")
        assert alias(http, "pets", "live", "1").json()["live"] == "1"
        assert classify(http, image, model="pets").status_code == 200
        (tmp_path / "store" / "incoming").mkdir()
        assert put(http, make(task="tools")[1], "tools").status_code == 201
