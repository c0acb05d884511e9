"""The servers that are measured, each a process of its own on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from service.bench.load import LoadError

__all__ = ["Server", "free_port", "infinity_server", "medley_server"]

START_S, STOP_S, POLL_S = 300.0, 30.0, 0.1
MEDLEY = (sys.executable, "-c", "from medley.cli import main; main()", "serve")
INFINITY = ("-W", "ignore", "-c", "from infinity_emb.cli import cli; cli()", "v2")
ALIKE = {"OMP_WAIT_POLICY": "PASSIVE"}  # what `medley` sets for itself, for every server


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    name: str
    url: str
    process: psutil.Process

    def cpu_s(self) -> float:
        """Processor time that it has taken so far, all threads.

        Raises:
            LoadError: it has ended.
        """
        try:
            times = self.process.cpu_times()
        except psutil.NoSuchProcess as error:
            raise LoadError(f"{self.name} has ended while it was under load") from error
        return float(times.user + times.system)

    def rss_bytes(self) -> int:
        """Its memory."""
        return int(self.process.memory_info().rss)


@contextmanager
def medley_server(
    store: Path, log: Path, settings: Mapping[str, str | int | float]
) -> Iterator[Server]:
    """Serve with `medley serve` on a free port.

    Args:
        store: its folder.
        log: file for what it says.
        settings: by the names of docs/settings.md, without prefix, lower case.

    Raises:
        LoadError: it does not start.
    """
    port = free_port()
    environment = {f"MEDLEY_{name.upper()}": str(value) for name, value in settings.items()}
    command = [*MEDLEY, "--port", str(port), "--store", str(store)]
    with _running("medley", command, environment, log, port, "/readyz") as server:
        yield server


@contextmanager
def infinity_server(python: Path, model: Path, log: Path) -> Iterator[Server]:
    """Serve a folder of `transformers` with infinity, as its own command line does.

    Args:
        python: of an environment that has infinity_emb.
        model: the folder, which is the name of the model too.
        log: file for what it says.

    Raises:
        LoadError: it does not start.
    """
    port = free_port()
    command = [str(python), *INFINITY, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model-id", str(model), "--served-model-name", model.name]
    command += ["--device", "cpu", "--engine", "torch", "--log-level", "warning"]
    command += ["--no-model-warmup"]  # with texts; here images warm it up
    environment = {
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "INFINITY_HOME": str(model.parent),
    }
    with _running("infinity", command, environment, log, port, "/health") as server:
        yield server


@contextmanager
def _running(
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    port: int,
    probe: str,
) -> Iterator[Server]:
    ours = {k: v for k, v in os.environ.items() if not k.startswith("MEDLEY_")}
    url = f"http://127.0.0.1:{port}"
    with (
        log.open("w") as said,
        subprocess.Popen(
            command, env={**ours, **ALIKE, **environment}, stdout=said, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            _wait_until_ready(process, url + probe, log)
            yield Server(name, url, psutil.Process(process.pid))
        finally:
            _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], probe: str, log: Path) -> None:
    deadline_s = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline_s:
        try:
            if httpx.get(probe, timeout=5).is_success:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(POLL_S)
    said = log.read_text(errors="replace").strip().splitlines() or ["(nothing)"]
    raise LoadError(f"the server at {probe} did not get ready; it said: {said[-1]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
