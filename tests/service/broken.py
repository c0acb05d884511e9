"""Servers that are wrong in one way each, for the doctor to find out; the rest is made up."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from PIL import Image

__all__ = ["Broken", "served"]

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]
PREDICTION = {
    "label": "a cat",
    "probability": 1.0,
    "top_k": [{"label": "a cat", "probability": 1.0}],
    "path": {"kind": "zero_shot"},
    "routed_by": "explicit",
    "label_set": "request",
}


@dataclass
class Broken:
    """An ASGI app that answers every path.

    Args:
        on_bad_image: the status of an image that cannot be read.
        dies: whether a bad image takes readiness away.
        generation: that it says it serves.
        date: of its clock, instead of none.
        fetches: whether it gets images by URL from anywhere.
        drifts: whether an answer depends on how many came before it.
        everything: what it answers to all requests, whatever they are.
        overlooks: whether it answers without having the generation that is asked for.
        replicas: that it knows, more or less as /v1/replicas has them.
    """

    on_bad_image: int = 422
    dies: bool = False
    generation: int = 1
    date: str = ""
    fetches: bool = False
    drifts: bool = False
    everything: int = 0
    overlooks: bool = False
    replicas: Sequence[Mapping[str, Any]] = ()
    dead: bool = field(default=False, init=False)
    count: int = field(default=0, init=False)

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        asked = dict(scope["headers"]).get(b"x-min-generation", b"0").decode()
        status, answer = self.answer(scope["path"], body)
        if not self.overlooks and not self.everything and not asked.isdecimal():
            status, answer = 422, problem(422)
        elif not self.overlooks and not self.everything and int(asked) > self.generation:
            status, answer = 503, problem(503) | {"code": "behind"}
        kind = "application/json" if status < 400 else "application/problem+json"
        headers = {"content-type": kind, "x-registry-generation": str(self.generation)}
        headers |= {"date": self.date} if self.date else {}
        headers |= {"retry-after": "1"} if status == 503 else {}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if self.everything:
            return self.everything, {"ok": True}
        if path == "/readyz" and self.dead:
            return 503, problem(503)
        if path == "/readyz":
            return 200, {"ready": True, "generation": self.generation, "fingerprint": "sha256:1"}
        if path == "/v1/replicas":
            return 200, {"generation": self.generation, "replicas": [*map(replica, self.replicas)]}
        if path != "/v1/classify":
            return 200, {"live": True, "started": True}
        return self._classified(body)

    def _classified(self, body: bytes) -> tuple[int, Any]:
        if body.startswith(b"{"):
            images = json.loads(body)["images"]
            return 200, {"generation": 1, "results": [self._fetched(one) for one in images]}
        try:
            with Image.open(io.BytesIO(body)) as image:
                image.load()
        except (OSError, SyntaxError, Image.DecompressionBombWarning):
            self.dead |= self.dies
            return self.on_bad_image, problem(self.on_bad_image)
        self.count += self.drifts
        drifted = {"label": f"a cat {self.count}", "probability": 1.0}
        result = PREDICTION | ({"top_k": [drifted]} if self.drifts else {})
        return 200, {"generation": 1, "results": [result]}

    def _fetched(self, image: Mapping[str, str]) -> Any:
        if self.fetches and image["url"].startswith("http://127.0.0.1:"):
            port = int(image["url"].rpartition(":")[2].strip("/") or 80)
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
        return {"error": problem(422) | {"code": "fetch_failed" if self.fetches else "url_refused"}}


def replica(told: Mapping[str, Any]) -> dict[str, Any]:
    """A replica that has nothing and wants nothing, but for what is told of it."""
    plain = {"this": False, "phase": "ready", "generation": 1, "version": "1", "since": "now"}
    plain |= {"fingerprint": "sha256:1", "versions": {}, "lacking": [], "name": told["id"]}
    return plain | {"ready": told.get("phase", "ready") == "ready"} | dict(told)


def problem(status: int) -> dict[str, Any]:
    fields = {"title": "no", "code": "no", "detail": "no"}
    return {"type": "about:blank", "status": status} | fields


@contextmanager
def served(app: Broken) -> Iterator[str]:
    """Serve an app from a thread of this process."""
    config = uvicorn.Config(
        app,
        port=0,
        lifespan="off",
        ws="none",
        log_config=None,
        log_level="critical",
        date_header=not app.date,
    )
    with config.bind_socket() as bound:
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
