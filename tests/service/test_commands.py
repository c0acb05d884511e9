"""`medley serve | classify | task` as people type them, against a real server."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from service.commands import commands
from tests.service.conftest import ROOT, MakeBundle, ServerProcess

RUNNER = CliRunner(env={"COLUMNS": "120"})


def medley(*words: str | Path) -> Result:
    return RUNNER.invoke(commands, [str(word) for word in words])


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
    ],
)
def test_what_cannot_be_done_is_one_line(server: ServerProcess, words: tuple[str, ...]) -> None:
    url = () if "--url" in words or words[0] == "serve" else ("--url", server.url)

    result = medley(*words, *url)

    assert result.exit_code == 2
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
