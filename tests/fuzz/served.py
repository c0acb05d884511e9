"""The same damage over HTTP, to a server that runs: no 5xx, no hang, no lost connection."""

from __future__ import annotations

import base64
import json
import re
import tempfile
from pathlib import Path
from random import Random

from tests.fuzz.images import Images
from tests.fuzz.mutation import mutated
from tests.service.made import image_bytes, make_bundle
from tests.service.raw import Raw, post

__all__ = ["IMAGES_PER_REQUEST", "Requests", "Served", "Uploads"]

IMAGES_PER_REQUEST = 64
TIMEOUT_S = 120.0
PLACE = "/v1/tasks/fuzzed/versions/1"
_STATUS = re.compile(rb"^HTTP/1\.1 (\d\d\d) ", re.MULTILINE)
_HEAD = b"Host: x\r\nUser-Agent: fuzz/1\r\nAccept: */*\r\nX-Request-Id: abc-1\r\n"


class Served:
    """Requests with many damaged pictures each."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._images = Images()

    def make(self, random: Random) -> bytes:
        """One JSON body."""
        mutants = (self._images.make(random) for _ in range(IMAGES_PER_REQUEST))
        images = [{"bytes_b64": base64.b64encode(mutant).decode()} for mutant in mutants]
        return json.dumps({"images": images, "model": "base", "labels": ["a", "b"]}).encode()

    def check(self, data: bytes) -> str:
        """Every picture has labels or a problem that is its own fault."""
        request = post("/v1/classify", data, content_type="application/json")
        with Raw(self._url, timeout_s=TIMEOUT_S) as raw:
            answer = raw.ask(request)
        assert answer.status == 200, answer.body[:300]
        results = answer.json()["results"]
        assert len(results) == IMAGES_PER_REQUEST
        refused = [result["error"] for result in results if "error" in result]
        assert all(400 <= error["status"] < 500 for error in refused)
        return "answered"


class Uploads:
    """Damaged bundles as a registration."""

    def __init__(self, url: str) -> None:
        self._url = url
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bundle"
            make_bundle(path, task="fuzzed")
            self._corpus = [path.read_bytes()]

    def make(self, random: Random) -> bytes:
        """One mutant."""
        return mutated(self._corpus[0], self._corpus, random)

    def check(self, data: bytes) -> str:
        """It is the bundle, or it is refused."""
        request = post(PLACE, data, content_type="application/octet-stream")
        with Raw(self._url, timeout_s=TIMEOUT_S) as raw:
            answer = raw.ask(request.replace(b"POST", b"PUT", 1))
        assert answer.status in (200, 201, 422), answer.body[:300]
        assert (answer.status < 400) == (data in self._corpus)
        return str(answer.json().get("code", "registered"))


class Requests:
    """Damaged requests, headers and all, each on a connection of its own."""

    def __init__(self, url: str) -> None:
        self._url = url
        form = (
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n%s\r\n'
            b'--x\r\nContent-Disposition: form-data; name="labels"\r\n\r\na\r\n--x--\r\n'
        ) % image_bytes(0)
        ask = "/v1/classify?model=base&labels=a"
        chunked = b"POST %s HTTP/1.1\r\n%sTransfer-Encoding: chunked\r\n" % (ask.encode(), _HEAD)
        self._corpus = [
            *(b"GET %s HTTP/1.1\r\n%s\r\n" % (path, _HEAD) for path in _PATHS),
            post(ask, image_bytes(1), content_type="image/png"),
            post("/v1/classify?labels=a", form, content_type="multipart/form-data; boundary=x"),
            post("/v1/classify", b'{"images": []}', content_type="application/json"),
            chunked + b"Content-Type: image/png\r\n\r\n5\r\nhello\r\n0\r\nX: y\r\n\r\n",
            b"PUT /v1/tasks/a/versions/1 HTTP/1.1\r\n" + _HEAD + b"Content-Length: 3\r\n\r\nabc",
            b"DELETE /v1/tasks/none HTTP/1.1\r\n" + _HEAD + b"\r\n",
        ]

    def make(self, random: Random) -> bytes:
        """One mutant."""
        return mutated(random.choice(self._corpus), self._corpus, random)

    def check(self, data: bytes) -> str:
        """Answers, if there are any, blame the client; the server closes when the client does."""
        with Raw(self._url, timeout_s=TIMEOUT_S) as raw:
            try:
                raw.send(data)
                raw.end()
                heard = raw.rest()
            except ConnectionError:
                return "reset"
        statuses = _STATUS.findall(heard)
        assert not any(status.startswith(b"5") for status in statuses), heard[:300]
        return statuses[0].decode() if statuses else "closed"


_PATHS = (
    *(b"/livez", b"/readyz", b"/metrics", b"/openapi.json", b"/v1/tasks", b"/v1/tasks/none"),
    *(b"/v1/models", b"/v2", b"/v2/models/none/ready", b"/v1/operations/1", b"/%41?a=%zz&b"),
)
