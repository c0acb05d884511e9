"""A real HAProxy with the settings of deploy/compose, before servers of this machine."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.deploy.manifests import tool
from tests.redis_server import free_port

__all__ = ["SETTINGS", "haproxy", "haproxy_before"]

SETTINGS = Path(__file__).parents[2] / "deploy" / "compose" / "haproxy.cfg"


def haproxy() -> str:
    """Where the program is."""
    return tool("haproxy", "haproxy, by apt")


@contextmanager
def haproxy_before(
    ports: Mapping[str, int], folder: Path, *, look_every: str = "1s"
) -> Iterator[str]:
    """Run it before servers of these names; its URL. Nobody has waited for it yet.

    Only addresses are changed, and how often it looks at servers.
    """
    port = free_port()
    settings = SETTINGS.read_text().replace("bind :8080", f"bind 127.0.0.1:{port}")
    settings = settings.replace("check inter 1s", f"check inter {look_every}")
    for name, port_behind in ports.items():
        assert f"{name}:8000" in settings
        settings = settings.replace(f"{name}:8000", f"127.0.0.1:{port_behind}")
    file = folder / "haproxy.cfg"
    file.write_text(settings)
    with (folder / "haproxy.log").open("wb") as log:
        process = subprocess.Popen([haproxy(), "-db", "-f", str(file)], stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
