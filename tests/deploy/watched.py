"""A real Prometheus with our configuration and rules, in time that a test has."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import yaml

from tests.deploy.manifests import ROOT, tool
from tests.redis_server import free_port
from tests.replicas.cluster import eventually

__all__ = ["Pace", "Prometheus", "watching"]


@dataclass(frozen=True)
class Pace:
    """How much faster than in operation: windows of rates and how long alerts wait.

    `scrape` is how often it looks; `windows` replaces ranges in rules, `waits` the alerts' `for`;
    an empty one leaves what the rules say.
    """

    scrape: str = "1s"
    windows: Mapping[str, str] = field(default_factory=dict)
    waits: str = ""


@dataclass(frozen=True)
class Prometheus:
    """A server that scrapes."""

    url: str
    http: httpx.Client

    def value(self, query: str) -> float | None:
        """The value of the first series of an expression."""
        answer = self.http.get("/api/v1/query", params={"query": query}).json()
        found = answer["data"]["result"]
        return float(found[0]["value"][1]) if found else None

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        alerts = self.http.get("/api/v1/alerts").json()["data"]["alerts"]
        return {one["labels"]["alertname"] for one in alerts if one["state"] == "firing"}


@contextmanager
def watching(
    folder: Path, targets: Mapping[str, str], *, pace: Pace, key: str = ""
) -> Iterator[Prometheus]:
    """Run Prometheus while the block runs.

    Args:
        folder: for its configuration and data.
        targets: host and port by the name that the server gets as `instance`.
        pace: of scrapes and rules.
        key: the read key of the servers.
    """
    config = _configure(folder, targets, pace, key)
    address = f"127.0.0.1:{free_port()}"
    command = [
        tool("prometheus", "Debian's prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=30) as http:
            told = folder / "log"
            eventually(lambda: _is_ready(http), what=told.read_text()[-2000:])
            yield Prometheus(str(http.base_url), http)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _configure(folder: Path, targets: Mapping[str, str], pace: Pace, key: str) -> Path:
    """Copy our configuration, and change nothing in it but times, targets and the key's place."""
    shutil.copytree(ROOT / "deploy" / "prometheus", folder, dirs_exist_ok=True)
    path = folder / "prometheus.yml"
    config = yaml.safe_load(path.read_text())
    times = {"scrape_interval": pace.scrape, "scrape_timeout": pace.scrape}
    config["global"] |= times | {"evaluation_interval": pace.scrape}
    (folder / "key").write_text(key)
    config["scrape_configs"][0]["authorization"]["credentials_file"] = "key"
    path.write_text(yaml.safe_dump(config))
    groups = [
        {"targets": [at], "labels": {"instance": name}} for name, at in sorted(targets.items())
    ]
    (folder / "targets" / "medley.yml").write_text(yaml.safe_dump(groups))
    for rules in (folder / "rules").glob("*.yml"):
        rules.write_text(_hastened(rules.read_text(), pace))
    return path


def _hastened(rules: str, pace: Pace) -> str:
    for window, shorter in pace.windows.items():
        rules = rules.replace(f"[{window}]", f"[{shorter}]")
        rules = rules.replace(f"offset {window}", f"offset {shorter}")
    return re.sub(r"(\n +for: )\d+m\b", rf"\g<1>{pace.waits}", rules) if pace.waits else rules


def _is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False
