"""How images come into a request: base64, data URIs, URLs, files; one bad one fails alone."""

import base64
from typing import Any

import httpx
import pytest

LABELS = ["cat", "car"]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def classify(http: httpx.Client, *images: dict[str, Any]) -> httpx.Response:
    return http.post("/v1/classify", json={"images": list(images), "labels": LABELS})


def test_base64_and_data_uri_are_the_same_image(http: httpx.Client, image: bytes) -> None:
    response = classify(
        http,
        {"bytes_b64": b64(image)},
        {"data_uri": f"data:image/png;base64,{b64(image)}"},
        {"data_uri": f"data:;base64,{b64(image)}"},  # its type is told by its bytes
    )

    assert response.status_code == 200
    first, *others = response.json()["results"]
    assert others == [first, first]


def test_images_that_cannot_be_had_fail_alone(http: httpx.Client, image: bytes) -> None:
    response = classify(
        http,
        {"bytes_b64": b64(image)},
        {"data_uri": "data:image/png,no-base64"},
        {"data_uri": f"data:image/png;base64,{b64(b'no image')}"},
        {"url": "http://127.0.0.1/a.png"},
    )

    assert response.status_code == 200
    good, *bad = response.json()["results"]
    assert good["label"] in LABELS
    assert [(b["error"]["code"], b["error"]["status"]) for b in bad] == [
        ("bad_data_uri", 422),
        ("not_an_image", 415),
        ("url_refused", 422),
    ]


@pytest.mark.parametrize(
    "image",
    [
        {},
        {"bytes_b64": "", "url": "http://example.org/"},
        {"data_uri": "data:;base64,", "bytes_b64": ""},
        {"url": "http://example.org/" + "x" * 5000},
        {"url": 7},
        {"data_uri": None},
        {"path": "/etc/passwd"},
    ],
)
def test_an_image_has_one_source_that_is_known(http: httpx.Client, image: dict[str, Any]) -> None:
    response = classify(http, image)

    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
