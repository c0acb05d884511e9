"""Replicas whose clocks are days apart: nothing that matters goes by the time of day.

One runs under libfaketime, which shifts what every library in its process is told.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from email.utils import parsedate_to_datetime

import httpx
import pytest

from tests.replicas.cluster import QUICK, Cluster, eventually
from tests.replicas.witness import Witness
from tests.service.conftest import ROOT, MakeBundle
from tests.service.versions.test_tasks import put

HOUR_S = 3600.0


def test_a_replica_that_lives_two_days_ahead_changes_nothing(
    cluster: Cluster, witness: Witness, make: MakeBundle, image: bytes
) -> None:
    (now,) = cluster.start_all("now")
    witness.prepare(now, make)
    with ExitStack() as stack:
        ahead = answering(begin_shifted(cluster, "+2d", stack), stack)
        assert time_of(ahead) - time_of(now.http) > 47 * HOUR_S, "libfaketime does nothing here"

        with witness.watching(now):
            generations = []
            for number, at in enumerate((ahead, now.http, ahead, now.http)):
                data = make(task="pets", version=str(number), seed=4 + number)[1]
                answer = put(at, data, "pets", str(number))
                assert answer.status_code == 201, answer.text
                assert answer.json()["live"] == str(number), "the last change is the last"
                generations.append(int(answer.headers["x-registry-generation"]))
            assert generations == sorted(set(generations))
            rolled_back = ahead.post("/v1/tasks/pets:rollback")
            assert rolled_back.json()["live"] == "2"
            newest = rolled_back.headers["x-registry-generation"]
            assert ask(now.http, image, newest) == ask(ahead, image, newest)
        eventually(lambda: now.metric("medley_replicas") == 2, what="nobody counts as gone")
        assert now.metric("medley_registry_lag_seconds") < HOUR_S
        seen = now.http.get("/v1/tasks/pets").json()["versions"]
        assert [one["version"] for one in seen] == ["0", "1", "2", "3"], "in the order they came"


def begin_shifted(cluster: Cluster, shift: str, stack: ExitStack) -> subprocess.Popen[str]:
    """A replica, as a new process that believes another time."""
    settings = QUICK | {
        "registry": cluster.redis.url,
        "registry_prefix": cluster.prefix,
        "bundle_store": str(cluster.bundles),
        "replica": "ahead",
    }
    program = [sys.executable, "-m", "tests.service.tiny_server", str(cluster.folder / "ahead")]
    command = [*program, *(f"{k}={v}" for k, v in settings.items())]
    environment = os.environ | {
        "LD_PRELOAD": libfaketime(),
        "FAKETIME": shift,
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # as a real clock that is set leaves it
    }
    process = stack.enter_context(
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    )
    stack.callback(process.kill)
    return process


def answering(process: subprocess.Popen[str], stack: ExitStack) -> httpx.Client:
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert url, "the server did not start"
    return stack.enter_context(httpx.Client(base_url=url, timeout=30))


def time_of(http: httpx.Client) -> float:
    """What a server takes for the time."""
    return parsedate_to_datetime(http.get("/livez").headers["date"]).timestamp()


def ask(http: httpx.Client, image: bytes, generation: str) -> object:
    headers = {"content-type": "image/png", "x-min-generation": generation}
    answer = http.post("/v1/classify?model=pets", content=image, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def libfaketime() -> str:
    """Where the library is; skips the test if it is not, where that is not a failure."""
    program = shutil.which("faketime")
    if program is None and os.environ.get("CI") == "true":
        pytest.fail("no faketime: install the package faketime")
    if program is None:
        pytest.skip("no faketime: install the package faketime")
    asked = [program, "-f", "+0", "printenv", "LD_PRELOAD"]
    return subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
