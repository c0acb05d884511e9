"""Checks by images: poison, the same again, deadlines, addresses that must not be fetched."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

from service.doctor.findings import Finding, judged
from service.doctor.poison import Poison, good_image, poisons
from service.doctor.site import LABELS, Reply, Site
from service.wire.schemas import ClassifyResponse, Failure, Prediction

__all__ = ["check_addresses", "check_deadlines", "check_poison", "check_same"]

TOLERANCE = 1e-3  # of probabilities: batches of another size may round differently
PRIVATE = (
    "http://127.0.0.1:{port}/",
    "http://localhost:{port}/",
    "http://[::1]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://2130706433:{port}/",
    "http://0x7f.1:{port}/",
    "http://0.0.0.0:{port}/",
    "http://169.254.169.254/latest/meta-data/",
    "http://[fe80::1]/",
    "http://10.0.0.1/",
    "http://192.168.0.1/",
    "http://172.16.0.1/",
    "http://100.64.0.1/",
    "http://user:password@127.0.0.1:{port}/",
    "file:///etc/passwd",
    "ftp://127.0.0.1/x.png",
)


def check_poison(site: Site) -> Iterator[Finding]:
    """Each bad image is refused, or answered if it can be; none takes the server down."""
    before = site.classify(good_image())
    for name, poison in poisons().items():
        yield _poisoned(site, name, poison)
    after = site.classify(good_image())
    yield judged(
        "poison: a good image afterwards",
        same(before.prediction, after.prediction),
        expected="the answer that it had before",
        came=f"{before.said} before, {after.said} after",
        advice="one of the images above has broken decoding or the model: restart the server",
    )


def check_same(site: Site) -> Iterator[Finding]:
    """An answer depends neither on the moment nor on the neighbours."""
    image, other = good_image(), good_image(200, format="JPEG")
    first, again = site.classify(image), site.classify(image)
    yield judged(
        "same: twice",
        same(first.prediction, again.prediction),
        expected="one answer for one image",
        came=f"{_told(first.prediction)}, then {_told(again.prediction)}",
        advice="replicas with other versions behind one address, or a damaged device",
    )
    files = [("file", (str(index), data)) for index, data in enumerate((image, other, b"", image))]
    form = {"model": "base", "labels": list(LABELS), "top_k": str(len(LABELS))}
    reply = site.ask("POST", "/v1/classify", files=files, data=form)
    answer = reply.read(ClassifyResponse) if reply.status == 200 else None
    results = answer.results if answer is not None else []
    kinds = [type(result).__name__ for result in results]
    yield judged(
        "same: among neighbours",
        kinds == ["Prediction", "Prediction", "Failure", "Prediction"]
        and all(same(first.prediction, results[index]) for index in (0, 3)),
        expected="the same answer beside another and an empty image, which fails alone",
        came=", ".join(map(_told, results)) or reply.said,
        advice="images of one batch leak into each other: check MEDLEY_BUCKETS and the device",
    )


def check_deadlines(site: Site) -> Iterator[Finding]:
    """A request's own time is understood."""
    reply = site.classify(good_image(), headers={"X-Request-Timeout-Ms": "1"})
    late = reply.status == 504 and reply.problem is not None
    yield judged(
        "deadline: 1 ms",
        late or reply.prediction is not None,
        expected="504, or an answer in time",
        came=reply.said,
        advice="something between here and the server answers in its place, or it is none of ours",
    )
    wrong = site.classify(good_image(), headers={"X-Request-Timeout-Ms": "soon"})
    yield judged(
        "deadline: no number",
        wrong.is_refusal,
        expected="a 4xx problem",
        came=wrong.said,
        advice="the header X-Request-Timeout-Ms does not arrive: let the proxy pass it on",
    )


def check_addresses(site: Site) -> Iterator[Finding]:
    """No image is fetched from where only the server can reach (SSRF)."""
    with socket.create_server(("127.0.0.1", 0)) as trap:
        port = trap.getsockname()[1]
        urls = [url.format(port=port) for url in PRIVATE]
        images = [{"url": url} for url in urls]
        body = {"images": images, "model": "base", "labels": list(LABELS)}
        reply = site.ask("POST", "/v1/classify", json=body)
        inputs = {"model": "base", "input": urls[0], "modality": "image"}
        embedded = site.ask("POST", "/v1/embeddings", json=inputs)
        caught = _was_called(trap)
    passed = _not_refused(urls, reply)
    yield judged(
        "addresses: private ones refused",
        not passed,
        expected=f"url_refused for {len(urls)} addresses",
        came="all refused" if not passed else f"{reply.said}; let through: {', '.join(passed)}",
        advice="set MEDLEY_IMAGE_URLS=false, or name no such network in MEDLEY_IMAGE_URL_NETWORKS",
    )
    yield judged(
        "addresses: embeddings",
        400 <= embedded.status < 500,
        expected="a 4xx",
        came=embedded.said,
        advice="as above",
    )
    yield judged(
        "addresses: nobody calls",
        not caught,
        expected="no connection to a port of this machine",
        came="a connection" if caught else "none",
        advice="the server fetches from the machine that it runs on: switch URLs off",
    )


def same(one: object, other: object) -> bool:
    """Whether two results are predictions that agree."""
    if not (isinstance(one, Prediction) and isinstance(other, Prediction)):
        return False
    ours, theirs = _probabilities(one), _probabilities(other)
    return ours.keys() == theirs.keys() and all(
        abs(probability - theirs[label]) <= TOLERANCE for label, probability in ours.items()
    )


def _poisoned(site: Site, name: str, poison: Poison) -> Finding:
    reply = site.classify(poison.data)
    ready = site.ask("GET", "/readyz", bearer="")
    answered = poison.readable and reply.prediction is not None
    return judged(
        f"poison: {name}",
        (answered or reply.is_refusal) and ready.status == 200,
        expected="a 4xx problem, or an answer" if poison.readable else "a 4xx problem",
        came=reply.said if ready.status == 200 else f"{reply.said}, then not ready: {ready.said}",
        advice=f"look into the server's log for request {_request_id(reply)}",
    )


def _not_refused(urls: Sequence[str], reply: Reply) -> list[str]:
    answer = reply.read(ClassifyResponse) if reply.status == 200 else None
    if answer is None or len(answer.results) != len(urls):
        return [] if reply.problem and reply.problem.code == "url_refused" else list(urls)
    return [
        url
        for url, result in zip(urls, answer.results, strict=True)
        if not (isinstance(result, Failure) and result.error.code == "url_refused")
    ]


def _was_called(trap: socket.socket) -> bool:
    trap.settimeout(0.05)
    try:
        connection, _ = trap.accept()
    except TimeoutError:
        return False
    connection.close()
    return True


def _probabilities(prediction: Prediction) -> dict[str, float]:
    return {choice.label: choice.probability for choice in prediction.top_k}


def _told(result: object) -> str:
    if isinstance(result, Prediction):
        return f"{result.label} {result.probability:.4f}"
    return result.error.code if isinstance(result, Failure) else "no answer"


def _request_id(reply: Reply) -> str:
    return reply.headers.get("x-request-id", "(it gave no id)")
