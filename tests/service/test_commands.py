"""`medley serve | classify | route | task` as people type them, against a real server."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from medley.backbone import Backbone
from service.commands import commands
from service.commands.pictures import batches
from tests.service.conftest import ROOT, MakeBundle, ServerProcess
from tests.service.fused import made_fusion
from tests.service.scripted import Answer, scripted

RUNNER = CliRunner(env={"COLUMNS": "120"})


def medley(*words: str | Path) -> Result:
    return RUNNER.invoke(commands, [str(word) for word in words])


def dumps(value: object) -> bytes:
    return json.dumps(value).encode()


def test_a_task_is_registered_used_rolled_back_and_deleted(
    server: ServerProcess, make: MakeBundle, image: bytes, tmp_path: Path
) -> None:
    url, picture = ("--url", server.url), tmp_path / "picture.png"
    picture.write_bytes(image)
    bundles = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for version, path in enumerate(bundles, 1):
        path.write_bytes(make(task="typed", version=str(version), seed=version)[1])

    registered = [medley("task", "register", path, *url) for path in bundles]
    assert [result.exit_code for result in registered] == [0, 0]
    assert registered[1].stdout == "typed@2 is registered; live: 2\n"
    assert "typed" in medley("task", "list", *url).stdout
    shown = medley("classify", picture, picture, "--model", "typed", *url)
    assert shown.exit_code == 0
    assert shown.stdout.count("typed@2") == 2
    assert medley("task", "rollback", "typed", *url).stdout == "typed: live is 1\n"
    as_json = medley("classify", picture, "--model", "typed", "--top-k", "3", "--json", *url)
    assert json.loads(as_json.stdout)["path"]["version"] == "1"
    assert medley("task", "activate", "typed", "2", *url).stdout == "typed: live is 2\n"
    assert medley("task", "rollback", "typed", *url).stdout == "typed: live is 1\n"
    assert medley("task", "delete", "typed", "--version", "2", *url).exit_code == 0
    assert medley("task", "delete", "typed", *url).stdout == "typed is gone\n"
    assert "typed" not in medley("task", "list", *url).stdout


def test_a_trigger_bundle_takes_its_unified_model_along_once(
    server: ServerProcess, backbone: Backbone, tmp_path: Path
) -> None:
    url = ("--url", server.url)
    fusion = made_fusion(tmp_path, backbone, ("typed-birds", "typed-cars"), seed=3)
    aside = tmp_path / "aside"
    fusion.path.rename(aside)

    alone = medley("task", "register", fusion.file("typed-birds"), *url)
    assert (alone.exit_code, alone.stdout) == (2, "")
    assert f"there is no {fusion.path}" in alone.stderr.replace("\n", "")

    aside.rename(fusion.path)
    first = medley("task", "register", fusion.file("typed-birds"), *url)
    assert first.stdout == "typed-birds@1 is registered; live: 1\n", first.stderr
    fusion.path.unlink()  # the server has it by now
    second = medley("task", "register", fusion.file("typed-cars"), *url)
    assert second.exit_code == 0, second.stderr
    shown = json.loads(medley("task", "show", "typed-cars", "--json", *url).stdout)
    assert shown["versions"][0]["unified"] == fusion.digest
    for task in fusion.bundles:
        medley("task", "delete", task, *url)


def test_all_that_can_be_done_with_a_task_can_be_typed(
    server: ServerProcess, make: MakeBundle, image: bytes, tmp_path: Path
) -> None:
    url, picture = ("--url", server.url), tmp_path / "picture.png"
    picture.write_bytes(image)
    for version in ("1", "2"):
        path = tmp_path / f"{version}.safetensors"
        path.write_bytes(make(task="whole", version=version, seed=int(version))[1])
        assert medley("task", "register", path, "--no-activate", *url).exit_code == 0
    assert medley("task", "activate", "whole", "1", *url).stdout == "whole: live is 1\n"

    shown = json.loads(medley("task", "show", "whole", "--json", *url).stdout)
    seen = ("--if-match", str(shown["changed"]))
    named = medley("task", "alias", "whole", "canary", "2", *seen, *url)
    assert named.stdout == "whole: canary is 2, live is 1\n"
    late = medley("task", "activate", "whole", "2", *seen, *url)
    assert (late.exit_code, "has changed" in late.stderr) == (2, True)
    removed = medley("task", "alias", "whole", "canary", "--remove", *url)
    assert removed.stdout == "whole: live is 1\n"
    assert "stays on the device" in medley("task", "pin", "whole", "2", *url).stdout
    table = medley("task", "show", "whole", *url).stdout
    assert "classes: cat, dog, hamster" in table
    assert table.count("yes") == 1
    assert "may leave" in medley("task", "unpin", "whole", "2", *url).stdout
    assert medley("classify", picture, "--model", "whole@2", *url).exit_code == 0
    assert medley("task", "usage", "whole", *url).stdout.startswith("whole: 1 images, ")
    found = json.loads(medley("task", "operations", "--json", *url).stdout.splitlines()[0])
    assert (found["task"], found["version"], found["state"]) == ("whole", "2", "succeeded")
    assert "succeeded" in medley("task", "operations", *url).stdout

    start = ("task", "rollout", "start", "whole", "2", "--mode", "canary", "--share", "0.5")
    begun = medley(*start, *url).stdout
    assert begun.startswith("whole: canary of 2 beside 1 on 50% of the images, running; 0 compared")
    assert medley("task", "rollout", "stop", "whole", *url).stdout == "whole: no rollout\n"
    assert medley("task", "rollout", "show", "whole", *url).exit_code == 2
    medley("task", "rollout", "start", "whole", "2", *url)
    as_json = medley("task", "rollout", "show", "whole", "--json", *url).stdout
    assert json.loads(as_json)["rollout"]["mode"] == "shadow"
    assert medley("task", "rollout", "promote", "whole", *url).stdout == "whole: live is 2\n"
    medley("task", "delete", "whole", *url)


def test_where_an_image_goes_and_why(
    server: ServerProcess, make: MakeBundle, image: bytes, tmp_path: Path
) -> None:
    url, folder = ("--url", server.url), tmp_path / "pictures"
    for name in ("a.png", "deeper/b.PNG", "notes.txt"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image)
    bundle = tmp_path / "1.safetensors"
    bundle.write_bytes(make(task="taker", class_names=("taken", "taken away"))[1])
    medley("task", "register", bundle, *url)

    # A label that only this task has: others on this server would take the picture as well.
    shown = medley("route", folder, "--label", "taken", *url)
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.count(".png") == 1
    assert shown.stdout.count(".PNG") == 1
    for word in ("margin", "taker@1", "yes"):
        assert word in shown.stdout
    lines = medley("route", folder, "--model", "base", "--json", *url).stdout.splitlines()
    first = json.loads(lines[0])
    assert (len(lines), first["path"]["kind"]) == (2, "zero_shot")
    assert first["image"].endswith("a.png")
    assert first["scores"]["taker"]["accepted"]
    medley("task", "delete", "taker", *url)


def test_a_bundle_that_the_server_gets_is_registered_by_its_address(
    keyed_server: ServerProcess, make: MakeBundle
) -> None:
    source = keyed_server.store / "sources" / "typed.safetensors"
    source.write_bytes(make(task="typed")[1])
    words = ("task", "register", source, "--task", "typed", "--version", "1")
    where = ("--url", keyed_server.url)

    refused = medley(*words, *where)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "needs a key" in refused.stderr
    done = medley(*words, *where, "--key", "sesame")
    assert (done.exit_code, done.stdout) == (0, "typed@1 is registered; live: 1\n")


def test_warnings_of_a_registration_are_shown(
    keyed_server: ServerProcess, make: MakeBundle, tmp_path: Path
) -> None:
    where = ("--url", keyed_server.url, "--key", "sesame")
    for task in ("greedy", "greedier"):  # each accepts every image
        path = tmp_path / f"{task}.safetensors"
        path.write_bytes(make(task=task, seed=len(task))[1])
        last = medley("task", "register", path, *where)
    assert last.exit_code == 0
    assert last.stderr.startswith("warning: ")
    assert "greedy" in last.stderr


def test_a_registration_that_takes_long_is_waited_for(make: MakeBundle, tmp_path: Path) -> None:
    """The server answers 202, then that it runs, then how it ended."""
    path = tmp_path / "1.safetensors"
    path.write_bytes(make(task="slow")[1])
    running = {"id": "7", "kind": "register", "task": "slow", "version": "1", "state": "running"}
    running |= {"created_at": "now"}
    error = {"type": "x", "title": "x", "status": 422, "code": "x", "detail": "it is bad"}
    failed = running | {"state": "failed", "error": error | {"problems": ["this", "that"]}}
    answers = [Answer(202, dumps(running)), Answer(200, dumps(running)), Answer(200, dumps(failed))]
    with scripted(*answers) as server:
        result = medley("task", "register", path, "--url", server.url)
    assert (result.exit_code, result.stderr) == (2, "medley: this; that\n")
    assert [path for _, path, _ in server.asked[1:]] == ["/v1/operations/7"] * 2


def test_large_pictures_go_in_several_requests(tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(40)]
    for index, path in enumerate(paths):
        path.write_bytes(bytes(9 * 2**20 if index < 4 else 10))
    sizes = [len(batch) for batch in batches(paths)]
    assert sizes == [1, 1, 1, 16, 16, 5]


def test_labels_and_templates_are_options(
    server: ServerProcess, image: bytes, tmp_path: Path
) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(image)
    words = ["--label", "cat", "--label", "car", "--template", "{}!", "--model", "base"]

    result = medley("classify", picture, *words, "--url", server.url)

    assert result.exit_code == 0
    assert "zero-shot (request)" in result.stdout


def test_a_bad_picture_is_one_row_and_a_failure(
    server: ServerProcess, image: bytes, tmp_path: Path
) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(image)
    bad.write_bytes(b"no picture")

    for pictures in ((good, bad), (bad,)):
        result = medley("classify", *pictures, "--label", "cat", "--url", server.url)
        assert result.exit_code == 1
        assert "not an image" in result.stdout
        assert result.stderr == ""


@pytest.mark.parametrize(
    "words",
    [
        ("task", "list", "--url", "http://127.0.0.1:1"),
        ("classify", __file__, "--label", "x", "--url", "http://127.0.0.1:1"),
        ("classify", __file__, "--label", "x", "--label", "x"),
        ("task", "register", __file__),
        ("task", "rollback", "nobody"),
        ("task", "activate", "nobody", "1"),
        ("task", "delete", "nobody"),
        ("classify", __file__, "--model", "nobody"),
        ("serve", "--port", "70000"),
        ("task", "list", "--url", "localhost:8000"),
        ("task", "list", "--key", "two words"),
        ("route", str(Path(__file__).parent / "bench")),
        ("route", __file__, "--model", "nobody"),
        ("task", "show", "nobody"),
        ("task", "usage", "nobody"),
        ("task", "pin", "nobody", "1"),
        ("task", "unpin", "nobody", "1"),
        ("task", "alias", "nobody", "a", "1"),
        ("task", "alias", "nobody", "a"),
        ("task", "alias", "nobody", "a", "1", "--remove"),
        ("task", "register", "no-such-file"),
        ("task", "register", "s3://bucket/pets-1.safetensors"),
        ("task", "register", "x", "--task", "pets"),
        ("task", "register", "/srv/x", "--task", "pets", "--version", "1"),
        ("task", "rollout", "show", "nobody"),
        ("task", "rollout", "stop", "nobody"),
        ("task", "rollout", "promote", "nobody"),
        ("task", "rollout", "start", "nobody", "1"),
        ("task", "rollout", "start", "nobody", "1", "--share", "2"),
    ],
)
def test_what_cannot_be_done_is_one_line(server: ServerProcess, words: tuple[str, ...]) -> None:
    url = () if "--url" in words or words[0] == "serve" else ("--url", server.url)

    result = medley(*words, *url)

    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("medley: ")
    assert result.stderr.count("\n") == 1


def test_serve_says_where_it_answers_and_stops_when_told(tmp_path: Path) -> None:
    program = "from service.commands import commands; commands()"
    words = ["serve", "--port", "0", "--store", str(tmp_path / "store")]
    with subprocess.Popen(
        [sys.executable, "-c", program, *words],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.removeprefix("Medley answers at ").strip()
        assert "generation 0" in medley("task", "list", "--url", url).stdout
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
