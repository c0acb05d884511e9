"""The doctor finds nothing wrong with a healthy server, and what is wrong with broken ones."""

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from service.commands import commands
from service.doctor import images, wire
from service.doctor.findings import Finding
from service.doctor.generations import check_generations
from service.doctor.replicas import check_replicas
from service.doctor.site import Site
from tests.service.broken import Broken, served
from tests.service.conftest import MakeBundle, ServerProcess, StartServer
from tests.service.test_start_and_stop import free_port

RUNNER = CliRunner(env={"COLUMNS": "160"})
Check = Callable[[Site], Iterator[Finding]]
LIVE = {"digest": "sha256:7", "state": "live", "tier": "device"}
OTHER = LIVE | {"digest": "sha256:8"}
FAILED = LIVE | {"state": "failed", "reason": "damaged"}
LACK = {"version": "pets@2", "reason": "store away", "attempts": 3}


def failed(findings: Iterator[Finding]) -> set[str]:
    return {finding.check for finding in findings if finding.outcome == "fail"}


def failures_of(app: Broken, *checks: Check) -> set[str]:
    with served(app) as url, Site(url) as site:
        return {name for check in checks for name in failed(check(site))}


def test_a_healthy_server_passes_everything_and_serves_what_it_served(
    server: ServerProcess, http: httpx.Client, make: MakeBundle
) -> None:
    http.put("/v1/tasks/examined/versions/1", content=make(task="examined")[1]).raise_for_status()
    before = http.get("/v1/tasks").content

    result = RUNNER.invoke(commands, ["doctor", server.url, "--json"])

    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row for row in rows if row["outcome"] == "fail"] == []
    assert result.exit_code == 0
    assert {row["check"] for row in rows if row["outcome"] == "skip"} == {
        "keys: a wrong one",
        "keys: the right one",
        "slow",
        "generation: one that never comes",
    }
    assert len(rows) > 40
    assert http.get("/v1/tasks").content == before
    http.delete("/v1/tasks/examined")


def test_a_server_with_keys_passes_and_leaves_in_order(
    start_server: StartServer, tmp_path: Path
) -> None:
    keys, times = (
        ("admin_key=sesame", "read_key=open"),
        ("body_timeout_s=3", "header_timeout_s=1", "generation_wait_s=0.2"),
    )
    with start_server(tmp_path / "store", *keys, *times, "image_urls=true") as server:
        reaped = threading.Thread(target=server.process.wait)  # or its id would stay
        reaped.start()
        drained = ("--drain", "--pid", str(server.process.pid))
        words = ["--key", "sesame", "--slow", *drained, "--json"]
        shown = RUNNER.invoke(commands, ["doctor", server.url, *words])
        reaped.join()
    assert shown.exit_code == 0, shown.stdout
    outcomes = {row["check"]: row["outcome"] for row in map(json.loads, shown.stdout.splitlines())}
    assert set(outcomes.values()) == {"pass"}
    assert "drain: requests in flight" in outcomes
    assert server.process.returncode == 0


def test_without_the_key_what_needs_one_is_not_judged(keyed_server: ServerProcess) -> None:
    with Site(keyed_server.url) as site:
        findings = list(wire.check_access(site))
    assert [finding.outcome for finding in findings] == ["pass", "pass", "pass", "skip", "pass"]
    with Site(keyed_server.url, SecretStr("wrong")) as site:
        assert failed(wire.check_access(site)) == {"keys: the right one"}


class TestOfBrokenServers:
    """Each is wrong in its own way."""

    def test_one_that_says_yes_to_everything(self) -> None:
        with served(Broken(everything=200)) as url:
            shown = RUNNER.invoke(commands, ["doctor", url, "--patience", "0.3", "--json"])
        assert shown.exit_code == 1
        rows = [json.loads(line) for line in shown.stdout.splitlines()]
        passed = {row["check"] for row in rows if row["outcome"] == "pass"}
        assert all(row["expected"] and row["advice"] for row in rows if row["outcome"] == "fail")
        assert passed <= {
            "keys: reading",  # all of it is open
            "addresses: nobody calls",
            "limits: two lengths",  # by uvicorn
            "limits: length and chunks",
            "limits: one header of 1 MB",
            "limits: a body longer than it says",
            "limits: a body that ends early",
            "generation: told with every answer",
            "generation: asked for",  # it has the one that it says
            "clock",
        }

    def test_one_that_fails_on_poison(self) -> None:
        bad = {"empty", "not an image", "truncated JPEG", "truncated PNG", "PNG bomb"}
        bad = {f"poison: {name}" for name in bad}
        assert failures_of(Broken(on_bad_image=500), images.check_poison) == bad
        assert failures_of(Broken(), images.check_poison) == set()

    def test_one_that_dies_of_poison(self) -> None:
        found = failures_of(Broken(dies=True), images.check_poison)
        assert {"poison: empty", "poison: 1x1", "poison: CMYK"} <= found

    def test_one_that_has_no_key_for_changes(self) -> None:
        found = failures_of(Broken(), wire.check_access)
        assert found == {"keys: changes without one", "keys: changes by another site's page"}

    def test_one_that_gives_another_answer_each_time(self) -> None:
        found = failures_of(Broken(drifts=True), images.check_same, images.check_poison)
        assert {"same: twice", "poison: a good image afterwards"} <= found

    def test_one_that_fetches_from_its_own_machine(self) -> None:
        found = failures_of(Broken(fetches=True), images.check_addresses)
        assert {"addresses: private ones refused", "addresses: nobody calls"} <= found

    def test_one_whose_clock_is_wrong(self) -> None:
        app = Broken(date="Sun, 06 Nov 1994 08:49:37 GMT")
        assert failures_of(app, wire.check_clock) == {"clock"}
        assert failures_of(Broken(date="yesterday"), wire.check_clock) == {"clock"}
        assert failures_of(Broken(), wire.check_clock) == set()

    def test_one_of_several_that_is_behind(self) -> None:
        apps = [Broken(generation=7), Broken(generation=5), Broken(generation=7)]
        with ExitStack() as stack:
            urls = [stack.enter_context(served(app)) for app in apps]
            sites = [stack.enter_context(Site(url, patience_s=0)) for url in urls]
            findings = {finding.check: finding for finding in check_generations(sites)}
            together = check_generations([sites[0], sites[2]], slow=True)
            assert failed(together) == set()
        lag = findings["generation: the same everywhere"]
        assert (lag.outcome, "2 behind" in lag.came) == ("fail", True)
        assert findings["backbone: the same everywhere"].outcome == "pass"
        asked = findings["generation: asked for"]
        assert (asked.outcome, "503 behind from 5" in asked.came) == ("fail", True)

    def test_one_that_overlooks_which_generation_is_asked_for(self) -> None:
        with served(Broken(overlooks=True)) as url, Site(url) as site:
            found = failed(check_generations([site], slow=True))
        assert found == {"generation: nonsense asked for", "generation: one that never comes"}

    @pytest.mark.parametrize(
        ("told", "check", "came"),
        [
            ({"phase": "starting"}, "ready", "a: ready, b: starting"),
            ({"version": "2"}, "version of Medley", "a: 1, b: 2"),
            ({"fingerprint": "sha256:2"}, "backbone", "a: sha256:1, b: sha256:2"),
            ({"lacking": [LACK]}, "each has every version", "b: pets@2: store away"),
            ({"versions": {"pets@1": FAILED}}, "each has every version", "b: pets@1: damaged"),
            ({"versions": {"pets@1": OTHER}}, "the same bundles", "pets@1"),
        ],
    )
    def test_one_that_knows_of_a_bad_replica(
        self, told: dict[str, Any], check: str, came: str
    ) -> None:
        good = {"id": "a", "this": True, "versions": {"pets@1": LIVE}}
        with served(Broken(replicas=[good, {"id": "b", **told}])) as url, Site(url) as site:
            findings = {finding.check: finding for finding in check_replicas([site])}
        assert failed(iter(findings.values())) == {f"replicas: {check}"}
        assert findings[f"replicas: {check}"].came == came

    def test_several_that_do_not_know_each_other(self) -> None:
        apps = [Broken(replicas=[{"id": name, "this": True}]) for name in ("a", "b")]
        with ExitStack() as stack:
            urls = [stack.enter_context(served(app)) for app in apps]
            sites = [stack.enter_context(Site(url)) for url in urls]
            assert failed(check_replicas(sites)) == {"replicas: the same ones known everywhere"}

    def test_one_that_does_not_know_itself(self) -> None:
        assert "replicas: told of" in failures_of(
            Broken(replicas=[{"id": "a"}]), lambda site: check_replicas([site])
        )

    def test_one_whose_metrics_are_none(self) -> None:
        assert failures_of(Broken(), wire.check_metrics) == {"metrics"}


@pytest.mark.parametrize(
    "words",
    [
        ("localhost",),
        ("http://127.0.0.1:{port}",),
        ("http://127.0.0.1:{port}", "--drain"),
        ("http://127.0.0.1:{port}", "--pid", "5"),
        ("http://127.0.0.1:{port}", "http://127.0.0.1:{port}", "--drain", "--pid", "5"),
        ("http://127.0.0.1:{port}", "--key", "two words"),
    ],
)
def test_what_cannot_be_examined_is_one_line(words: tuple[str, ...]) -> None:
    port = free_port()
    result = RUNNER.invoke(commands, ["doctor", *(word.format(port=port) for word in words)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("medley: ")
    assert result.stderr.count("\n") == 1


def test_a_process_that_is_not_there_is_one_line(server: ServerProcess) -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    words = ["doctor", server.url, "--drain", "--pid", str(gone.pid)]
    result = RUNNER.invoke(commands, words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "No such process" in result.stderr
