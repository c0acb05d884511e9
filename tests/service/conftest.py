"""Servers for the service's tests: one shared process, others on demand, apps in this process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from starlette.testclient import TestClient

from medley.backbone import Backbone
from medley.bundle import Bundle
from service.app import create_app
from service.settings import Settings
from tests.models import tiny_backbone
from tests.redis_server import RedisServer
from tests.redis_server import redis_server as running_redis
from tests.service.made import image_bytes, make_bundle

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class ServerProcess:
    """A server that runs as a process of its own."""

    process: subprocess.Popen[str]
    url: str
    store: Path

    def client(self) -> httpx.Client:
        """A new client of it."""
        return httpx.Client(base_url=self.url, timeout=30)


@contextmanager
def running_server(store: Path, *settings: str) -> Iterator[ServerProcess]:
    command = [sys.executable, "-m", "tests.service.tiny_server", str(store), *settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            assert url, "the server did not start"
            yield ServerProcess(process, url, store)
        finally:
            process.terminate()  # in order, so that what it ran is counted in the coverage


StartServer = Callable[..., AbstractContextManager[ServerProcess]]


@pytest.fixture(scope="session")
def start_server() -> StartServer:
    """Start a server process on a store folder, with settings as in "drain_s=1"; a `with` block."""
    return running_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server that many tests share: each uses task names of its own."""
    with running_server(tmp_path_factory.mktemp("store")) as started:
        yield started


@pytest.fixture(scope="session")
def keyed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Another with the admin key "sesame", which gets bundles from the folder store/sources."""
    store = tmp_path_factory.mktemp("keyed")
    sources = store / "sources"
    sources.mkdir()
    with running_server(store, "admin_key=sesame", f"bundle_sources={sources}") as started:
        yield started


@pytest.fixture(scope="session")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    """A client of the shared server."""
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    """The tiny backbone, as every test server has it."""
    return tiny_backbone()


OpenApp = Callable[..., AbstractContextManager[httpx.Client]]


@pytest.fixture
def open_app(tmp_path: Path, backbone: Backbone) -> OpenApp:
    """An app in this process on a store folder of the test's own; settings may be given."""

    @contextmanager
    def opened(**fields: object) -> Iterator[httpx.Client]:
        settings = Settings.model_validate(
            {"store": tmp_path / "store", "buckets": (4,), "_env_file": None} | fields
        )
        with TestClient(create_app(settings, backbone=backbone)) as client:
            yield cast(httpx.Client, client)  # it is one of httpx2, the same to its users

    return opened


MakeBundle = Callable[..., tuple[Bundle, bytes]]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> MakeBundle:
    """Make a bundle that the servers here admit; returns it and its bytes. Each is made once."""
    folder = tmp_path_factory.mktemp("bundles")
    kept: dict[str, tuple[Bundle, bytes]] = {}

    def made(**fields: Any) -> tuple[Bundle, bytes]:
        key = repr(sorted(fields.items(), key=lambda field: field[0]))
        if key not in kept:
            path = folder / f"{len(kept)}.safetensors"
            bundle = make_bundle(path, **({"backbone": backbone} | fields))
            kept[key] = bundle, path.read_bytes()
        return kept[key]

    return made


@pytest.fixture(scope="session")
def image() -> bytes:
    """A PNG that every server can read."""
    return image_bytes(seed=1)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis that many tests share: each uses a prefix of its own, and leaves it running."""
    with running_redis(tmp_path_factory.mktemp("redis")) as started:
        yield started
