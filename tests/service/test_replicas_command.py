"""`medley replicas`, against a real server that is alone and one that says it is not."""

import json

from service.client import Client
from tests.service.conftest import MakeBundle, ServerProcess
from tests.service.scripted import Answer, scripted
from tests.service.test_commands import dumps, medley
from tests.service.versions.test_tasks import put


def test_replicas_are_shown(server: ServerProcess, make: MakeBundle) -> None:
    with server.client() as http:
        put(http, make(task="shown-by-all")[1], "shown-by-all")
    shown = medley("replicas", "--url", server.url)
    assert shown.exit_code == 0
    assert "(asked)" in shown.stdout
    assert "ready" in shown.stdout
    (line,) = medley("replicas", "--json", "--url", server.url).stdout.splitlines()
    assert json.loads(line)["versions"]["shown-by-all@1"]["state"] == "live"
    with Client(server.url) as client:
        (one,) = client.replicas().replicas
    assert (one.this, one.ready, one.lacking) == (True, True, [])


def test_what_a_replica_cannot_serve_is_told() -> None:
    failed = {"digest": "d", "state": "failed", "tier": "disk", "reason": "[no] slot"}
    answer = {
        "generation": 3,
        "replicas": [
            {
                "id": "0123456789abcdef",
                "name": "far",
                "this": False,
                "phase": "starting",
                "ready": False,
                "generation": 2,
                "version": "0.1",
                "fingerprint": "sha256:0",
                "since": "2026",
                "versions": {"pets@1": failed},
                "lacking": [{"version": "pets@2", "reason": "it is away", "attempts": 3}],
            }
        ],
    }
    with scripted(Answer(200, dumps(answer))) as server:
        shown = medley("replicas", "--url", server.url).stdout
    assert "starting" in shown
    assert "far: pets@1 failed: [no] slot" in shown
    assert "far: waits for pets@2: it is away" in shown
