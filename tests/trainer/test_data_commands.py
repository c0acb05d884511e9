"""`medley data`: what it lists, what it refuses, and that it goes on to the end."""

import sys
from pathlib import Path

import pytest

from medley import cli
from tests.trainer.mtil.copies import COPIES
from tests.trainer.suite.test_cards import pinned_counts, write_textile
from trainer.mtil import CARDS, TASKS
from trainer.suite import TASKS as SMALL_TASKS


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


def medley(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run the command line; return the exit status."""
    monkeypatch.setattr(sys, "argv", ["medley", "data", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_the_list_shows_both_suites_and_builds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert medley(monkeypatch, "list", "--cache", tmp_path) == 0
    shown = capsys.readouterr().out
    assert all(task in shown for task in (*SMALL_TASKS, *TASKS))
    assert "87,003" in shown
    assert "CC-BY-SA-4.0" in shown
    assert "random 80/20, seed 42" in shown
    assert "yes" not in shown.split()
    assert list(tmp_path.iterdir()) == []


def test_the_list_says_which_folders_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    COPIES["pets"](tmp_path)
    assert medley(monkeypatch, "list", "--suite", "mtil", "--root", tmp_path) == 0
    rows = [line.replace("|", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert sum("yes" in row for row in rows) == 1


def test_mtil_is_not_fetched_and_one_line_says_where_it_comes_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert medley(monkeypatch, "fetch", "--suite", "mtil") == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert all(card.source in said for card in CARDS.values())


def test_what_is_built_already_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_textile(tmp_path, pinned_counts())
    assert medley(monkeypatch, "fetch", "textile", "--cache", tmp_path) == 0
    assert "1/1" in capsys.readouterr().err
    assert not (tmp_path / "sources").exists()


def test_a_check_goes_through_all_data_sets_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    COPIES["pets"](tmp_path)
    COPIES["eurosat"](tmp_path)
    assert medley(monkeypatch, "check", "--suite", "mtil", "--root", tmp_path) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0].partition(" ")[0] for line in lines] == sorted(
        (line.partition(":")[0].partition(" ")[0] for line in lines), key=TASKS.index
    )
    assert {line.partition(":")[0].partition(" ")[0] for line in lines} == set(TASKS)
    assert lines[0] == (
        f"aircraft: {tmp_path / 'fgvc-aircraft-2013b/data'}: no such folder; "
        f"3,334 train + 3,333 test images expected, 0 found"
    )
    assert "pets train: 3,680 images expected, 2 found" in lines
    river = tmp_path / "eurosat/2750/River"
    assert (
        f"eurosat: class 'river': 2,500 images expected, 0 found ({river}, no such folder)" in lines
    )


def test_a_check_of_one_task_looks_at_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert medley(monkeypatch, "check", "digits", "--cache", tmp_path) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("digits: not built yet (")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("check", "--suite", "mtil"), "mtil needs --root"),
        (("check", "mars"), "no task 'mars'"),
        (("check", "digits", "digits"), "digits twice"),
        (("fetch", "mars"), "no task 'mars'"),
    ],
)
def test_a_mistake_is_one_line(
    words: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert medley(monkeypatch, *words) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said


def test_an_unknown_suite_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert medley(monkeypatch, "check", "--suite", "imagenet") == 2
    assert "imagenet" in capsys.readouterr().err
