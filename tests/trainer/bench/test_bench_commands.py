"""`medley bench` as people meet it: a run, and one line for every mistake."""

import json
from pathlib import Path

import pytest

from tests.trainer.test_commands import medley
from tests.trainer.tiny import folder_of, pictures

METHODS = ("zero-shot", "linear-probe", "moe_adapter")


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    for part, count, seed in (("train", 6, 1), ("test", 3, 2)):
        images = pictures(["red", "green", "blue", "white"], count, seed=seed)
        folder_of(images, tmp_path / "colours" / part)
    return tmp_path / "colours"


def test_classes_that_arrive_in_steps_give_a_table_and_a_picture(
    colours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = [word for name in METHODS for word in ("--method", name)]
    words = ("bench", "cil", colours, "--out", tmp_path / "run", "--cache", tmp_path / "cache")
    options = ("--steps", 2, "--seed", 0, *chosen)
    assert medley(monkeypatch, *words, *options) == 0
    results = json.loads((tmp_path / "run" / "cil.json").read_text())
    assert [result["method"] for result in results] == list(METHODS)
    assert all(len(result["accuracy_S"]) == 2 for result in results)
    assert "linear-probe" in (tmp_path / "run" / "cil.md").read_text()
    assert (tmp_path / "run" / "cil.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("mtil", "--order", "III"), "no order and no task 'III'"),
        (("mtil", "--order", "flags,flags"), "flags twice"),
        (("mtil", "--suite", "large"), "Invalid value"),
        (("mtil", "--protocol", "oracle"), "Invalid value"),
        (("mtil", "--method", "magic"), "Invalid value"),
        (("mtil", "--redundancy", "magic"), "Invalid value"),
        (("mtil", "--suite", "mtil", "--root", "nowhere", "--order", "pets"), "nowhere"),
        (("mtil", "--shots", "0"), "Invalid value"),
        (("cil", "no-such-folder"), "no-such-folder"),
        (("ablation", "everything"), "Invalid value"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_learnt(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    line: str,
) -> None:
    out = tmp_path / "run"
    cache = tmp_path / "cache"
    assert medley(monkeypatch, "bench", *words, "--out", out, "--cache", cache) == 2
    assert line in capsys.readouterr().err
    assert not list(out.glob("seed*"))


def test_steps_that_do_not_come_out_even_are_refused(
    colours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("bench", "cil", colours, "--out", tmp_path / "run", "--steps", 3)
    assert medley(monkeypatch, *words, "--cache", tmp_path / "cache") == 2
    assert "cannot be cut into 3 equal steps" in capsys.readouterr().err
