"""The Open Inference Protocol V2, with Triton's binary and repository extensions; over HTTP."""

import json
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.service.conftest import MakeBundle, OpenApp
from tests.service.made import image_bytes
from tests.service.routes.test_classify import b64, classify

JSON_SIZE = "inference-header-content-length"


@pytest.fixture(scope="module")
def v2(
    tmp_path_factory: pytest.TempPathFactory, start_server: Any, make: MakeBundle
) -> Iterator[httpx.Client]:
    """A client of a server with one task, two versions of it, of which the first is live."""
    with start_server(tmp_path_factory.mktemp("v2")) as server, server.client() as client:
        client.put("/v1/tasks/pets/versions/1", content=make()[1])
        second = make(version="2", seed=2)[1]
        client.put("/v1/tasks/pets/versions/2?activate=false", content=second)
        yield client


def asked(*images: bytes, **fields: Any) -> dict[str, Any]:
    data = [b64(image) for image in images]
    tensor = {"name": "image", "shape": [len(data)], "datatype": "BYTES", "data": data}
    return {"inputs": [tensor]} | fields


def infer(http: httpx.Client, body: dict[str, Any], model: str = "pets") -> httpx.Response:
    return http.post(f"/v2/models/{model}/infer", json=body)


def values(answer: dict[str, Any]) -> dict[str, list[Any]]:
    for output in answer["outputs"]:
        assert output["shape"] == [len(output["data"])]
    return {output["name"]: output["data"] for output in answer["outputs"]}


def problem(response: httpx.Response) -> dict[str, Any]:
    """A problem as the protocol's clients want it: `error` is a text."""
    found: dict[str, Any] = response.json()
    assert response.headers["content-type"] == "application/problem+json"
    assert found["error"] == found["detail"]
    assert found["status"] == response.status_code
    return found


def test_the_server_says_what_it_is_and_that_it_lives_and_is_ready(v2: httpx.Client) -> None:
    metadata = v2.get("/v2").json()

    assert metadata.keys() == {"name", "version", "extensions"}
    assert "binary_tensor_data" in metadata["extensions"]
    assert v2.get("/v2/health/live").json() == {"live": True}
    assert v2.get("/v2/health/ready").json() == {"ready": True, "live": True}


def test_a_model_says_what_it_takes_and_gives(v2: httpx.Client) -> None:
    pets, version = v2.get("/v2/models/pets").json(), v2.get("/v2/models/pets/versions/2").json()

    assert pets == version
    assert pets["versions"] == ["1", "2"]
    assert pets["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    assert {o["name"]: o["datatype"] for o in pets["outputs"]} == {
        **dict.fromkeys(("label", "task", "version"), "BYTES"),
        "probability": "FP32",
    }
    assert "versions" not in v2.get("/v2/models/base").json()
    assert v2.get("/v2/models/pets/versions/1/ready").json() == {"name": "pets", "ready": True}
    assert v2.get("/v2/models/auto/ready").json() == {"name": "auto", "ready": True}


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v2/models/nobody", "unknown_task"),
        ("/v2/models/nobody/ready", "unknown_task"),
        ("/v2/models/pets/versions/9", "unknown_version"),
        ("/v2/models/pets/versions/9/ready", "unknown_version"),
        ("/v2/models/base/versions/1", "unknown_task"),
    ],
)
def test_an_unknown_model_is_a_404(v2: httpx.Client, path: str, code: str) -> None:
    assert problem(v2.get(path))["code"] == code


def test_an_inference_is_the_native_classification(v2: httpx.Client) -> None:
    images = [image_bytes(seed) for seed in range(3)]

    for model in ("pets", "auto", "base", "pets/versions/2"):
        answer = infer(v2, asked(*images), model).json()
        found = values(answer)
        for index, image in enumerate(images):
            selector = model.replace("/versions/", "@")
            (native,) = classify(v2, image, model=selector, labels=None).json()["results"]
            assert found["label"][index] == native["label"]
            assert found["probability"][index] == native["probability"]
            assert found["task"][index] == native["path"].get("task", "")
            assert found["version"][index] == native["path"].get("version", "")


def test_an_answer_echoes_the_id_the_model_and_the_version_that_answered(
    v2: httpx.Client, image: bytes
) -> None:
    live = infer(v2, asked(image, id="42")).json()
    second = infer(v2, asked(image), "pets/versions/2").json()
    auto = infer(v2, asked(image, id=""), "auto").json()

    assert (live["id"], live["model_name"], live["model_version"]) == ("42", "pets", "1")
    assert (second["model_name"], second["model_version"]) == ("pets", "2")
    assert "id" not in second
    assert "model_version" not in auto
    assert auto["id"] == ""


def test_a_canary_s_answers_say_so_one_by_one(open_app: OpenApp, make: MakeBundle) -> None:
    images = [image_bytes(seed) for seed in range(12)]
    with open_app() as http:
        http.put("/v1/tasks/pets/versions/1", content=make()[1])
        second = make(version="2", seed=2)[1]
        http.put("/v1/tasks/pets/versions/2?activate=false", content=second)
        rollout = {"version": "2", "mode": "canary", "share": 0.5, "min_images": 1000}
        assert http.put("/v1/tasks/pets/rollout", json=rollout).status_code == 200
        answer = infer(http, asked(*images)).json()

    assert set(values(answer)["version"]) == {"1", "2"}
    assert "model_version" not in answer


def test_outputs_can_be_chosen(v2: httpx.Client, image: bytes) -> None:
    answer = infer(v2, asked(image, outputs=[{"name": "task"}, {"name": "label"}])).json()

    assert values(answer).keys() == {"label", "task"}


@pytest.mark.parametrize("labels", [["cat", "lorry"], '["cat", "lorry"]'])
def test_labels_and_templates_are_parameters_as_lists_or_as_their_json(
    v2: httpx.Client, image: bytes, labels: object
) -> None:
    parameters = {"labels": labels, "templates": ["{}."]}
    found = values(infer(v2, asked(image, parameters=parameters), "base").json())
    (native,) = classify(
        v2, image, model="base", labels=["cat", "lorry"], templates=["{}."]
    ).json()["results"]

    assert (found["label"], found["probability"]) == ([native["label"]], [native["probability"]])


def with_binary(images: list[bytes], **fields: Any) -> tuple[bytes, dict[str, str]]:
    """A request as tritonclient sends it: JSON, and behind it length and bytes of each value."""
    behind = b"".join(struct.pack("<I", len(image)) + image for image in images)
    parameters = {"binary_data_size": len(behind)}
    tensor = {"name": "image", "shape": [len(images)], "datatype": "BYTES"}
    head = json.dumps({"inputs": [tensor | {"parameters": parameters}]} | fields).encode()
    return head + behind, {JSON_SIZE: str(len(head))}


def test_images_and_answers_may_stand_as_bytes_behind_the_json(v2: httpx.Client) -> None:
    images = [image_bytes(seed) for seed in range(2)]
    body, headers = with_binary(images, parameters={"binary_data_output": True})
    response = v2.post("/v2/models/pets/infer", content=body, headers=headers)
    size = int(response.headers[JSON_SIZE])
    head, behind = json.loads(response.content[:size]), response.content[size:]
    expected = values(infer(v2, asked(*images)).json())

    assert response.headers["content-type"] == "application/octet-stream"
    for output in head["outputs"]:
        assert "data" not in output
        data, behind = (
            behind[: output["parameters"]["binary_data_size"]],
            behind[output["parameters"]["binary_data_size"] :],
        )
        if output["datatype"] == "FP32":
            assert list(struct.unpack("<2f", data)) == pytest.approx(expected["probability"])
        else:
            texts = "".join(f"{len(t):c}\0\0\0{t}" for t in expected[output["name"]])
            assert data == texts.encode()
    assert behind == b""


def test_each_output_may_choose_its_form(v2: httpx.Client, image: bytes) -> None:
    outputs = [{"name": "label", "parameters": {"binary_data": False}}, {"name": "probability"}]
    parameters = {"binary_data_output": True}
    response = infer(v2, asked(image, parameters=parameters, outputs=outputs))
    head = json.loads(response.content[: int(response.headers[JSON_SIZE])])

    label, probability = head["outputs"]
    assert len(label["data"]) == 1
    assert probability["parameters"] == {"binary_data_size": 4}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"inputs": []}, "inputs"),
        ({"inputs": None}, "inputs"),
        ({"surprise": 1}, "surprise"),
        ({"parameters": {"timeout": 5}}, "parameters.timeout"),
        ({"parameters": {"labels": ["cat", "cat"]}}, "labels"),
        ({"parameters": {"labels": "cat"}}, "parameters.labels"),
        ({"parameters": {"labels": []}}, "labels"),
        ({"outputs": [{"name": "logits"}]}, "outputs.0.name"),
        ({"id": 7}, "id"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    v2: httpx.Client, image: bytes, change: dict[str, object], where: str
) -> None:
    found = problem(infer(v2, asked(image) | change))

    assert (found["status"], found["code"]) == (422, "invalid_request")
    assert found["errors"][0]["where"].startswith(where)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "picture"},
        {"shape": [2]},
        {"shape": [1, 1]},
        {"shape": [-1]},
        {"shape": [0], "data": []},
        {"datatype": "UINT8"},
        {"data": [1]},
        {"data": None},
        {"parameters": {"content_type": "hex"}},
        {"parameters": {"binary_data_size": 3}},
    ],
)
def test_a_tensor_that_makes_no_sense_is_refused(
    v2: httpx.Client, image: bytes, change: dict[str, object]
) -> None:
    body = asked(image)
    body["inputs"][0] |= change

    assert problem(infer(v2, body))["code"] == "invalid_request"


def test_binary_data_that_do_not_fit_are_refused(v2: httpx.Client, image: bytes) -> None:
    body, headers = with_binary([image])
    size = int(headers[JSON_SIZE])

    def code(content: bytes, size: object = size) -> str:
        sent = {JSON_SIZE: str(size)}
        return str(problem(v2.post("/v2/models/pets/infer", content=content, headers=sent))["code"])

    assert code(body[:-1]) == "invalid_request"
    assert code(body + b"x") == "invalid_request"
    assert code(body, len(body) + 1) == "invalid_request"
    assert code(body, "-1") == code(body, "1e3") == code(body, "") == "invalid_request"
    assert code(body, size - 1) == "bad_json"
    longer = body[:size] + struct.pack("<I", len(image) + 1) + body[size + 4 :]
    assert code(longer) == "invalid_request"
    cut = body[:size].replace(b'size": %d' % (len(body) - size), b'size": 3')
    assert code(cut + b"abc", len(cut)) == "invalid_request"


def test_an_image_that_cannot_be_used_fails_the_request_and_is_named(
    v2: httpx.Client, image: bytes
) -> None:
    some = problem(infer(v2, asked(image, b"no image")))
    alone = problem(infer(v2, asked(b"no image")))
    unreadable = asked(image)
    unreadable["inputs"][0]["data"] = ["?"]

    assert (some["code"], some["status"]) == ("not_an_image", 415)
    assert some["error"].startswith("inputs.0.data.1: ")
    assert alone["code"] == "not_an_image"
    assert problem(infer(v2, unreadable))["code"] == "bad_base64"
    assert problem(infer(v2, asked(*[b""] * 65)))["code"] == "too_many_images"


def test_the_repository_lists_what_is_ready(v2: httpx.Client) -> None:
    entries = v2.post("/v2/repository/index").json()
    ready = v2.post("/v2/repository/index", json={"ready": True}).json()

    assert entries == ready
    assert [(e["name"], e.get("version"), e["state"]) for e in entries] == [
        ("auto", None, "READY"),
        ("base", None, "READY"),
        ("pets", "1", "READY"),
        ("pets", "2", "READY"),
    ]


def test_a_version_is_unloaded_and_loaded_again(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    with open_app() as http:
        http.put("/v1/tasks/pets/versions/1", content=make()[1])
        second = make(version="2", seed=2)[1]
        http.put("/v1/tasks/pets/versions/2?activate=false", content=second)
        before = infer(http, asked(image), "pets@2").json()

        def state() -> str:
            entries = http.post("/v2/repository/index").json()
            (found,) = [e for e in entries if e.get("version") == "2"]
            return str(found["state"])

        assert http.post("/v2/repository/models/pets@2/unload").json() == {}
        assert state() == "UNAVAILABLE"
        assert http.get("/v2/models/pets/versions/2/ready").status_code == 200
        assert len(http.post("/v2/repository/index", json={"ready": True}).json()) == 3
        assert http.post("/v2/repository/models/pets@2/load", json={"parameters": {}}).json() == {}
        assert state() == "READY"
        http.post("/v2/repository/models/pets@2/unload")
        assert values(infer(http, asked(image), "pets@2").json()) == values(before)
        assert state() == "READY"


def test_what_must_stay_on_the_device_is_not_unloaded(v2: httpx.Client) -> None:
    for model in ("pets", "pets@1", "base", "auto"):
        refused = problem(v2.post(f"/v2/repository/models/{model}/unload"))
        assert (refused["status"], refused["code"]) == (409, "version_in_use")
    assert problem(v2.post("/v2/repository/models/nobody/load"))["code"] == "unknown_task"
    assert v2.post("/v2/repository/models/base/load").json() == {}


def test_a_load_never_brings_files_or_settings(v2: httpx.Client) -> None:
    """Triton would take a model's files from such a request, which is to run a stranger's code."""
    for parameters in ({"config": "{}"}, {"file:1/model.py": "aW1wb3J0IG9z"}):
        body = {"parameters": parameters}
        response = v2.post("/v2/repository/models/pets/load", json=body)
        assert problem(response)["code"] == "invalid_request"


def test_changes_of_the_repository_need_the_admin_key(open_app: OpenApp) -> None:
    with open_app(admin_key="k") as http:
        assert http.post("/v2/repository/index").status_code == 200
        refused = problem(http.post("/v2/repository/models/base/load"))
        assert (refused["status"], refused["code"]) == (401, "unauthorized")
