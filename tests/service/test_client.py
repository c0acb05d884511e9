"""Both clients, against a real server, and against one that answers as it is told."""

import asyncio
import inspect
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from service import exchanges
from service.client import (
    AsyncClient,
    Client,
    RefusedError,
    StillRunningError,
    UnreachableError,
)
from service.wire.rollout_schemas import Rollout
from service.wire.schemas import ClassifyOptions, Failure, Prediction
from tests.service.conftest import ROOT, MakeBundle, ServerProcess
from tests.service.scripted import CUT, Answer, scripted
from tests.service.test_start_and_stop import free_port

TASKS = b'{"generation": 7, "tasks": []}'
OK = Answer(200, TASKS)
BUSY = Answer(503, b'{"detail": "starting", "code": "starting"}', {"Retry-After": "1"})


class Awaited:
    """An AsyncClient whose methods wait, so that one test can ask both clients."""

    def __init__(self, url: str, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(url, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        return lambda *args, **kwargs: self._runner.run(method(*args, **kwargs))

    def __enter__(self) -> "Awaited":
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


Open = Callable[..., Any]


@pytest.fixture(params=[Client, Awaited], ids=["waiting", "awaiting"])
def open_client(request: pytest.FixtureRequest) -> Iterator[Open]:
    """Open one of the two clients, as `Client(...)` does."""
    with ExitStack() as stack:
        yield lambda url, **options: stack.enter_context(request.param(url, **options))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A file of a few pieces, for servers that do not look into it."""
    path = tmp_path / "some.safetensors"
    path.write_bytes(bytes(3 * exchanges.CHUNK_BYTES + 1))
    return path


def test_both_clients_can_do_the_same() -> None:
    def methods(kind: type) -> dict[str, inspect.Signature]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {name: inspect.signature(f) for name, f in found if not name.startswith("_")}

    assert methods(Client) == methods(AsyncClient)
    assert len(methods(Client)) > 20


def test_it_is_light_to_import() -> None:
    program = "import sys, service.client, service.commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


class TestOfAServer:
    """What a server offers, asked by both clients."""

    def test_the_life_of_a_task(
        self,
        server: ServerProcess,
        open_client: Open,
        make: MakeBundle,
        image: bytes,
        tmp_path: Path,
        request: pytest.FixtureRequest,
    ) -> None:
        task = f"by-{request.node.callspec.id}"
        client = open_client(server.url)
        sent: list[int] = []
        for version in ("1", "2"):
            path = tmp_path / f"{version}.safetensors"
            path.write_bytes(make(task=task, version=version, seed=int(version))[1])
            registered = client.register(task, version, path, on_progress=sent.append)
            assert registered.live == version
        assert sum(sent) == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
        assert client.operations().operations[0].state == "succeeded"
        assert task in [one.task for one in client.tasks().tasks]

        (named,) = client.classify([image], ClassifyOptions(model=task)).results
        assert (named.path.task, named.path.version) == (task, "2")
        (decision,) = client.route([image], ClassifyOptions(model=task)).results
        assert (decision.path.version, task in decision.scores) == ("2", True)
        assert client.usage(task).images == 1

        assert client.set_alias(task, "old", "1").aliases == {"live": "2", "old": "1"}
        assert client.delete_alias(task, "old").aliases == {"live": "2"}
        assert client.pin(task, "1").versions[0].pinned
        assert not client.pin(task, "1", pinned=False).versions[0].pinned
        assert client.start_rollout(task, Rollout(version="1", share=1.0)).rollout.version == "1"
        assert client.rollout(task).stopped is None
        client.stop_rollout(task)
        client.start_rollout(task, Rollout(version="1"))
        assert client.promote(task).live == "1"
        assert client.rollback(task).live == "2"
        client.delete(task, "1")
        assert [one.version for one in client.task(task).versions] == ["2"]
        client.delete(task)
        with pytest.raises(RefusedError, match=f"no task {task}") as refused:
            client.task(task)
        assert (refused.value.status, refused.value.code) == (404, "unknown_task")
        assert refused.value.request_id

    def test_a_change_is_refused_if_somebody_was_quicker(
        self,
        server: ServerProcess,
        open_client: Open,
        make: MakeBundle,
        tmp_path: Path,
        request: pytest.FixtureRequest,
    ) -> None:
        task, path = f"match-{request.node.callspec.id}", tmp_path / "1.safetensors"
        path.write_bytes(make(task=task)[1])
        client = open_client(server.url)
        seen = client.register(task, "1", path).changed
        assert client.set_alias(task, "a", "1", if_match=seen).changed > seen

        changes: list[Callable[[], object]] = [
            lambda: client.set_alias(task, "b", "1", if_match=seen),
            lambda: client.delete_alias(task, "a", if_match=seen),
            lambda: client.pin(task, "1", if_match=seen),
            lambda: client.rollback(task, if_match=seen),
            lambda: client.delete(task, if_match=seen),
            lambda: client.register(task, "1", path, if_match=seen),
        ]
        for change in changes:
            with pytest.raises(RefusedError) as refused:
                change()
            assert refused.value.code == "precondition_failed"
        client.delete(task)

    def test_what_outlasts_its_request_is_an_operation(
        self,
        server: ServerProcess,
        open_client: Open,
        make: MakeBundle,
        tmp_path: Path,
        request: pytest.FixtureRequest,
    ) -> None:
        task, path = f"long-{request.node.callspec.id}", tmp_path / "1.safetensors"
        path.write_bytes(make(task=task)[1])
        client = open_client(server.url)
        upload = exchanges.register(
            task,
            "1",
            path,
            activate=True,
            replicas=None,
            wait_s=0,
            on_progress=lambda sent_bytes: None,
        )

        with pytest.raises(StillRunningError) as running:
            client.send(upload)
        ended = client.ended(running.value.operation.id)

        assert (ended.state, ended.task) == ("succeeded", task)
        assert client.task(task).live == "1"
        client.delete(task)

    def test_bad_images_fail_alone_and_features_are_of_unit_length(
        self, server: ServerProcess, open_client: Open, image: bytes
    ) -> None:
        client = open_client(server.url)
        options = ClassifyOptions(model="base", labels=["cat", " a car"], top_k=2)
        kinds = [type(one) for one in client.classify([image, b"x", image], options).results]
        assert kinds == [Prediction, Failure, Prediction]
        with pytest.raises(RefusedError, match="not an image"):
            client.classify([b"x"], options)
        with pytest.raises(ValueError, match="no images"):
            client.classify([])
        for answer in (client.embed_images([image, image]), client.embed_texts(["a", "b"])):
            for one in answer.data:
                assert sum(x * x for x in one.embedding) == pytest.approx(1, abs=1e-4)

    def test_a_bundle_that_the_server_gets_by_itself(
        self,
        keyed_server: ServerProcess,
        open_client: Open,
        make: MakeBundle,
        request: pytest.FixtureRequest,
    ) -> None:
        task = f"got-{request.node.callspec.id}"
        source = keyed_server.store / "sources" / f"{task}.safetensors"
        source.write_bytes(make(task=task)[1])
        client = open_client(keyed_server.url, key=SecretStr("sesame"))

        assert client.register_from(task, "1", str(source)).live == "1"
        with pytest.raises(RefusedError) as refused:
            client.register_from(task, "1", "/etc/passwd")
        assert refused.value.code == "source_refused"

    def test_an_upload_without_the_key_is_told_so_however_large_it_is(
        self, keyed_server: ServerProcess, open_client: Open, tmp_path: Path
    ) -> None:
        path = tmp_path / "large.safetensors"
        path.write_bytes(bytes(32 * exchanges.CHUNK_BYTES))
        for key in (None, SecretStr("wrong")):
            with pytest.raises(RefusedError) as refused:
                open_client(keyed_server.url, key=key).register("x", "1", path)
            assert refused.value.code == "unauthorized"


def test_a_change_is_answered_once_so_many_replicas_have_it(
    server: ServerProcess, open_client: Open, make: MakeBundle, tmp_path: Path
) -> None:
    path = tmp_path / "1.safetensors"
    path.write_bytes(make(task="spread")[1])
    client = open_client(server.url)

    registered = client.register("spread", "1", path, replicas="all")
    named = client.set_alias("spread", "second", "1", replicas="1")
    with pytest.raises(RefusedError) as refused:
        client.set_alias("spread", "live", "1", replicas="2")

    for answer in (registered, named):
        assert answer.replicas is not None
        assert (answer.replicas.reached, answer.replicas.alive) == (1, 1)
    assert refused.value.code == "too_few_replicas"
    client.delete("spread")


def test_two_hundred_images_at_once(server: ServerProcess, image: bytes) -> None:
    options = ClassifyOptions(model="base", labels=["cat", "car", "house"], top_k=3)

    async def all_of_them() -> list[Prediction | Failure]:
        async with AsyncClient(server.url) as client:
            asked = (client.classify([image], options) for _ in range(200))
            return [answer.results[0] for answer in await asyncio.gather(*asked)]

    results = asyncio.run(all_of_them())

    assert len(results) == 200
    assert all(isinstance(one, Prediction) and one == results[0] for one in results)


class TestOfRepetition:
    """Requests are repeated where that can do no harm, and nowhere else."""

    def test_a_busy_server_is_asked_again_when_it_says(self, open_client: Open) -> None:
        with scripted(BUSY, OK) as server:
            start_s = time.monotonic()
            assert open_client(server.url).tasks().generation == 7
        assert len(server.asked) == 2
        assert time.monotonic() - start_s >= 1

    def test_a_lost_answer_is_asked_for_again(self, open_client: Open) -> None:
        with scripted(CUT, OK) as server:
            assert open_client(server.url).tasks().generation == 7
        assert len(server.asked) == 2

    def test_it_gives_up_with_the_last_answer(self, open_client: Open) -> None:
        with scripted(Answer(502)) as server, pytest.raises(RefusedError) as refused:
            open_client(server.url, retries=1).tasks()
        assert (refused.value.status, len(server.asked)) == (502, 2)

    @pytest.mark.parametrize("answer", [BUSY, CUT], ids=["busy", "lost"])
    def test_an_upload_is_sent_once(self, open_client: Open, bundle: Path, answer: Answer) -> None:
        refused = pytest.raises((RefusedError, UnreachableError))
        with scripted(answer, OK) as server, refused:
            open_client(server.url).register("a", "1", bundle)
        assert [size for _, _, size in server.asked] == [bundle.stat().st_size]
        assert "wait=300" in server.asked[0][1]

    def test_what_would_be_answered_otherwise_is_not_repeated(self, open_client: Open) -> None:
        with scripted(CUT) as server:
            client = open_client(server.url)
            changes: list[Callable[[], object]] = [
                lambda: client.rollback("a"),
                lambda: client.promote("a"),
                lambda: client.delete("a"),
                lambda: client.delete_alias("a", "b"),
                lambda: client.stop_rollout("a"),
                lambda: client.set_alias("a", "b", "1", if_match=3),
            ]
            for change in changes:
                with pytest.raises(UnreachableError):
                    change()
        assert len(server.asked) == 6
        assert server.headers[-1]["if-match"] == '"3"'

    def test_whoever_answers_has_to_know_of_the_changes_made_here_before(
        self, open_client: Open
    ) -> None:
        with scripted(OK, Answer(204, headers={"X-Registry-Generation": "41"}), OK) as server:
            client = open_client(server.url)
            client.tasks()
            client.delete("a")
            client.tasks()
        assert [h.get("x-min-generation") for h in server.headers] == [None, None, "41"]

    def test_servers_that_share_nothing_are_asked_for_no_generation(
        self, open_client: Open
    ) -> None:
        with scripted(Answer(204, headers={"X-Registry-Generation": "41"}), OK) as server:
            client = open_client(server.url, own_changes=False)
            client.delete("a")
            client.tasks()
        assert "x-min-generation" not in server.headers[-1]

    def test_a_server_that_is_not_there_yet_is_waited_for_also_with_an_upload(
        self, open_client: Open, bundle: Path
    ) -> None:
        port = free_port()
        client = open_client(f"http://127.0.0.1:{port}", retries=12)
        serve, done = threading.Event(), threading.Event()
        servers = []

        def late() -> None:
            serve.wait(0.2)  # never set: the client finds nobody at first
            with scripted(Answer(409), port=port) as server:
                servers.append(server)
                done.wait(30)

        thread = threading.Thread(target=late)
        thread.start()
        try:
            with pytest.raises(RefusedError) as refused:
                client.register("a", "1", bundle)
        finally:
            done.set()
            thread.join()
        assert refused.value.status == 409
        assert [size for _, _, size in servers[0].asked] == [bundle.stat().st_size]

    def test_silence_ends_it_and_is_not_repeated(self, open_client: Open) -> None:
        end = threading.Event()
        with scripted(OK, silent=end) as server:
            with pytest.raises(UnreachableError, match=r"ReadTimeout|timed out"):
                open_client(server.url, timeout_s=0.2).tasks()
            asked = len(server.asked)
            end.set()
        assert asked == 1

    def test_a_long_change_gets_more_time_but_no_more_than_servers_allow(
        self, open_client: Open, bundle: Path
    ) -> None:
        with scripted(Answer(404)) as server:
            for timeout_s in (0.5, 1000.0):
                with pytest.raises(RefusedError):
                    open_client(server.url, timeout_s=timeout_s).register("a", "1", bundle)
        assert "wait=5.0" in server.asked[0][1]
        assert "wait=600" in server.asked[1][1]


@pytest.mark.parametrize(
    "answer",
    [
        Answer(200, b"<html>hello</html>"),
        Answer(200, b"{}"),
        Answer(302, headers={"Location": "http://127.0.0.1:1/"}),
        Answer(202, b"{}"),
        Answer(204),
    ],
)
def test_what_is_no_medley_server_is_said_so(open_client: Open, answer: Answer) -> None:
    with scripted(answer) as server, pytest.raises(UnreachableError, match="no Medley server"):
        open_client(server.url).tasks()
    assert len(server.asked) == 1


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"detail": 3, "problems": 5}', b'"x"'])
def test_errors_in_any_shape_are_refusals(open_client: Open, body: bytes) -> None:
    with scripted(Answer(404, body)) as server, pytest.raises(RefusedError) as refused:
        open_client(server.url).tasks()
    assert refused.value.problems == []


@pytest.mark.parametrize("key", ["two words", "se\nsame", "s\u00e9same", ""])
def test_a_key_that_no_header_takes_is_refused_and_not_shown(open_client: Open, key: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII") as error:
        open_client("http://127.0.0.1:1", key=SecretStr(key))
    assert not key or key not in str(error.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:port", ""])
def test_a_url_of_no_server_is_refused(open_client: Open, url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        open_client(url)
