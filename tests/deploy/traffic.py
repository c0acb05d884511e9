"""All sorts of requests and changes, so that everything that is measured has something to show."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import numpy as np
from PIL import Image

from tests.replicas.cluster import Cluster, Replica
from tests.service.conftest import MakeBundle
from tests.service.load import Tally, loading
from tests.service.raw import Raw, post

__all__ = ["SETTINGS", "asking", "picture", "register", "stir"]

# Few paths, so that versions leave for others; larger batches; some images kept.
SETTINGS: dict[str, Any] = {
    "buckets": (1, 2, 4, 8),
    "paths": 6,
    "max_wait_ms": 20.0,
    "reservoir": 20,
    "heartbeat_s": 2.0,
}
# Such that each refuses some pictures, and some are nobody's.
THRESHOLDS = {"birds": 32.6, "ships": 14.0, "tools": 9.75}
PNG = "image/png"


def register(at: Replica, make: MakeBundle) -> None:
    """Three tasks; candidates for two, of which one is bad; and a version that is refused."""
    for seed, (task, threshold) in enumerate(THRESHOLDS.items()):
        _put(at, task, "1", make(task=task, seed=seed, threshold=threshold)[1]).raise_for_status()
    _try(at, "birds", make(task="birds", version="2", seed=0, threshold=33.0)[1])
    other = make(task="ships", version="2", seed=7, threshold=14.0)[1]
    _try(at, "ships", other, min_images=5, max_disagreement=0.0)
    bad = make(task="ships", version="bad", self_test_error=1.0)[1]
    assert _put(at, "ships", "bad", bad).status_code == 422


def stir(at: Replica, make: MakeBundle, *, turn: int) -> None:
    """Register what nobody needs: it pushes another version off the device; remove an older one."""
    version = f"draft-{turn % 8}"
    data = make(task="tools", version=version, seed=10 + turn % 8)[1]
    _put(at, "tools", f"{version}?activate=false", data).raise_for_status()
    if turn >= 4:
        at.http.delete(f"/v1/tasks/tools/versions/draft-{(turn - 4) % 8}").raise_for_status()


@contextmanager
def asking(cluster: Cluster, *, per_s: float, clients: int = 4) -> Iterator[Sequence[Tally]]:
    """Ask every replica while the block runs, so often a second each."""
    with ExitStack() as stack:
        tallies = []
        for number, replica in enumerate(cluster.all):
            requests = _mixed(number)
            load = loading(replica.url, requests, clients=clients, per_s=per_s)
            tallies.append(stack.enter_context(load))
            _misbehave(replica.url)
        yield tallies


def picture(seed: int) -> bytes:
    """A PNG of one colour with more or less noise: tasks know some better than others."""
    random = np.random.default_rng(seed)
    colour, noise = random.integers(0, 256, 3), random.integers(0, 120)
    pixels = np.clip(colour + random.normal(0, 1, (36, 40, 3)) * noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _mixed(seed: int) -> list[tuple[str, bytes]]:
    """A round of requests: most are left to DDAS, some know what they want, some are wrong."""
    pictures = [picture(100 * seed + number) for number in range(12)]
    several = [{"bytes_b64": base64.b64encode(one).decode()} for one in pictures]
    found = [("auto", post("/v1/classify", one, content_type=PNG)) for one in pictures]
    first = pictures[0]
    found[3:3] = [("task", post("/v1/classify?model=ships", first, content_type=PNG))]
    found[6:6] = [("base", post("/v1/classify?model=base", first, content_type=PNG))]
    words = "/v1/classify?labels=cat&labels=dog&labels=hamster"
    found[8:8] = [("labels", post(words, first, content_type=PNG))]
    found[9:9] = [("unknown", post("/v1/classify?model=nobody", first, content_type=PNG))]
    found[11:11] = [("damaged", post("/v1/classify", first[:200], content_type=PNG))]
    body = json.dumps({"images": several}).encode()
    found.append(("several", post("/v1/classify", body, content_type="application/json")))
    found.append(("embedding", post("/v1/route", first, content_type=PNG)))
    return found


def _misbehave(url: str) -> None:
    """Speak something else than HTTP."""
    with Raw(url) as raw:
        raw.send(b"hello\r\n\r\n")
        raw.rest()


def _try(at: Replica, task: str, data: bytes, **rollout: object) -> None:
    """Begin a rollout of version 2 of a task."""
    _put(at, task, "2?activate=false", data).raise_for_status()
    wanted = {"version": "2", "share": 0.5, "mode": "shadow"} | rollout
    at.http.put(f"/v1/tasks/{task}/rollout", json=wanted).raise_for_status()


def _put(at: Replica, task: str, version: str, data: bytes) -> httpx.Response:
    return at.http.put(f"/v1/tasks/{task}/versions/{version}", content=data)
