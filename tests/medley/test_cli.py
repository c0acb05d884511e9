"""The command collects the sub-commands of all packages and says what went wrong in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup
from typer.main import get_group

from medley.cli import merge

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


def test_a_group_that_several_packages_have_is_one_group() -> None:
    answer = medley("bench", "--help")
    assert answer.returncode == 0
    for command in ("speed", "mtil", "serve"):  # the trainer's and the service's
        assert f" {command} " in answer.stdout


def group(*commands: str) -> TyperGroup:
    """A command line with a group `bench` of such commands."""
    inner = typer.Typer()
    inner.callback()(lambda: None)
    for name in commands:
        inner.command(name)(lambda: None)
    outer = typer.Typer()
    outer.callback()(lambda: None)
    outer.add_typer(inner, name="bench")
    return get_group(outer)


def test_groups_of_one_name_are_merged_and_keep_their_commands() -> None:
    one = group("fast")
    merge(one, group("slow"))
    bench = one.commands["bench"]
    assert isinstance(bench, TyperGroup)
    assert bench.commands.keys() == {"fast", "slow"}


def test_two_commands_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two packages have a command 'fast'"):
        merge(group("fast"), group("fast"))
