"""Build the CPU image without any engine, run it, and ask it over HTTP: `make image-test`.

Debian's buildah builds; debootstrap makes the base that stands in for the registry's, so nothing is
pulled. The server runs from the image's file system as the image says (its user, its environment,
its command) with a root that cannot be written to, and must answer as a server of this checkout
does; the trainer's learns a few steps (`--target trainer`). Needs root; everything is in one folder
that is removed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from deploy.container.buildah import Buildah, make_base
from service.client import Client
from service.wire.schemas import ClassifyOptions, Prediction

ROOT = Path(__file__).parents[2]
START_S, STOP_S = 600.0, 60.0  # on a machine that does other things too
PICTURES = ROOT / "demo" / "fashion"
LABELS = ["coat", "bag", "sandal", "shirt"]
MEDLEY = Path(sys.executable).parent / "medley"
console = Console(width=100)


def main() -> None:
    """Build, look at it, run it, ask it, stop it, and say what it weighs."""
    arguments = _arguments()
    for tool in ("buildah", "debootstrap", "unshare", "chroot"):
        if shutil.which(tool) is None:
            sys.exit(f"image-test needs {tool}: apt-get install buildah debootstrap")
    if os.geteuid() != 0:
        sys.exit("image-test must run as root: it makes a base image and mounts it")
    with _images(arguments.work, keep=arguments.keep) as images:
        rows: dict[str, str] = {}
        with _timed(rows, "base image"):
            make_base(images)
        with _timed(rows, "build"):
            images.build(ROOT, arguments.target, flags=shlex.split(arguments.build_flags))
        look_at(images.config())
        with images.mounted() as root:
            rows["size"] = f"{_bytes(root) / 1e9:.2f} GB, of which torch and CUDA {_torch(root)}"
            if arguments.target == "service":
                serve_and_ask(images, root, rows)
            else:
                learn(images, rows)
        show(rows)


def look_at(config: Mapping[str, Any]) -> None:
    """Insist on what docs/containers.md promises about the image."""
    user = str(config["User"])
    insist(user.split(":")[0].isdigit() and not user.startswith("0"), f"runs as {user}")
    insist(config["Entrypoint"] == ["medley"], "starts with `medley`")
    insist(not any("KEY" in word or "PASSWORD" in word for word in config["Env"]), "has no secrets")


def serve_and_ask(images: Buildah, root: Path, rows: dict[str, str]) -> None:
    """Start it with a read-only root, ask it, ask its health check, stop it."""
    port = _free_port()
    url, health = f"http://127.0.0.1:{port}", images.config()["Healthcheck"]["Test"][1:]
    with _timed(rows, "start until ready"):
        server = start(images.config(), root, images.work / "volume", port=port)
        wait_until_ready(url, server)
    try:
        rows["resident memory"] = f"{_resident_bytes(server.pid) / 1e6:.0f} MB"
        picture = min(path for path in (PICTURES / "test").rglob("*") if path.is_file())
        here = ask_this_checkout(picture)
        there, took_s = ask(url, picture)
        rows["answer"] = f"{there.label} {there.probability:.4f} in {took_s * 1000:.0f} ms"
        insist(there == here, "answers as this checkout does")
        insist(healthy(images, health, port), "its health check says that it is well")
        insist(can_write(server.pid, volume_of(images, root)), "can write to its volume")
        insist(not can_write(server.pid, root / "opt"), "cannot write to its root")
        begin_s = time.monotonic()
        server.terminate()
        insist(server.wait(timeout=STOP_S) == 0, "stops with status 0")
        rows["stop"] = f"{time.monotonic() - begin_s:.1f} s"
        insist(not healthy(images, health, port), "its health check says that it is gone")
    finally:
        server.kill()
        server.wait()


def start(
    config: Mapping[str, Any], root: Path, volume: Path, *, port: int
) -> subprocess.Popen[bytes]:
    """Start what the image starts, as its user, in its environment, on a read-only root.

    buildah's chroot isolation cannot do the latter, so this mounts by itself: the root bound and
    remounted read-only, the volume, /tmp in memory.
    """
    user, _, group = str(config["User"]).partition(":")
    volume.mkdir()
    os.chown(volume, int(user), int(group))
    script = f"""
        mount --bind {root} {root}
        mount -o remount,bind,ro {root}
        mount --bind {volume} {root}{config["WorkingDir"]}
        mount -t tmpfs -o mode=1777 tmpfs {root}/tmp
        mount -t proc proc {root}/proc
        mount --rbind /dev {root}/dev
        cd {root}
        exec setpriv --no-new-privs chroot --userspec={user}:{group} {root} "$@"
    """
    inside = [*config["Env"], f"MEDLEY_PORT={port}", "OMP_NUM_THREADS=1"]
    change = ["/usr/bin/env", "-i", "-C", config["WorkingDir"], *inside]
    words = [*change, *config["Entrypoint"], *config["Cmd"]]
    return subprocess.Popen(
        ["unshare", "--mount", "--propagation=private", "sh", "-euc", script, "sh", *words]
    )


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    """Ask /readyz until it says so."""
    end_s = time.monotonic() + START_S
    while time.monotonic() < end_s:
        if server.poll() is not None:
            sys.exit(f"the server in the image ended with status {server.returncode}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz").is_success:
                return
        time.sleep(0.2)
    server.kill()
    sys.exit(f"the server in the image was not ready within {START_S:.0f} s")


def ask(url: str, picture: Path) -> tuple[Prediction, float]:
    """Classify a picture among labels; the prediction, and how long it took."""
    begin_s = time.monotonic()
    with Client(url, timeout_s=60) as client:
        answer = client.classify([picture.read_bytes()], ClassifyOptions(labels=LABELS))
    took_s = time.monotonic() - begin_s
    (prediction,) = answer.results
    assert isinstance(prediction, Prediction)
    return prediction, took_s


def ask_this_checkout(picture: Path) -> Prediction:
    """What a server of this checkout answers."""
    with tempfile.TemporaryDirectory() as store:
        command = [str(MEDLEY), "serve", "--port", "0", "--store", store]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MEDLEY_LOG_LEVEL": "warning"}
        server = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.stdout is not None
            return ask(server.stdout.readline().split()[-1], picture)[0]
        finally:
            server.terminate()
            server.wait(timeout=STOP_S)


def healthy(images: Buildah, command: list[str], port: int) -> bool:
    """Whether the image's own health check is content, run in a container of it."""
    words = ["sh", "-c", '"$@" && echo well || echo ill', "sh", *command]
    return images.run(*words, flags=("--env", f"MEDLEY_PORT={port}")) == "well"


def can_write(pid: int, folder: Path) -> bool:
    """Whether root may write to a folder as the server's process sees it."""
    enter = ["nsenter", "--mount", "--target", str(pid), "--"]
    touched = subprocess.run(
        [*enter, "touch", str(folder / "written")], check=False, capture_output=True
    )
    return touched.returncode == 0


def volume_of(images: Buildah, root: Path) -> Path:
    """Where the image's one volume is mounted."""
    (volume,) = images.config()["Volumes"]
    return root / str(volume).lstrip("/")


def learn(images: Buildah, rows: dict[str, str]) -> None:
    """Learn a few steps of a task, in one process and under torchrun in two."""
    out = images.work / "out"
    out.mkdir()
    out.chmod(0o777)  # the image's user writes there
    flags = ("--volume", f"{PICTURES}:/data:ro", "--volume", f"{out}:/out")
    few = ("--task", "fashion", "--shots", "4", "--iterations", "4", "--ddas-iterations", "20")
    with _timed(rows, "learn, one process"):
        images.run("medley", "train", "/data", *few, "--out", "/out/one", flags=flags)
    with _timed(rows, "learn, two processes"):
        # buildah gives a container a name without an address, unlike engines
        alone = ("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2")
        words = ("torchrun", *alone, "-m", "medley", "train", "/data", *few, "--out", "/out/two")
        images.run(*words, flags=flags)
    for run in ("one", "two"):
        insist(bool(list((out / run).glob("*.safetensors"))), f"a bundle of run {run}")


def insist(true: bool, promise: str) -> None:
    """Say what holds; end at what does not."""
    if not true:
        sys.exit(f"not so: {promise}")
    console.print(f"ok: {promise}")


def show(rows: Mapping[str, str]) -> None:
    """Print what was measured."""
    table = Table("what", "measured")
    for what, measured in rows.items():
        table.add_row(what, measured)
    console.print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--target", choices=("service", "trainer"), default="service")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--keep", action="store_true", help="leave the images behind")
    parser.add_argument("--build-flags", default="", help="further words for `buildah bud`")
    return parser.parse_args()


@contextlib.contextmanager
def _images(parent: Path, *, keep: bool) -> Iterator[Buildah]:
    images = Buildah(Path(tempfile.mkdtemp(prefix="medley-image-", dir=parent)))
    (images.work / "tmp").mkdir()
    try:
        yield images
    finally:
        images("rm", "--all")  # also what a failed build has left mounted
        if keep:
            console.print(f"kept: {images.work}")
        else:
            shutil.rmtree(images.work)


@contextlib.contextmanager
def _timed(rows: dict[str, str], what: str) -> Iterator[None]:
    begin_s = time.monotonic()
    yield
    rows[what] = f"{time.monotonic() - begin_s:.0f} s"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _bytes(folder: Path) -> int:
    done = subprocess.run(["du", "-sxb", str(folder)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


def _torch(root: Path) -> str:
    (packages,) = root.glob("opt/medley/lib/python3*/site-packages")
    parts = [packages / name for name in ("torch", "nvidia") if (packages / name).exists()]
    return f"{sum(map(_bytes, parts)) / 1e9:.2f} GB"


def _resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
