"""The commands as people meet them: a task learnt and measured, and one line for every mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medley import cli
from medley.bundle import read_bundle
from tests.models import tiny_backbone
from tests.trainer.test_training import LABEL, SETTINGS, Watch
from tests.trainer.tiny import NoLargeFiles, broken_image, folder_of, pictures
from trainer.run import learn

FAST = ["--iterations", "2", "--batch-size", "4", "--augmented-copies", "0"]
FAST += ["--hold-out", "0.4", "--alpha", "0.3", "--ddas-iterations", "5", "--bottleneck", "4"]


def medley(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run the command line; return the exit status."""
    monkeypatch.setattr(sys, "argv", ["medley", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    return folder_of(pictures(["red", "green"], 10), tmp_path / "colours")


def test_a_task_is_learnt_and_measured(
    colours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    words = ("train", colours, "--task", "colours", "--version", "2", "--out", run, *FAST)
    assert medley(monkeypatch, *words) == 0
    bundle = run / "colours-2.safetensors"
    assert read_bundle(bundle).manifest.class_names == ("green", "red")
    data = ("--data", f"colours={colours}", "--data", f"strangers={colours}")
    out = tmp_path / "evaluation"
    assert medley(monkeypatch, "evaluate", "--bundle", bundle, *data, "--out", out) == 0
    assert "colours" in capsys.readouterr().out
    result = json.loads((out / "evaluation.json").read_text())
    assert [score["images"] for score in result["scores"]] == [20, 20]
    assert (out / "confusion.png").is_file()


@pytest.mark.parametrize(
    ("selector", "line"),
    [("ddas", "at most 30.0% promised"), ("gaussian+reference", "% measured")],
)
def test_who_decides_is_chosen_and_told(
    colours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    selector: str,
    line: str,
) -> None:
    run = tmp_path / "run"
    words = ("train", colours, "--task", "colours", "--out", run, "--selector", selector, *FAST)
    assert medley(monkeypatch, *words) == 0
    assert line in capsys.readouterr().out
    report = (run / "colours-1" / "report.md").read_text()
    assert "| who decides |" in report
    assert f"| selector | {selector} |" in report


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--lr", "0"], "lr is 0; it must be more than 0"),
        (["--shots", "11"], "11 shots asked, but class 'green' has 10 images"),
        (["--first-expert-block", "9"], "only the blocks 0 to 3"),
        (["--backbone", "ViT-B-99"], "no backbone is called 'ViT-B-99'"),
        (["--backbone", "ViT-B-16"], "ViT-B-16 needs weights"),
        (["--weights", "nowhere.safetensors"], "no file nowhere.safetensors"),
        (["--after", "nowhere.safetensors"], "cannot read nowhere.safetensors"),
        (["--task", "No Name"], "task 'No Name'"),
        (["--resume"], "no checkpoint to resume from"),
    ],
)
def test_a_bad_option_is_one_line(
    colours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    line: str,
) -> None:
    basic = ("train", colours, "--task", "colours", "--out", tmp_path / "run", *FAST)
    assert medley(monkeypatch, *basic, *words) == 2
    assert_one_line(capsys, line)


def test_an_empty_folder_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert medley(monkeypatch, "train", tmp_path, "--task", "x", "--out", tmp_path / "run") == 2
    assert_one_line(capsys, "no class folders in it")


def test_one_class_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder_of(pictures(["red"], 3), tmp_path / "data")
    assert medley(monkeypatch, "train", data, "--task", "x", "--out", tmp_path / "run") == 2
    assert_one_line(capsys, "only one class")


def test_a_class_with_one_image_is_one_line(
    colours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder_of(pictures(["blue"], 1), colours)
    assert medley(monkeypatch, "train", colours, "--task", "x", "--out", tmp_path / "run") == 2
    assert_one_line(capsys, "too few in 'blue' (1)")


def test_unreadable_images_are_listed_and_may_be_skipped(
    colours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken_image(colours / "red" / "broken.png")
    words = ("train", colours, "--task", "colours", "--out", tmp_path / "run", *FAST)
    assert medley(monkeypatch, *words) == 2
    assert_one_line(capsys, "broken.png")
    assert medley(monkeypatch, *words, "--skip-unreadable") == 0
    assert "20 images of 2 classes" in capsys.readouterr().out


def test_a_bundle_of_another_backbone_is_one_line(
    colours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = pictures(["red", "green"], 5)
    learn(tiny_backbone(), images, SETTINGS, label=LABEL, folder=tmp_path, watcher=Watch())
    stranger = tmp_path / "colours-1.safetensors"
    words = ("train", colours, "--task", "x", "--out", tmp_path / "run", "--after", stranger)
    assert medley(monkeypatch, *words) == 2
    assert_one_line(capsys, "learnt on another backbone (tiny)")
    other = ("evaluate", "--bundle", stranger, "--data", f"colours={colours}")
    assert medley(monkeypatch, *other) == 2
    assert_one_line(capsys, "fingerprint")


def test_a_folder_that_cannot_be_written_is_one_line(
    colours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("in the way")
    words = ("train", colours, "--task", "x", "--out", tmp_path / "file" / "run", *FAST)
    assert medley(monkeypatch, *words) == 2
    assert_one_line(capsys, "cannot write to")


def test_a_full_disk_is_one_line(
    colours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_large_files: NoLargeFiles,
) -> None:
    words = ("train", colours, "--task", "x", "--out", tmp_path / "run", *FAST)
    with no_large_files():
        assert medley(monkeypatch, *words) == 2
    assert_one_line(capsys, "cannot write")
    assert [file for file in (tmp_path / "run").rglob("*") if file.is_file()] == []


@pytest.mark.parametrize("data", ["colours", "=x", "x="])
def test_data_without_a_task_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: str
) -> None:
    images = pictures(["red", "green"], 5)
    learn(tiny_backbone(), images, SETTINGS, label=LABEL, folder=tmp_path, watcher=Watch())
    bundle = tmp_path / "colours-1.safetensors"
    assert medley(monkeypatch, "evaluate", "--bundle", bundle, "--data", data) == 2
    assert_one_line(capsys, "expected TASK=DATA")


def test_classes_that_the_task_does_not_have_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = pictures(["red", "green"], 5)
    learn(tiny_backbone(), images, SETTINGS, label=LABEL, folder=tmp_path, watcher=Watch())
    data = folder_of(pictures(["red", "blue"], 3), tmp_path / "data")
    bundle = tmp_path / "colours-1.safetensors"
    assert medley(monkeypatch, "evaluate", "--bundle", bundle, "--data", f"colours={data}") == 2
    assert_one_line(capsys, "unknown classes: blue")


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", str(colours), "--task", "x", *FAST, "--iterations", "40"]
    assert medley(monkeypatch, *words, "--out", tmp_path / "whole") == 0
    start = [sys.executable, "-c", "from medley.cli import main; main()", *words]
    start += ["--out", str(tmp_path / "cut"), "--checkpoint-every", "0"]
    process = subprocess.Popen(start, env={**os.environ, "OMP_NUM_THREADS": "1"})
    checkpoint = tmp_path / "cut" / "x-1" / "checkpoint.pt"
    deadline_s = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline_s:
        assert process.poll() is None, "it ended before its first checkpoint"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "x-1.safetensors").exists()
    assert medley(monkeypatch, *words, "--out", tmp_path / "cut", "--resume") == 0
    whole, resumed = (
        (tmp_path / name / "x-1.safetensors").read_bytes() for name in ("whole", "cut")
    )
    assert resumed == whole


def assert_one_line(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """The error says what is wrong in one line, however the terminal folds it."""
    error = capsys.readouterr().err
    message = "".join(error[error.index("medley:") :].split())
    assert "".join(text.split()) in message
    assert "Traceback" not in error
    assert "\n\n" not in error.strip()
