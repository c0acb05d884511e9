"""Ray Serve: our file is one of Ray's, and a real Ray serves with it, loses a replica, updates."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from pydantic import SecretStr
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from service import ray_app
from service.client import Client
from service.errors import ServiceError
from service.ray_proxy import middlewares
from service.settings import Settings
from service.wire.headers import GENERATION_HEADER
from service.wire.schemas import ClassifyOptions, ClassifyResponse
from tests.deploy.manifests import ROOT
from tests.deploy.ray_cluster import RUNS, SAYS
from tests.redis_server import RedisServer, free_port, redis_server
from tests.service.conftest import MakeBundle, backbone, image, make

__all__ = ["backbone", "image", "make"]  # the service's fixtures

CONFIG = ROOT / "deploy" / "ray" / "medley.yaml"
CONFIGURED = f"{ray_app.__name__}:app"
KEY = "sesame"
MOST_HELD = 50
BODY_S = 120  # in which a body that a test holds back may arrive


def config() -> Any:
    return yaml.safe_load(CONFIG.read_text())


def test_the_file_is_one_of_rays_and_names_our_application() -> None:
    from ray.serve.schema import ServeDeploySchema

    checked = ServeDeploySchema.model_validate(config())
    (application,) = checked.applications
    assert application.import_path == CONFIGURED
    (deployment,) = application.deployments
    assert deployment.name == ray_app.app._bound_deployment.name
    _assert_known(config()["applications"][0]["deployments"][0], deployment)
    _assert_known(config()["applications"][0], application)
    _assert_known(config()["http_options"], checked.http_options)


def test_the_file_says_nothing_that_the_settings_contradict() -> None:
    (application,) = config()["applications"]
    given = application["runtime_env"]["env_vars"]
    ours = {
        name.removeprefix("MEDLEY_").lower(): v for name, v in given.items() if "MEDLEY" in name
    }
    settings = Settings.model_validate(ours)  # an unknown name or a wrong value raises
    (deployment,) = application["deployments"]
    assert deployment["graceful_shutdown_timeout_s"] > settings.request_timeout_s
    assert deployment["max_ongoing_requests"] <= settings.queue_limit
    assert deployment["autoscaling_config"]["min_replicas"] >= 2
    assert deployment["max_surge_percent"] > 0, "an update would take a replica away first"
    secret = {f"MEDLEY_{name.upper()}" for name in ("admin_key", "read_key", "registry_password")}
    assert not secret & set(given)


def test_replicas_without_a_shared_registry_do_not_start() -> None:
    with pytest.raises(ServiceError, match="MEDLEY_REGISTRY"):
        ray_app.replica_settings()


def test_each_replica_of_a_machine_takes_a_folder_and_leaves_it_at_its_end(tmp_path: Path) -> None:
    code = "import sys; from service.ray_app import own_folder; from pathlib import Path;"
    code += "print(own_folder(Path(sys.argv[1])).name, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "replica-1"
        assert ray_app.own_folder(tmp_path).name == "replica-2"
        other.kill()
    assert ray_app.own_folder(tmp_path).name == "replica-1"


def _asked(app: ASGIApp) -> httpx.Response:
    """What comes out of Ray's proxy where `app` is what it makes of the replicas' answers."""

    (middleware,) = middlewares()

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(middleware.cls(app, *middleware.args, **middleware.kwargs))
        async with httpx.AsyncClient(transport=transport, base_url="http://ray") as client:
            return await client.get("/")

    return asyncio.run(ask())


async def _silent(scope: Scope, receive: Receive, send: Send) -> None:
    """As Ray's proxy is where a replica took the request with it."""


@pytest.mark.parametrize("app", [_silent, PlainTextResponse("no replicas", status_code=503)])
def test_what_rays_proxy_answers_for_a_lost_replica_may_be_asked_again(app: ASGIApp) -> None:
    answer = _asked(app)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "replica_lost"


@pytest.mark.parametrize("status", [200, 500, 503])
def test_what_a_replica_has_written_passes_rays_proxy_as_it_is(status: int) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"code": '
        yield b'"internal"}'

    ours = {GENERATION_HEADER: "7"}
    answer = _asked(JSONResponse({"code": "internal"}, status, ours))
    assert (answer.status_code, answer.json()) == (status, {"code": "internal"})
    answer = _asked(StreamingResponse(pieces(), status, ours))
    assert (answer.status_code, answer.json()) == (status, {"code": "internal"})


@dataclass(frozen=True)
class RayProcess:
    """A Ray of the test's own, and the application on it."""

    process: subprocess.Popen[str]
    url: str
    files: Path
    config: Mapping[str, Any]

    def client(self) -> Client:
        return Client(self.url, key=SecretStr(KEY), timeout_s=60, retries=8)

    def deploy(self, **variables: str) -> None:
        """Deploy it, with more variables than before; returns when it runs everywhere."""
        config = json.loads(json.dumps(self.config))
        config["applications"][0]["runtime_env"]["env_vars"] |= variables
        path = self.files / f"config-{len(variables)}.yaml"
        path.write_text(yaml.safe_dump(config))
        assert self.process.stdin is not None
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        self.await_running()

    def await_running(self) -> None:
        assert self.process.stdout is not None
        said = next((line for line in self.process.stdout if line.startswith(SAYS)), "nothing")
        assert said.strip() == RUNS, _logs(self.files)

    def replicas(self) -> list[psutil.Process]:
        """The processes of the replicas."""
        return [one for one in _below(self.process.pid) if "ServeReplica" in _title(one)]


@contextmanager
def running_ray(
    files: Path, redis: RedisServer, application_at: str = "tests.deploy.tiny_ray:app"
) -> Iterator[RayProcess]:
    """Run our file on this machine: smaller, with the tiny backbone, two replicas, one proxy."""
    port = free_port()
    small = config()
    small["proxy_location"] = "HeadOnly"
    small["http_options"] |= {"host": "127.0.0.1", "port": port}
    (application,) = small["applications"]
    application["import_path"] = application_at
    application["runtime_env"]["env_vars"] |= {
        "MEDLEY_REGISTRY": redis.url,
        "MEDLEY_REGISTRY_PREFIX": files.name,
        "MEDLEY_BUNDLE_STORE": str(files / "shared"),
        "MEDLEY_STORE": str(files / "own"),
        "MEDLEY_LOG_LEVEL": "warning",
        "MEDLEY_BUCKETS": "4",
        "MEDLEY_POLL_S": "0.5",
        "MEDLEY_BODY_TIMEOUT_S": str(BODY_S),
        "MEDLEY_REQUEST_TIMEOUT_S": str(BODY_S),
    }
    (deployment,) = application["deployments"]
    del deployment["autoscaling_config"]
    deployment |= {"num_replicas": 2, "health_check_period_s": 1}
    deployment["ray_actor_options"] = {"num_cpus": 0.5}
    path = files / "config.yaml"
    path.write_text(yaml.safe_dump(small))
    command = [sys.executable, "-m", "tests.deploy.ray_cluster", str(files), str(path)]
    environment = os.environ | {
        "MEDLEY_ADMIN_KEY": KEY,
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",  # Ray would write one into the user's home
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "service.ray_proxy:middlewares",
    }
    pipe = subprocess.PIPE
    with (
        (files / "errors").open("w") as errors,
        subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=errors, text=True, cwd=ROOT, env=environment
        ) as process,
    ):
        below: list[psutil.Process] = []
        try:
            ray = RayProcess(process, f"http://127.0.0.1:{port}", files, small)
            ray.await_running()
            yield ray
            below = _below(process.pid)
            assert process.stdin is not None
            process.stdin.close()  # in order: replicas drain, Ray ends
            assert process.wait(timeout=120) == 0, _logs(files)
            _until(lambda: all(map(_ended, below)))  # nothing of Ray stays
        finally:
            for one in [*below, *_below(process.pid)]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            process.kill()


@pytest.fixture
def ray_files() -> Iterator[Path]:
    """A folder with a short name: Ray's sockets are in it, whose names get 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.mark.slow
def test_two_replicas_share_what_is_registered_and_no_request_is_lost_with_one_of_them(
    ray_files: Path, make: MakeBundle, image: bytes
) -> None:
    _, pets = make(task="pets")
    _, birds = make(task="birds", seed=7, class_names=("crow", "owl"))
    with (
        redis_server(ray_files / "redis") as redis,
        running_ray(ray_files, redis) as ray,
        ray.client() as client,
    ):
        (ray_files / "pets").write_bytes(pets)
        (ray_files / "birds").write_bytes(birds)
        client.register("pets", "1", ray_files / "pets")
        wanted = _answer(client, image)
        assert wanted["label"] in {"cat", "dog", "hamster"}
        _until(lambda: len(_names(ray)) == 2)

        with _holding(ray, image) as (held, release), _asking(ray, image) as answers:
            first, second = ray.replicas()
            first.kill()
            release()
            client.register("birds", "1", ray_files / "birds")
            names = _names(ray)
            _until(lambda: len(_names(ray) - names) == 1)  # there is a new one
            _until(lambda: _tasks(ray) == [["birds", "pets"]] * 2)
            assert second.is_running()

            old = {one.pid for one in ray.replicas()}
            ray.deploy(MEDLEY_LABEL_CACHE="64")  # another setting is a rolling update
            assert not old & {one.pid for one in ray.replicas()}
            _until(lambda: _tasks(ray) == [["birds", "pets"]] * 2)
        assert answers
        assert all(answer == wanted for answer in answers)
        assert {one.status_code for one in held} == {200, 503}, [one.text for one in held]
        lost = next(one for one in held if one.status_code == 503)
        assert (lost.json()["code"], lost.headers["retry-after"]) == ("replica_lost", "1")
        own = [path for path in (ray_files / "own").iterdir() if path.is_dir()]
        assert len(own) in (3, 4)  # of five replicas: two, the update's, and one that still drained


@pytest.mark.slow
def test_the_demo_is_served_by_two_replicas_and_goes_on_when_one_dies(
    ray_files: Path, tmp_path: Path
) -> None:
    pictures = sorted((ROOT / "demo" / "fashion" / "test").rglob("*.png"))
    image = pictures[0].read_bytes()
    with (
        redis_server(ray_files / "redis") as redis,
        running_ray(ray_files, redis, CONFIGURED) as ray,
        ray.client() as client,
    ):
        client.register("fashion", "1", _learnt("fashion", tmp_path))
        wanted = _answer(client, image, "fashion")
        _until(lambda: _tasks(ray) == [["fashion"]] * 2)
        with _asking(ray, image, "fashion") as answers:
            ray.replicas()[0].kill()
            client.register("flags", "1", _learnt("flags", tmp_path))
            _until(lambda: _tasks(ray) == [["fashion", "flags"]] * 2)
        assert answers
        assert all(answer == wanted for answer in answers)


def _learnt(task: str, folder: Path) -> Path:
    """A bundle of the demo, learnt in a few steps."""
    command = [sys.executable, "-m", "medley", "train", str(ROOT / "demo" / task)]
    options = ["--task", task, "--version", "1", "--out", str(folder), "--iterations", "5"]
    subprocess.run([*command, *options], check=True, capture_output=True, cwd=ROOT)
    return folder / f"{task}-1.safetensors"


@contextmanager
def _holding(
    ray: RayProcess, image: bytes
) -> Iterator[tuple[list[httpx.Response], Callable[[], None]]]:
    """Have requests in both replicas that wait for their bodies, and a function that sends those.

    Their answers are complete after the block.
    """
    answers: list[httpx.Response] = []
    end = threading.Event()

    def body() -> Iterator[bytes]:
        yield image[:10]
        end.wait(BODY_S)
        yield image[10:]

    def ask() -> None:
        url, head = f"{ray.url}/v1/classify?model=pets", {"content-type": "image/png"}
        answers.append(httpx.post(url, content=body(), headers=head, timeout=2 * BODY_S))

    with ThreadPoolExecutor(MOST_HELD) as pool:
        asking: list[Future[None]] = []
        try:
            while len(_busy(ray)) < 2:  # Ray knows late how busy each of them is
                assert len(asking) < MOST_HELD
                asking.append(pool.submit(ask))
            yield answers, end.set
        finally:
            end.set()
        for one in asking:
            one.result()


def _busy(ray: RayProcess) -> set[str]:
    """The replicas that have a request beside the one that asks them; of twenty."""
    found = set()
    for _ in range(20):
        answer = httpx.get(f"{ray.url}/metrics")
        (line,) = re.findall(r"^medley_inflight_requests (\S+)$", answer.text, re.MULTILINE)
        found |= {answer.headers["x-replica"]} if float(line) > 1 else set()
    return found


@contextmanager
def _asking(
    ray: RayProcess, image: bytes, model: str = "pets"
) -> Iterator[list[Mapping[str, Any]]]:
    """Ask from four clients, which retry as ours do, until the block ends; one error ends it."""
    answers: list[Mapping[str, Any]] = []
    stop = threading.Event()

    def ask() -> None:
        with ray.client() as client:
            while not stop.is_set():
                answers.append(_answer(client, image, model))

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        try:
            yield answers
        finally:
            stop.set()
        for one in asking:
            one.result()


def _answer(client: Client, image: bytes, model: str = "pets") -> Mapping[str, Any]:
    """The answer to an image, without what differs from one request to the next."""
    answer: ClassifyResponse = client.classify([image], ClassifyOptions(model=model))
    (result,) = answer.results
    return result.model_dump()


def _names(ray: RayProcess) -> set[str]:
    """Who answers, of twenty requests."""
    return {httpx.get(f"{ray.url}/livez").headers["x-replica"] for _ in range(20)}


def _tasks(ray: RayProcess) -> list[list[str]]:
    """The tasks that each replica knows; of twenty requests."""
    known = {}
    bearer = {"Authorization": f"Bearer {KEY}"}
    for _ in range(20):
        answer = httpx.get(f"{ray.url}/v1/tasks", headers=bearer)
        tasks = answer.json()["tasks"]
        known[answer.headers["x-replica"]] = sorted(one["task"] for one in tasks)
    return list(known.values())


def _until(true: Callable[[], bool], within_s: float = 120.0) -> None:
    limit_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < limit_s
        time.sleep(0.1)


def _assert_known(given: Mapping[str, Any], schema: Any) -> None:
    """Ray passes over names that it does not know."""
    assert set(given) <= set(type(schema).model_fields)


def _below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _ended(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _logs(files: Path) -> str:
    """The end of what Ray and the replicas have written."""
    logs = [files / "errors", *files.glob("session_latest/logs/serve/*.log")]
    return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-2000:]}" for log in logs)
