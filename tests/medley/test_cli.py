"""The command collects the sub-commands of all packages and says what went wrong in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

MEDLEY = Path(sys.executable).parent / "medley"


def medley(*arguments: str) -> subprocess.CompletedProcess[str]:
    plain = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run(
        [MEDLEY, *arguments], capture_output=True, text=True, timeout=120, env=plain, check=False
    )


def test_help_lists_what_every_package_offers() -> None:
    answer = medley("--help")
    assert answer.returncode == 0
    for command in ("train", "evaluate", "pretrain", "serve", "classify", "task"):
        assert command in answer.stdout


@pytest.mark.parametrize("command", ["train", "evaluate", "serve", "classify"])
def test_every_command_explains_itself(command: str) -> None:
    answer = medley(command, "--help")
    assert answer.returncode == 0
    assert "Usage: medley" in answer.stdout


def test_an_error_is_one_line_without_a_traceback() -> None:
    answer = medley("train", "no/such/folder", "--task", "pets", "--out", "no/such/bundles")
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert len(answer.stderr.strip().splitlines()) == 1
    assert "no/such/folder" in answer.stderr
