"""Routes in OpenAI's shape: `/v1/models` and `/v1/embeddings`; over HTTP."""

import base64
import struct
from typing import Any

import httpx
import pytest

from tests.service.conftest import MakeBundle, OpenApp
from tests.service.made import image_bytes
from tests.service.routes.test_classify import b64


def data_uri(image: bytes) -> str:
    return f"data:image/png;base64,{b64(image)}"


def embed(http: httpx.Client, given: object, **fields: object) -> httpx.Response:
    return http.post("/v1/embeddings", json={"model": "base", "input": given} | fields)


def vectors(response: httpx.Response) -> list[list[float]]:
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    return [one["embedding"] for one in data]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def error(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    assert response.json().keys() == {"error"}
    found: dict[str, Any] = response.json()["error"]
    assert found.keys() == {"message", "type", "param", "code"}
    return found


def test_models_are_listed_and_asked_for_one_by_one(open_app: OpenApp, make: MakeBundle) -> None:
    first, second = make(), make(version="2", seed=2)
    with open_app() as http:
        http.put("/v1/tasks/pets/versions/1", content=first[1])
        http.put("/v1/tasks/pets/versions/2?activate=false", content=second[1])
        listed = http.get("/v1/models").json()
        http.post("/v2/repository/models/pets@2/unload")
        by_version = http.get("/v1/models/pets@2").json()  # wherever it is now
        assert http.get("/v1/models/pets").json() == listed["data"][2]

    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["auto", "base", "pets"]
    pets = listed["data"][2]
    assert (pets["object"], pets["owned_by"], pets["parent"]) == ("model", "medley", "base")
    assert pets["root"] == first[0].digest
    assert pets["created"] > 1_700_000_000
    assert by_version["root"] == second[0].digest
    assert listed["data"][1]["root"].startswith("sha256:")


def test_an_image_s_embedding_is_that_of_the_path_that_is_named(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    with open_app() as http:
        http.put("/v1/tasks/pets/versions/1", content=make()[1])
        base = embed(http, data_uri(image))
        pets = embed(http, data_uri(image), model="pets")
        again = embed(http, [data_uri(image_bytes(7)), data_uri(image)], model="pets@1")

    (base_vector,), (pets_vector,) = vectors(base), vectors(pets)
    assert dot(base_vector, base_vector) == pytest.approx(1, abs=1e-5)
    assert dot(pets_vector, pets_vector) == pytest.approx(1, abs=1e-5)
    assert base_vector != pets_vector
    assert vectors(again)[1] == pets_vector
    assert (base.json()["model"], pets.json()["model"]) == ("base", "pets@1")
    assert base.json()["object"] == "list"


def test_a_canary_gives_no_vectors(open_app: OpenApp, make: MakeBundle, image: bytes) -> None:
    """They would stand among those of the live version and could not be compared with them."""
    with open_app() as http:
        http.put("/v1/tasks/pets/versions/1", content=make()[1])
        before = vectors(embed(http, data_uri(image), model="pets"))
        second = make(version="2", seed=2)[1]
        http.put("/v1/tasks/pets/versions/2?activate=false", content=second)
        rollout = {"version": "2", "mode": "canary", "share": 1.0}
        assert http.put("/v1/tasks/pets/rollout", json=rollout).status_code == 200
        during = embed(http, data_uri(image), model="pets")
        classified = http.post("/v1/classify", files={"file": image}, data={"model": "pets"})

    assert classified.json()["results"][0]["path"]["version"] == "2"
    assert (vectors(during), during.json()["model"]) == (before, "pets@1")


def test_image_and_text_embeddings_give_the_classification_s_probabilities(
    http: httpx.Client, image: bytes
) -> None:
    """The same vectors: cosine times the scale, softmax."""
    labels = ["cat", "lorry"]
    answer = http.post(
        "/v1/classify",
        json={
            "image": {"bytes_b64": b64(image)},
            "model": "base",
            "labels": labels,
            "templates": ["{}"],
        },
    ).json()["results"][0]
    (image_vector,), texts = vectors(embed(http, data_uri(image))), vectors(embed(http, labels))

    gap = dot(image_vector, texts[0]) - dot(image_vector, texts[1])
    probability = {choice["label"]: choice["probability"] for choice in answer["top_k"]}
    scale = 1 / 0.07  # of the tiny backbone, as of open_clip's models before training
    assert 1 / (1 + 2.718281828459045 ** (-scale * gap)) == pytest.approx(
        probability["cat"], abs=1e-4
    )


def test_a_task_s_text_experts_encode_its_texts(open_app: OpenApp, make: MakeBundle) -> None:
    with open_app() as http:
        http.put("/v1/tasks/pets/versions/1", content=make()[1])

        assert vectors(embed(http, "a cat")) != vectors(embed(http, "a cat", model="pets"))


def test_base64_holds_the_same_numbers(http: httpx.Client, image: bytes) -> None:
    (numbers,) = vectors(embed(http, data_uri(image)))
    (text,) = vectors(embed(http, data_uri(image), encoding_format="base64"))

    data = base64.b64decode(str(text))
    assert list(struct.unpack(f"<{len(data) // 4}f", data)) == pytest.approx(numbers, abs=1e-7)


def test_modality_says_what_an_input_is(http: httpx.Client) -> None:
    (as_text,) = vectors(embed(http, "data:nothing", modality="text"))

    assert as_text != vectors(embed(http, "nothing"))[0]
    assert error(embed(http, "a cat", modality="image"))["code"] == "url_refused"
    mixed = error(embed(http, ["a cat", "data:image/png;base64,AA=="]))
    assert (mixed["code"], mixed["param"]) == ("invalid_request", "input")


@pytest.mark.parametrize(
    ("fields", "status", "code", "kind", "param"),
    [
        ({"model": "auto"}, 422, "invalid_request", "invalid_request_error", "model"),
        ({"model": "nobody"}, 404, "unknown_task", "not_found_error", None),
        ({"model": 7}, 422, "invalid_request", "invalid_request_error", "model"),
        ({"input": []}, 422, "invalid_request", "invalid_request_error", "input"),
        ({"input": [1, 2]}, 422, "invalid_request", "invalid_request_error", "input"),
        ({"input": [""]}, 422, "invalid_request", "invalid_request_error", "input"),
        ({"input": ["x"] * 1001}, 413, "too_many_inputs", "invalid_request_error", None),
        ({"input": ["data:,"] * 65}, 413, "too_many_inputs", "invalid_request_error", None),
        ({"input": "x" * 501}, 413, "too_large", "invalid_request_error", None),
        ({"dimensions": 8}, 422, "invalid_request", "invalid_request_error", "dimensions"),
        ({"user": 7}, 422, "invalid_request", "invalid_request_error", "user"),
        ({"input": "data:image/png,AA"}, 422, "bad_data_uri", "invalid_request_error", None),
        ({"input": "data:image/png;base64,?"}, 422, "bad_base64", "invalid_request_error", None),
        ({"input": "data:;base64,AAAA"}, 415, "not_an_image", "invalid_request_error", None),
    ],
)
def test_what_makes_no_sense_is_refused_in_openai_s_shape(
    http: httpx.Client,
    fields: dict[str, object],
    status: int,
    code: str,
    kind: str,
    param: str | None,
) -> None:
    response = http.post("/v1/embeddings", json={"model": "base", "input": "a cat"} | fields)

    found = error(response)
    assert (response.status_code, found["code"], found["type"]) == (status, code, kind)
    assert found["param"] == param


def test_one_bad_image_fails_the_request_and_is_named(http: httpx.Client, image: bytes) -> None:
    given = [data_uri(image), data_uri(b"no image"), data_uri(image)]

    found = error(embed(http, given))

    assert found["message"].startswith("input.1: ")
    assert found["code"] == "not_an_image"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff"])
def test_a_body_that_is_no_request_is_refused(http: httpx.Client, body: bytes) -> None:
    response = http.post("/v1/embeddings", content=body)

    assert response.status_code in (400, 422)
    assert error(response)["code"] in ("bad_json", "invalid_request")


def test_every_error_of_these_routes_has_openai_s_shape(open_app: OpenApp) -> None:
    with open_app(read_key="reader", max_request_bytes=100) as http:
        assert error(http.get("/v1/models"))["type"] == "authentication_error"
        http.headers["authorization"] = "Bearer reader"
        assert error(http.get("/v1/models/nobody"))["code"] == "unknown_task"
        assert error(http.get("/v1/models?x=1"))["param"] == "x"
        assert error(http.put("/v1/embeddings"))["code"] == "method_not_allowed"
        assert error(embed(http, "x" * 200))["code"] == "too_large"
