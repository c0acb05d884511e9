"""Reaching a Redis: every kind of address against a real one, and what is said where it fails."""

import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from service.errors import RegistryError, UnavailableError
from service.registry.redis_client import connect, redis_errors
from tests.redis_server import RedisServer, find_program, free_port, redis_sentinel, wait_until
from tests.redis_server import redis_server as running_redis
from tests.service.shared import Cluster
from tests.service.stories import apply

PASSWORD = "s3cret/@#:%"
SECRET = "s3cret%2F%40%23%3A%25"  # as it stands in a URL


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority and a server's key and certificate, as an operator makes them."""
    folder = tmp_path_factory.mktemp("certificates")
    openssl = find_program("openssl")
    for arguments in (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=ours -keyout ca.key -out ca.pem",
        "req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout key.pem -out request.pem",
        "x509 -req -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2"
        " -extfile names -out cert.pem",
    ):
        (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")
        subprocess.run([openssl, *arguments.split()], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis that asks for a password."""
    with running_redis(tmp_path_factory.mktemp("guarded"), "--requirepass", PASSWORD) as server:
        yield server


def address(server: RedisServer, *, user: str = "", scheme: str = "redis") -> str:
    return f"{scheme}://{user}127.0.0.1:{server.port}"


def ping(url: str, *, password: str | None = None) -> bool:
    with closing(connect(url, password=password, timeout_s=5)) as client, redis_errors():
        return bool(client.ping())


def test_a_password_comes_from_the_url_or_from_beside_it(guarded: RedisServer) -> None:
    assert ping(address(guarded), password=PASSWORD)
    assert ping(address(guarded, user=f":{SECRET}@"))
    assert ping(address(guarded, user=f":{SECRET}@"), password="another")


@pytest.mark.parametrize("user", ["", ":wrong@", "nobody:wrong@"])
def test_a_wrong_password_is_refused_in_one_line_without_it(
    guarded: RedisServer, user: str
) -> None:
    with pytest.raises(RegistryError, match="does not let this server in") as caught:
        ping(address(guarded, user=user))
    assert caught.value.code == "registry_refused"
    assert "wrong@" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_without_the_right_to_the_keys_is_refused(guarded: RedisServer) -> None:
    with guarded.client(password=PASSWORD) as admin:
        admin.execute_command("ACL", "SETUSER", "guest", "on", ">guest", "+ping", "~other:*")
    guest = connect(address(guarded, user="guest:guest@"), timeout_s=5)
    with closing(guest), pytest.raises(RegistryError, match="rights"), redis_errors():
        guest.eval("return 1", 1, "{medley}:state")


def test_the_rights_that_the_docs_name_are_enough(guarded: RedisServer, tmp_path: Path) -> None:
    hints = threading.Semaphore(0)
    with (
        guarded.client(password=PASSWORD) as admin,
        closing(Cluster(guarded, tmp_path / "store")) as cluster,
    ):
        rights = f"~{{{cluster.prefix}}}:* &{{{cluster.prefix}}}:* +@all -@admin -@dangerous +info"
        admin.execute_command("ACL", "SETUSER", "medley", "on", ">mine", *rights.split())
        replica = cluster.replica(url=address(guarded, user="medley:mine@"))
        replica.listen(hints.release)
        assert hints.acquire(timeout=5)
        assert apply(replica, ("register", "a", "1")).generation == 1
        assert hints.acquire(timeout=5)


def test_tls_needs_an_authority_that_is_known_and_the_right_name(
    certificates: Path, tmp_path: Path
) -> None:
    with running_redis(tmp_path / "redis", tls=certificates) as server:
        with closing(Cluster(server, tmp_path / "store")) as cluster:
            assert apply(cluster.replica(), ("register", "a", "1")).generation == 1
        for url in (address(server, scheme="rediss"), address(server)):
            with pytest.raises(UnavailableError):
                ping(url)


def test_a_path_of_a_socket_and_a_database_are_addresses_too(tmp_path: Path) -> None:
    socket = tmp_path / "redis.sock"
    with running_redis(tmp_path / "redis", "--unixsocket", str(socket)) as server:
        with closing(connect(f"unix://{socket}?db=3", timeout_s=5)) as client:
            client.set("here", "1")
        with closing(connect(f"{address(server)}/3", timeout_s=5)) as client:
            assert client.get("here") == b"1"
        with pytest.raises(RegistryError, match="DB index"):
            ping(f"{address(server)}/99")


def test_a_sentinel_leads_to_the_master_and_after_a_failover_to_the_next_one(
    tmp_path: Path,
) -> None:
    """The follower has all; what was acknowledged is there, and a change goes on."""
    at_once = ("--repl-diskless-sync-delay", "0")
    with (
        running_redis(tmp_path / "one", *at_once) as master,
        running_redis(tmp_path / "two", "--replicaof", f"127.0.0.1 {master.port}") as follower,
        redis_sentinel(tmp_path / "sentinel", master, service="tasks") as sentinel,
        follower.client() as behind,
        sentinel.client() as asked,
        closing(Cluster(master, tmp_path / "store")) as cluster,
    ):
        dead = free_port()
        url = f"redis+sentinel://127.0.0.1:{dead},127.0.0.1:{sentinel.port}/tasks"
        replica = cluster.replica(url=url, timeout_s=2)
        apply(replica, ("register", "a", "1"))
        wait_until(lambda: bool(behind.exists(cluster.key)))
        wait_until(lambda: bool(asked.sentinel_slaves("tasks")))
        master.kill()
        with pytest.raises(UnavailableError):
            apply(replica, ("register", "never", "1"))
        wait_until(lambda: asked.sentinel_master("tasks")["port"] == follower.port)

        after = apply(replica, ("register", "b", "1"))

        assert {"a", "b"} == set(after.tasks)
        assert replica.recoveries == 1


def test_a_cluster_holds_a_registry_and_hints_and_comes_back_by_itself(tmp_path: Path) -> None:
    hints = threading.Semaphore(0)
    bus = str(free_port())  # by default 10,000 above the port, which may be too high
    options = ["--cluster-enabled", "yes", "--cluster-port", bus, "--appendonly", "yes"]
    options += ["--cluster-node-timeout", "500"]
    with (
        running_redis(tmp_path / "redis", *options) as server,
        server.client() as admin,
        closing(Cluster(server, tmp_path / "store")) as cluster,
    ):
        admin.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        wait_until(lambda: admin.cluster("info")["cluster_state"] == "ok")
        url = f"redis+cluster://127.0.0.1:{free_port()},127.0.0.1:{server.port}"
        replica, other = (cluster.replica(url=url, timeout_s=2) for _ in range(2))
        replica.listen(hints.release)
        assert hints.acquire(timeout=5)
        apply(other, ("register", "a", "1"))
        assert hints.acquire(timeout=5)

        server.kill()
        with pytest.raises(UnavailableError, match="registry is away"):
            replica.read()
        server.start()
        wait_until(lambda: admin.cluster("info")["cluster_state"] == "ok")

        assert set(apply(replica, ("register", "b", "1")).tasks) == {"a", "b"}
        assert hints.acquire(timeout=10)


BAD = {
    "http://127.0.0.1:1": "has to begin with redis://",
    "127.0.0.1:6379": "has to begin with redis://",
    "redis+else://127.0.0.1:1": "has to begin with redis://",
    "redis://": "names no host",
    "redis+cluster://": "names no host",
    "redis+sentinel://one,,two/tasks": "names no host",
    "redis://:geheim@127.0.0.1:99999": "cannot be read",
    "redis://:geh#eim@127.0.0.1": "cannot be read",
    "redis://:geheim@127.0.0.1/geheim": "the number of a database",
    "redis://127.0.0.1?geheim=1": "an option that is none: geheim",
    "rediss+sentinel://127.0.0.1/tasks?geheim=1": "an option that is none: geheim",
    "redis+cluster://127.0.0.1/3": "has no databases",
    "redis+sentinel://127.0.0.1": "the name of the service",
    "redis+sentinel://127.0.0.1/tasks/x": "the number of a database",
}


@pytest.mark.parametrize("url", BAD)
def test_an_address_that_is_none_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(RegistryError) as caught:
        connect(url, timeout_s=1)

    said = str(caught.value)
    assert BAD[url] in said
    assert "\n" not in said
    assert "geheim" not in said.replace("none: geheim", "")
    assert caught.value.__cause__ is None  # nor in what a log would show below it


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster", "redis+sentinel"])
def test_where_nobody_listens_it_is_away(scheme: str) -> None:
    service = "/tasks" if scheme == "redis+sentinel" else ""
    with pytest.raises(UnavailableError, match="away") as caught, redis_errors():
        connect(f"{scheme}://:geheim@127.0.0.1:{free_port()}{service}", timeout_s=1).ping()
    assert not isinstance(caught.value, RegistryError)
    assert "geheim" not in str(caught.value)


def test_what_answers_and_is_no_redis_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:

        def answer() -> None:
            with suppress(OSError):  # the door is closed
                for _ in range(2):  # a broken connection may be tried once more
                    near, _ = door.accept()
                    near.recv(4096)
                    near.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    near.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(RegistryError, match="no Redis"):
            ping(f"redis://127.0.0.1:{door.getsockname()[1]}")
