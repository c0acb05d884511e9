"""The compose files, as Debian's docker-compose reads them, and what they mount."""

from __future__ import annotations

import re
import stat
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from service.server import GRACE_S
from service.settings import Settings
from tests.deploy.manifests import tool
from tests.redis_server import free_port

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy" / "compose"
KINDS = ("override", "cpu")  # of machine: with GPUs, which is the default, and without
REPLICAS = ("replica-1", "replica-2")
SECRETS = {"medley_admin_key", "medley_read_key", "medley_registry_password"}


@cache
def config(kind: str) -> dict[str, Any]:
    """What docker-compose makes of the main file and the one for this kind of machine."""
    files = ("-f", "docker-compose.yml", "-f", f"docker-compose.{kind}.yml")
    done = subprocess.run(
        [tool("docker-compose", "docker-compose, by apt"), *files, "config"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    read: dict[str, Any] = yaml.safe_load(done.stdout)
    return read


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_one_of_ours_and_is_read_as_it_is_written(kind: str) -> None:
    for replica in REPLICAS:
        environment = config(kind)["services"][replica]["environment"]
        fields = {name.removeprefix("MEDLEY_").lower(): text for name, text in environment.items()}

        assert Settings.model_validate(fields).replica == replica
        assert not SECRETS & {f"medley_{name}" for name in fields}


def test_a_gpu_is_reserved_unless_there_is_none() -> None:
    for replica in REPLICAS:
        with_gpu, without = (config(kind)["services"][replica] for kind in KINDS)
        (device,) = with_gpu["deploy"]["resources"]["reservations"]["devices"]

        assert device == {"driver": "nvidia", "device_ids": ["0"], "capabilities": ["gpu"]}
        assert "deploy" not in without
        assert (with_gpu["build"]["args"]["DEVICE"], without["build"]["args"]["DEVICE"]) == (
            "cuda",
            "cpu",
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_replica_has_the_time_that_it_takes_to_leave(kind: str) -> None:
    service = config(kind)["services"]["replica-1"]
    drain_delay_s = float(service["environment"]["MEDLEY_DRAIN_DELAY_S"])
    longest_s = drain_delay_s + Settings.model_fields["drain_s"].default + GRACE_S

    assert _seconds(service["stop_grace_period"]) > longest_s


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_has_more_rights_than_it_needs(kind: str) -> None:
    for name, service in config(kind)["services"].items():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service.get("read_only") or name == "grafana"  # it unpacks plugins beside itself
        assert "privileged" not in service


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_published_but_on_loopback(kind: str) -> None:
    for service in config(kind)["services"].values():
        for port in service.get("ports", []):
            published = port if isinstance(port, str) else f"{port.get('host_ip', '')}:"
            assert published.startswith("127.0.0.1:")


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_others_are_pinned_by_tag(kind: str) -> None:
    for name, service in config(kind)["services"].items():
        if name not in REPLICAS:
            assert re.search(r":v?\d+\.\d+\.\d+", service["image"])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_mounted_from_the_checkout_is_there(kind: str) -> None:
    for service in config(kind)["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0] if isinstance(volume, str) else volume["source"]
            if source.startswith("/"):
                assert Path(source).exists(), source


def test_replicas_share_bundles_and_nothing_else() -> None:
    first, second = (set(config("cpu")["services"][name]["volumes"]) for name in REPLICAS)

    assert {volume.split(":")[0] for volume in first & second} == {"bundles"}


def test_prometheus_asks_these_replicas() -> None:
    targets = yaml.safe_load((ROOT / "deploy/prometheus/targets/medley.yml").read_text())
    asked = {target for group in targets for target in group["targets"]}

    assert asked == {f"{replica}:8000" for replica in REPLICAS}


def test_secrets_are_made_once_and_are_in_no_commit(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    _make_secrets(folder)
    made = {path.name: path.read_text() for path in folder.iterdir()}
    (folder / "grafana_password").unlink()
    _make_secrets(folder)

    assert made.keys() == set(config("cpu")["secrets"])
    assert len(set(made.values())) == len(made)
    assert all(len(secret) == 48 for secret in made.values())
    assert all((folder / name).read_text() == made[name] for name in SECRETS)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert "/deploy/compose/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


def test_redis_asks_for_the_password_and_does_not_show_it(tmp_path: Path) -> None:
    tool("redis-server", "redis-server, by apt")
    (tmp_path / "password").write_text("s3cret")
    port = free_port()
    settings = (COMPOSE / "redis" / "redis.conf").read_text().replace("/data", str(tmp_path))
    (tmp_path / "redis.conf").write_text(f"{settings}\nport {port}\n")
    (tmp_path / "start").write_text((COMPOSE / "redis" / "start").read_text())
    environment = {"PASSWORD_FILE": str(tmp_path / "password"), "PATH": "/usr/bin:/bin"}
    server = subprocess.Popen(
        ["sh", str(tmp_path / "start")], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        while "Ready to accept connections" not in server.stdout.readline():
            assert server.poll() is None
        with redis.Redis(port=port, password="s3cret") as client:
            assert client.config_get("appendonly") == {"appendonly": "yes"}
        with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
        assert "s3cret" not in Path(f"/proc/{server.pid}/cmdline").read_text()
    finally:
        server.terminate()
        server.communicate()


def _make_secrets(folder: Path) -> None:
    subprocess.run([str(COMPOSE / "make-secrets"), str(folder)], check=True, capture_output=True)


def _seconds(text: str) -> float:
    """docker-compose's way of writing a duration: 45s, 1m30s."""
    parts = re.findall(r"(\d+)([hms])", text)
    return float(sum(int(number) * {"h": 3600, "m": 60, "s": 1}[unit] for number, unit in parts))
