"""`POST /v1/classify`: forms, rules of path and labels, bad input; over HTTP."""

import base64
import io
import json
import struct
import zlib
from typing import Any, cast

import httpx
import pytest
from PIL import Image

from tests.service.conftest import MakeBundle, OpenApp
from tests.service.made import image_bytes

LABELS = ["cat", "car"]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def classify(http: httpx.Client, data: bytes, /, **fields: object) -> httpx.Response:
    body = {"image": {"bytes_b64": b64(data)}, "labels": LABELS} | fields
    return http.post("/v1/classify", json={k: v for k, v in body.items() if v is not None})


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def huge_png() -> bytes:
    """20,000 x 20,000 pixels of one colour, 1 bit each: 50 MB decoded, 49 kB as a file."""
    rows = zlib.compress(b"\0" * (20_000 * (1 + 20_000 // 8)), 9)

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def test_the_three_forms_of_a_request_give_the_same_answer(
    http: httpx.Client, image: bytes
) -> None:
    as_json = classify(http, image)
    as_form = http.post("/v1/classify", files={"file": image}, data={"labels": LABELS})
    query = {"labels": LABELS}
    raw = {"content-type": "image/png"}
    as_raw = http.post("/v1/classify", content=image, headers=raw, params=query)

    assert as_json.status_code == as_form.status_code == as_raw.status_code == 200
    assert as_json.json()["results"] == as_form.json()["results"] == as_raw.json()["results"]


def test_an_answer_says_how_it_came_about(http: httpx.Client, image: bytes) -> None:
    response = classify(http, image, model="base", top_k=2)

    (result,) = response.json()["results"]
    assert result["path"] == {"kind": "zero_shot"}
    assert result["routed_by"] == "explicit"
    assert result["label_set"] == "request"
    assert [choice["label"] for choice in result["top_k"]] == sorted(
        LABELS, key=lambda label: -dict_of(result)[label]
    )
    assert sum(dict_of(result).values()) == pytest.approx(1)
    assert response.headers["x-registry-generation"] == str(response.json()["generation"])
    assert {"decode", "queue", "forward"} <= {
        part.partition(";")[0].strip() for part in response.headers["server-timing"].split(",")
    }


def dict_of(result: dict[str, Any]) -> dict[str, float]:
    return {choice["label"]: choice["probability"] for choice in result["top_k"]}


def test_a_request_id_comes_back_if_it_is_harmless(http: httpx.Client) -> None:
    assert http.get("/livez", headers={"x-request-id": "a-1"}).headers["x-request-id"] == "a-1"
    assert http.get("/livez", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"no image at all", 415, "not_an_image"),
        (image_bytes()[:300], 422, "undecodable"),
        (huge_png(), 413, "too_many_pixels"),
        (b"", 422, "empty"),
        (b"\x89PNG" + b"\0" * (17 * 1024 * 1024), 413, "too_large"),
    ],
    ids=["not an image", "truncated", "20,000 x 20,000", "empty", "too many bytes"],
)
def test_an_image_that_cannot_be_used_is_the_request_s_error(
    http: httpx.Client, data: bytes, status: int, code: str
) -> None:
    as_json = classify(http, data)
    raw = http.post(
        "/v1/classify", content=data, params={"labels": LABELS}, headers={"content-type": "image/x"}
    )
    form = http.post("/v1/classify", files={"file": data}, data={"labels": LABELS})

    for response in (as_json, raw, form):
        assert (response.status_code, response.json()["code"]) == (status, code)
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["request_id"] == response.headers["x-request-id"]


def animated_gif() -> bytes:
    frames = [Image.new("P", (8, 8), color) for color in range(5)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.new("RGB", (1, 1), "red"), "PNG"),
        animated_gif(),
        saved(Image.new("CMYK", (20, 20), (0, 200, 30, 5)), "JPEG"),
        saved(Image.new("I;16", (20, 20), 40_000), "PNG"),
        saved(Image.new("P", (20, 20), 3), "PNG", transparency=3),
        saved(Image.new("LA", (20, 20), (7, 100)), "PNG"),
    ],
    ids=["1x1", "animated GIF", "CMYK JPEG", "16-bit PNG", "palette with alpha", "grey with alpha"],
)
def test_an_unusual_image_is_answered(http: httpx.Client, data: bytes) -> None:
    assert classify(http, data).status_code == 200


def test_one_bad_image_among_several_fails_alone(http: httpx.Client, image: bytes) -> None:
    images = [{"bytes_b64": text} for text in (b64(image), b64(b"no image"), "?", b64(image))]

    response = classify(http, image, image=None, images=images)

    assert response.status_code == 200
    first, bad, worse, last = response.json()["results"]
    assert first == last
    assert (bad["error"]["code"], bad["error"]["status"]) == ("not_an_image", 415)
    assert worse["error"]["code"] == "bad_base64"


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"labels": []}, 422),
        ({"labels": ["cat", "cat"]}, 422),
        ({"labels": ["cat", "Cat "]}, 422),
        ({"labels": [" "]}, 422),
        ({"labels": [f"label {i}" for i in range(10_000)]}, 413),
        ({"labels": "cat"}, 422),
        ({"labels": [1, 2]}, 422),
        ({"labels": {"cat": 1}}, 422),
        ({"labels": ["x" * 201]}, 422),
        ({"templates": ["no braces"]}, 422),
        ({"templates": ["{} and {}"]}, 422),
        ({"templates": []}, 422),
        ({"templates": ["a {}."], "labels": None}, 422),
        ({"templates": [f"{i} {{}}" for i in range(2001)]}, 413),
        ({"top_k": 0}, 422),
        ({"top_k": "3"}, 422),
        ({"explain": "yes"}, 422),
        ({"model": 7}, 422),
        ({"model": ""}, 422),
        ({"image": 7}, 422),
        ({"image": {"bytes_b64": 7}}, 422),
        ({"image": {"url": "http://127.0.0.1/"}}, 422),
        ({"image": {"bytes_b64": "not base64!"}}, 422),
        ({"image": None}, 422),
        ({"image": None, "images": []}, 422),
        ({"images": [{"bytes_b64": ""}]}, 422),
        ({"image": None, "images": [{"bytes_b64": ""}] * 65}, 413),
        ({"surprise": 1}, 422),
        ({"model": "nobody"}, 404),
        ({"model": "nobody@1"}, 404),
        ({"model": "../../etc"}, 404),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    http: httpx.Client, image: bytes, fields: dict[str, object], status: int
) -> None:
    response = classify(http, image, **fields)

    assert response.status_code == status, response.text
    problem = response.json()
    assert problem["status"] == status
    assert problem["type"].endswith(problem["code"])
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "label",
    [
        "\x00",
        "a\x00b",
        "\U0001f98a",
        "\u202eabc",
        "{}",
        "{0.__class__}",
        "<b>",
        "&amp;",
        "a" * 200,
        "\u00e9" * 200,
        "\ufffe",
        "a\nb",
    ],
)
def test_an_odd_label_is_a_label(http: httpx.Client, image: bytes, label: str) -> None:
    response = classify(http, image, labels=[label, "car"], model="base")

    assert response.status_code == 200
    assert label in dict_of(response.json()["results"][0])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff",
        b'{"image": NaN}',
        b"[" * 100_000,
        b'{"labels": ["\\ud800"]}',
    ],
)
def test_a_body_that_is_no_json_object_is_refused(http: httpx.Client, body: bytes) -> None:
    headers = {"content-type": "application/json"}

    response = http.post("/v1/classify", content=body, headers=headers)

    assert response.status_code in (400, 422)
    assert response.json()["code"] in ("bad_json", "invalid_request")


def test_a_problem_never_repeats_what_was_sent(http: httpx.Client, image: bytes) -> None:
    assert "seCret" not in classify(http, image, top_k="seCret", labels=["seCret"] * 2).text


@pytest.mark.parametrize("kind", ["text/plain", "", "application/xml", "video/mp4"])
def test_an_unknown_content_type_is_refused(http: httpx.Client, kind: str) -> None:
    response = http.post("/v1/classify", content=b"x", headers={"content-type": kind})

    assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")


def test_options_of_a_json_request_are_not_taken_from_the_query(
    http: httpx.Client, image: bytes
) -> None:
    body = {"image": {"bytes_b64": b64(image)}, "labels": LABELS}

    assert http.post("/v1/classify?explain=1", json=body).status_code == 422


def test_a_form_without_a_file_or_a_broken_one_is_refused(http: httpx.Client) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}

    assert http.post("/v1/classify", files={"labels": (None, "cat")}).status_code == 422
    assert http.post("/v1/classify", content=b"--y", headers=headers).status_code in (400, 422)
    no_boundary = {"content-type": "multipart/form-data"}
    assert http.post("/v1/classify", content=b"", headers=no_boundary).status_code == 400


def test_too_many_labels_are_refused_in_every_form(http: httpx.Client, image: bytes) -> None:
    labels = {"labels": [f"label {i}" for i in range(1001)]}
    raw = {"content-type": "image/png"}
    for response in (
        classify(http, image, **labels),
        http.post("/v1/classify", files={"file": image}, data=labels),
        http.post("/v1/classify", content=image, params=labels, headers=raw),
    ):
        assert (response.status_code, response.json()["code"]) == (413, "too_many_labels")


def test_a_body_over_the_limit_is_refused_in_every_form(open_app: OpenApp, image: bytes) -> None:
    with open_app(max_request_bytes=1000) as http:
        for response in (
            classify(http, image),
            http.post("/v1/classify", content=image, headers={"content-type": "image/png"}),
            http.post("/v1/classify", files={"file": image}),
            http.post(
                "/v1/classify", content=iter([image] * 2), headers={"content-type": "image/png"}
            ),
        ):
            assert (response.status_code, response.json()["code"]) == (413, "too_large")


def test_without_a_live_task_labels_are_needed(open_app: OpenApp, image: bytes) -> None:
    with open_app() as http:
        for model in ("auto", "base"):
            response = classify(http, image, model=model, labels=None)
            assert (response.status_code, response.json()["code"]) == (422, "labels_needed")


def test_labels_choose_who_may_answer(open_app: OpenApp, make: MakeBundle, image: bytes) -> None:
    pets = make(task="pets", class_names=("cat", "dog"))[1]
    tools = make(task="tools", seed=1, class_names=("hammer", "saw"))[1]
    with open_app() as http:
        http.put("/v1/tasks/pets/versions/1", content=pets)
        http.put("/v1/tasks/tools/versions/1", content=tools)

        def answer(**fields: object) -> dict[str, Any]:
            (result,) = classify(http, image, **fields).json()["results"]
            return result

        def who(**fields: object) -> str:
            return answer(**fields)["path"].get("task", "zero-shot")

        assert who(labels=["DOG", "cat"]) == "pets"
        assert who(labels=["saw"]) == "tools"
        assert who(labels=["cat", "saw"]) == "zero-shot"
        assert who(labels=["cat", "saw"], model="tools") == "tools"
        assert who(labels=None, model="base") == "zero-shot"
        assert answer(labels=None, model="base")["label_set"] == "union"
        assert {c["label"] for c in answer(labels=None, model="base")["top_k"]} == {
            *("cat", "dog", "hammer", "saw")
        }
        assert answer(labels=None, model="pets")["label_set"] == "task"
        assert answer(labels=["dog", "cat"])["label_set"] == "request"


def test_all_classes_of_a_task_and_no_others_name_that_task(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    never = -1e9  # DDAS refuses every image
    with open_app() as http:
        http.put("/v1/tasks/pets/versions/1", content=make(threshold=never)[1])

        def who(*labels: str) -> tuple[str, str]:
            (result,) = classify(http, image, labels=list(labels)).json()["results"]
            return result["path"].get("task", "zero-shot"), result["routed_by"]

        assert who("dog", "CAT", "hamster") == ("pets", "labels")
        assert who("dog", "cat") == ("zero-shot", "auto")
        assert who("dog", "cat", "hamster", "lorry") == ("zero-shot", "auto")
        twin = make(task="animals", threshold=never)[1]
        http.put("/v1/tasks/animals/versions/1", content=twin)
        assert who("dog", "cat", "hamster") == ("zero-shot", "auto")  # which of the two?


def test_labels_that_are_a_task_s_classes_get_the_task_s_own_probabilities(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    with open_app() as http:
        http.put("/v1/tasks/pets/versions/1", content=make()[1])
        (own,) = classify(http, image, model="pets", labels=None).json()["results"]
        (same,) = classify(http, image, labels=["hamster", "cat", "dog"]).json()["results"]

    # The rows stand in another order, so a sum of 24 products may round differently.
    assert dict_of(same) == pytest.approx(dict_of(own), abs=1e-6)


def test_an_image_that_no_task_accepts_gets_zero_shot_over_the_union(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    with open_app() as http:
        http.put("/v1/tasks/pets/versions/1", content=make(threshold=-1e9)[1])
        http.put(
            "/v1/tasks/birds/versions/1",
            content=make(task="birds", class_names=("Cat", "owl"), threshold=-1e9)[1],
        )
        (result,) = classify(http, image, labels=None, explain=True).json()["results"]

    assert result["path"] == {"kind": "zero_shot"}
    assert (result["routed_by"], result["label_set"]) == ("auto", "union")
    assert dict_of(result).keys() == {"Cat", "owl", "dog", "hamster"}
    assert result["scores"].keys() == {"birds", "pets"}
    assert not any(score["accepted"] for score in result["scores"].values())
    assert all(score["threshold"] == -1e9 for score in result["scores"].values())


def test_text_is_encoded_by_the_path_that_encodes_the_image(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    """Foreign labels under a task go through its text experts, with its templates."""
    with open_app() as http:
        http.put("/v1/tasks/pets/versions/1", content=make()[1])
        asked = {"labels": ["cat", "lorry", "train"], "top_k": 3}
        (task,) = classify(http, image, model="pets", **asked).json()["results"]
        (given,) = classify(
            http, image, model="pets", templates=["a photo of a {}."], **asked
        ).json()["results"]
        (other,) = classify(http, image, model="pets", templates=["{}!"], **asked).json()["results"]

    assert dict_of(task) == dict_of(given)
    assert dict_of(task) != dict_of(other)


def test_metrics_count_what_happened(open_app: OpenApp, make: MakeBundle, image: bytes) -> None:
    with open_app() as http:
        http.put("/v1/tasks/pets/versions/1", content=make()[1])
        classify(http, image, labels=None)
        classify(http, image, model="base")
        classify(http, b"no image")
        text = http.get("/metrics").text

        assert 'medley_images_total{outcome="ok",route="auto",task="pets"} 1.0' in text
        assert 'medley_images_total{outcome="ok",route="explicit",task="zero_shot"} 1.0' in text
        assert 'outcome="client_error"' in text
        assert 'medley_router_decisions_total{decision="task"} 1.0' in text
        at = 'task="pets",tier="device",version="1"'
        assert f'medley_bundle_resident{{pinned="false",{at}}} 1.0' in text
        assert 'medley_registry_generation{kind="observed"} 1.0' in text
        assert 'medley_bundle_loads_total{result="ok"} 1.0' in text
        assert "medley_build_info{" in text

        http.delete("/v1/tasks/pets")
        assert 'task="pets"' not in http.get("/metrics").text


def test_the_openapi_document_names_every_schema_that_it_uses(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    used = set(json.dumps(document).split('"#/components/schemas/')[1:])
    names = {part.partition('"')[0] for part in used}

    assert names <= document["components"]["schemas"].keys()
    assert set(document["paths"]["/v1/classify"]["post"]["requestBody"]["content"]) == {
        *("application/json", "multipart/form-data", "image/*", "application/octet-stream")
    }


def test_an_alias_answers_as_the_version_it_names(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    with open_app() as http:
        http.put("/v1/tasks/pets/versions/1", content=make()[1])
        newer = make(version="2", seed=5)[1]
        http.put("/v1/tasks/pets/versions/2?activate=false", content=newer)
        assert http.put("/v1/tasks/pets/aliases/next", json={"version": "2"}).status_code == 200

        def version(model: str) -> str:
            (result,) = classify(http, image, model=model, labels=None).json()["results"]
            return str(result["path"]["version"])

        assert [version(m) for m in ("pets", "pets@1", "pets@2", "pets@next")] == [*"1122"]
        assert classify(http, image, model="pets@last", labels=None).status_code == 404


def test_the_union_is_encoded_before_anybody_asks(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    """No request encodes a text of it: none has to wait for that."""
    with open_app() as http:
        for task in ("pets", "birds"):
            content = make(task=task, class_names=(f"{task} one", f"{task} two"), threshold=-1e9)[1]
            http.put(f"/v1/tasks/{task}/versions/1", content=content)
        (result,) = classify(http, image, labels=None).json()["results"]
        encoded_bytes = cast(Any, http).app.state.service.labels.used_bytes

    assert (result["label_set"], len(result["top_k"])) == ("union", 4)
    assert encoded_bytes == 0
