"""Debian's buildah, and a base image for it that is made here: what `image_test` builds with."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Buildah", "make_base"]

BASE = "localhost/medley-base:bookworm"
IMAGE = "localhost/medley:image-test"
PACKAGES = "ca-certificates,python3,python3-venv"


@dataclass(frozen=True)
class Buildah:
    """Debian's buildah with a storage of its own in the folder `work`.

    Its chroot isolation needs no engine. STORAGE_DRIVER=vfs, from the environment, does where
    overlays are not allowed, and copies each layer whole.
    """

    work: Path

    def __call__(self, *words: str, stdout: int | None = subprocess.PIPE) -> str:
        """Run one command; what it prints."""
        roots = ("--root", str(self.work / "storage"), "--runroot", str(self.work / "run"))
        environment = os.environ | {
            "BUILDAH_ISOLATION": "chroot",
            "TMPDIR": str(self.work / "tmp"),
        }
        done = subprocess.run(
            ["buildah", *roots, *words], env=environment, stdout=stdout, text=True, check=False
        )
        if done.returncode != 0:
            sys.exit(f"buildah {words[0]} failed with status {done.returncode}")
        return (done.stdout or "").strip()

    def build(self, context: Path, target: str, *, flags: list[str]) -> None:
        """Build a target for a CPU on top of the base; one layer, as each may be a copy."""
        self(
            *("bud", "--format", "docker", "--pull-never", "--layers=false"),
            *("--build-arg", f"PYTHON_IMAGE={BASE}", "--build-arg", "DEVICE=cpu"),
            *("--target", target, "--tag", IMAGE, *flags, str(context)),
            stdout=None,
        )

    def config(self) -> dict[str, Any]:
        """What the image says about how it is to be run."""
        config: dict[str, Any] = json.loads(self("inspect", "--type", "image", IMAGE))["Docker"]
        return dict(config["config"])

    @contextlib.contextmanager
    def mounted(self) -> Iterator[Path]:
        """Give the image's files, in a container that is removed afterwards."""
        self("from", "--pull-never", "--name", "image-test", IMAGE)
        try:
            yield Path(self("mount", "image-test"))
        finally:
            self("rm", "image-test")

    def run(self, *words: str, flags: Sequence[str] = ()) -> str:
        """Run a command in that container, as the image's user; what it prints."""
        return self("run", *flags, "image-test", "--", *words)


def make_base(images: Buildah) -> None:
    """Make a small Debian with Python, under a local name."""
    container = images("from", "scratch")
    root = images("mount", container)
    log = images.work / "debootstrap.log"
    with log.open("w") as out:
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", root]
        done = subprocess.run(command, stdout=out, stderr=out, check=False)
    if done.returncode != 0:
        sys.exit(f"debootstrap failed: {log.read_text()[-500:]}")
    shutil.rmtree(Path(root) / "var/cache/apt/archives")
    images("commit", "--rm", container, BASE)
