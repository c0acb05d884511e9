"""`medley store check` and `collect`, as people type them, on a real store and a real Redis."""

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from medley.sealed import pack
from service.bundles.blobs import ID_FILE, Blobs
from service.bundles.shared_store import SharedStore, bundle_name
from service.commands import commands
from service.registry.backup import Backup
from service.registry.desired import VersionRecord
from service.registry.redis_client import connect
from service.registry.redis_registry import RedisRegistry
from tests.redis_server import RedisServer

BUNDLES = [pack(f'{{"number":{number}}}', {}) for number in range(3)]
DIGESTS = ["sha256:" + data.split(b'seal\\":\\"')[1][:64].decode() for data in BUNDLES]


class Cluster:
    """A store with three bundles, two of them registered, and what a person sets to reach it."""

    def __init__(self, redis: RedisServer, folder: Path) -> None:
        self.folder = folder / "shared"
        self.prefix = secrets.token_hex(8)
        self.client = connect(redis.url, timeout_s=2)
        self.blobs = Blobs(str(self.folder), timeout_s=5)
        self.shared = SharedStore(self.blobs)
        self.registry = RedisRegistry(
            self.client, prefix=self.prefix, backup=Backup(self.blobs), backbone="b"
        )
        self.environment = {
            "MEDLEY_REGISTRY": redis.url,
            "MEDLEY_REGISTRY_PREFIX": self.prefix,
            "MEDLEY_BUNDLE_STORE": str(self.folder),
            "MEDLEY_KEEP_UNUSED_S": "0",
            "COLUMNS": "200",
        }
        for number, data in enumerate(BUNDLES):
            self.blobs.put(bundle_name(DIGESTS[number]), data)
            if number < 2:
                record = VersionRecord(f"task-{number}", "1", DIGESTS[number], "now", 1)
                self.registry.register(record, activate=True)

    def medley(self, *words: str, **environment: str) -> Result:
        runner = CliRunner(env=self.environment | environment)
        return runner.invoke(commands, ["store", *words])

    def file(self, number: int) -> Path:
        return self.folder / bundle_name(DIGESTS[number])


@pytest.fixture
def cluster(redis_server: RedisServer, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(redis_server, tmp_path)
    yield cluster
    cluster.client.close()


def test_a_sound_store_is_said_to_be_one(cluster: Cluster) -> None:
    result = cluster.medley("check")

    assert result.exit_code == 0, result.output
    assert "generation 2 has 2 bundles" in result.stdout
    assert "every bundle that is named is whole" in result.stdout
    assert f"{DIGESTS[2]}  unused" in result.stdout
    assert "is there" in cluster.medley("check", "--no-verify").stdout


def test_what_is_lost_damaged_half_or_foreign_is_named_and_left_alone(cluster: Cluster) -> None:
    cluster.file(0).unlink()
    cluster.file(1).write_bytes(BUNDLES[1][:-1] + b"?")
    foreign = ["README", "bundles/notes.txt", "registry/backup.json"]
    for name in (*foreign, "incoming/half"):
        (cluster.folder / name).write_bytes(b"")
    before = sorted(cluster.folder.rglob("*"))

    result = cluster.medley("check", "--json")

    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert not found["sound"]
    assert found["lost"] == DIGESTS[:1]
    assert list(found["damaged"]) == DIGESTS[1:2]
    assert found["unused"] == DIGESTS[2:]
    assert sorted(found["foreign"]) == sorted(foreign)
    assert found["halves"] == ["incoming/half"]
    assert sorted(cluster.folder.rglob("*")) == before

    shown = cluster.medley("check")
    assert shown.exit_code == 1
    assert f"{DIGESTS[0]}  lost" in shown.stdout
    assert "register again" in shown.stdout


def test_a_store_is_checked_without_redis(cluster: Cluster) -> None:
    assert cluster.medley("check", MEDLEY_REGISTRY="redis://127.0.0.1:1").exit_code == 0


def test_a_store_that_nobody_has_used_is_empty(cluster: Cluster, tmp_path: Path) -> None:
    new = {"MEDLEY_BUNDLE_STORE": str(tmp_path / "new")}
    result = cluster.medley("check", **new)

    assert result.exit_code == 0
    assert "no registry has 0 bundles" in result.stdout
    assert [path.name for path in (tmp_path / "new").glob("*.json")] == [ID_FILE]
    refused = cluster.medley("collect", **new)
    assert (refused.exit_code, refused.stderr) == (
        2,
        "medley: no replica has used this store yet\n",
    )


def test_what_nobody_needs_is_collected_when_asked(cluster: Cluster) -> None:
    dry = cluster.medley("collect", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert f"{DIGESTS[2]} would go" in dry.stdout
    assert cluster.shared.digests() == set(DIGESTS)

    kept = cluster.medley("collect", MEDLEY_KEEP_UNUSED_S="3600")
    assert f"{DIGESTS[2]} stays for now" in kept.stdout

    result = cluster.medley("collect")
    assert result.exit_code == 0
    assert f"{DIGESTS[2]} is gone" in result.stdout
    assert "2 bundles are needed, 1 deleted" in result.stdout
    assert cluster.shared.digests() == set(DIGESTS[:2])
    assert json.loads(cluster.medley("collect", "--json").stdout)["deleted"] == []


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"MEDLEY_REGISTRY": "redis://127.0.0.1:1"}, "the registry is away"),
        ({"MEDLEY_REGISTRY": "http://127.0.0.1:1"}, "redis://"),
        ({"MEDLEY_BUNDLE_STORE": "nonsense://x"}, "no bundle store can be had there"),
        ({"MEDLEY_BUNDLE_STORE": "relative"}, "an absolute path"),
        ({"MEDLEY_BUNDLE_STORE": "/proc/nothing"}, "the bundle store"),
        ({"MEDLEY_BUNDLE_STORE": ""}, "go together"),
    ],
)
def test_what_cannot_be_is_one_line(
    cluster: Cluster, environment: dict[str, str], said: str
) -> None:
    result = cluster.medley("collect", **environment)

    assert result.exit_code == 2
    assert result.stdout == ""
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_without_a_shared_store_there_is_nothing_to_look_at() -> None:
    for word in ("check", "collect"):
        result = CliRunner().invoke(commands, ["store", word])
        assert result.exit_code == 2
        assert "no store is shared" in result.stderr
