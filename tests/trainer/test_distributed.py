"""Several processes learn what one alone learns: real ones, started as torchrun starts them."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from medley.bundle import Bundle, read_bundle
from medley.errors import DataError
from tests.models import tiny_backbone
from tests.redis_server import free_port
from tests.replicas.replica import run_command
from tests.trainer.test_training import LABEL, Watch
from tests.trainer.tiny import folder_of, pictures
from tests.trainer.together import RUNS, learnt
from trainer.checkpoint import load_checkpoint
from trainer.distributed import ALONE, Team, joined, own_device
from trainer.run import learn, training_parts

ROOT = Path(__file__).parents[2]
SIZE = 3  # of the team; not every batch can be shared equally
# What one process and several learn differs only in the order in which float32 numbers are added;
# but gradients of the text side nearly cancel over the classes, and Adam makes whole steps of what
# is left. The largest differences seen over these runs of 12 steps: losses of about 1 by 8e-5,
# features of class texts by 2e-5, all parameters together by 0.2 %; momenta after 3 steps, which
# say whether the gradients are the same, by 2e-5 of their length.
LOSS, FEATURE, PARAMETERS, MOMENTA = 5e-4, 2e-4, 1e-2, 2e-4
COLOURS = 10
# As those of the replicas: forked from a process that has imported torch and not used it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.replicas.replica"])
TASK = ["--task", "x", "--hold-out", "0.4", "--alpha", "0.3", "--ddas-iterations", "5"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process learns."""
    folder = tmp_path_factory.mktemp("alone")
    for name, run in RUNS.items():
        if not run.resume:
            learnt(name, folder / name, ALONE)
    (folder / "resumed").symlink_to(folder / "cached")  # the same, had it not been interrupted
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a team learns, once after one process alone was interrupted."""
    folder = tmp_path_factory.mktemp("together")
    run = RUNS["resumed"]
    with pytest.raises(KeyboardInterrupt):
        learn(
            tiny_backbone(),
            run.images,
            run.settings,
            label=LABEL,
            folder=folder / "resumed",
            checkpoint_every_s=0,
            watcher=Watch(7),
        )
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += ["--nproc-per-node", str(SIZE), "-m", "tests.trainer.together", str(folder)]
    subprocess.run(start, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_team_learns_what_one_process_learns(alone: Path, together: Path, name: str) -> None:
    one, many = (saved(folder / name) for folder in (alone, together))
    assert many["history"]["losses"] == pytest.approx(one["history"]["losses"], abs=LOSS)
    assert many["history"]["accuracies"] == pytest.approx(one["history"]["accuracies"])
    assert many["history"]["held_out"] == one["history"]["held_out"]
    assert apart(one["learner"], many["learner"]) < PARAMETERS
    first, second = (bundle(folder / name) for folder in (alone, together))
    features = [one.tensors["class_text_features"] for one in (first, second)]
    torch.testing.assert_close(*features, rtol=0, atol=FEATURE)


def test_gradients_are_those_of_the_whole_batch(alone: Path, together: Path) -> None:
    """Adam would hide a factor; its momenta do not."""
    one, many = (saved(folder / "each image once") for folder in (alone, together))
    momenta = [
        {str(number): state["exp_avg"] for number, state in run["optimiser"]["state"].items()}
        for run in (one, many)
    ]
    assert apart(*momenta) < MOMENTA


@pytest.mark.parametrize("name", RUNS)
def test_a_team_counts_calibrates_and_measures_as_one_process(
    alone: Path, together: Path, name: str
) -> None:
    one, many = (saved(folder / name)["learner"] for folder in (alone, together))
    for key in one:
        if key.endswith("counts_E"):
            assert torch.equal(many[key], one[key]), key
    first, second = (bundle(folder / name) for folder in (alone, together))
    assert second.manifest.selector == first.manifest.selector  # to the last bit
    assert second.manifest.training.metrics == first.manifest.training.metrics


@pytest.mark.parametrize("name", RUNS)
def test_all_processes_end_with_the_same_bundle(together: Path, name: str) -> None:
    digests = json.loads((together / name / "digests.json").read_text())
    assert len(digests) == SIZE
    assert set(digests) == {bundle(together / name).digest}


def test_processes_that_were_given_different_things_are_refused(together: Path) -> None:
    said = json.loads((together / "disagreed.json").read_text())
    assert ["do not have the same data" in text for text in said] == [True] * SIZE


def test_an_odd_batch_leaves_somebody_without_an_image() -> None:
    run = RUNS["last batch of one"]
    images, _ = training_parts(run.images, run.settings)
    assert len(images) % run.settings.batch_size == 1 < SIZE


def test_one_process_speaks_of_a_mistake_that_all_make(tmp_path: Path) -> None:
    words = ["train", str(tmp_path), "--out", str(tmp_path / "run"), *TASK, "--lr", "0"]
    team = started(words, tmp_path)
    assert [ended(process) for process, _ in team] == [2, 2]
    said = "".join(log.read_text() for _, log in team)
    assert said.count("medley: lr is 0") == 1
    assert "Traceback" not in said


def test_when_a_process_is_killed_the_others_end_with_one_line(tmp_path: Path) -> None:
    colours = folder_of(pictures(["red", "green"], COLOURS), tmp_path / "colours")
    words = ["train", str(colours), "--out", str(tmp_path / "run"), *TASK, "--batch-size", "4"]
    words += ["--iterations", "100000", "--checkpoint-every", "0"]
    (first, log), (second, _) = started(words, tmp_path)
    checkpoint = tmp_path / "run" / "x-1" / "checkpoint.pt"
    deadline_s = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline_s:
        first.join(0.1)
        assert first.exitcode is None, log.read_text()
    second.kill()
    assert ended(first) == 2
    assert log.read_text().count("medley: another process of this run has ended") == 1
    assert "Traceback" not in log.read_text()
    assert load_checkpoint(checkpoint)["history"]["losses"]  # to go on from


@pytest.mark.parametrize("count", range(8))
@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_make_up_the_batch(count: int, size: int) -> None:
    parts = [Team(rank, size).part(count) for rank in range(size)]
    rows = list(range(count))
    assert [row for part in parts for row in rows[part.rows]] == rows
    assert max(len(rows[p.rows]) for p in parts) - min(len(rows[p.rows]) for p in parts) <= 1
    if count:
        assert sum(part.share for part in parts) == pytest.approx(1)


def test_random_numbers_of_an_image_do_not_depend_on_the_team() -> None:
    def draw(rows: int) -> torch.Tensor:
        torch.manual_seed(3)
        return torch.randn(rows, 5)

    parts = [Team(rank, 3).part(7).drawn(draw) for rank in range(3)]
    assert torch.equal(torch.cat(parts), draw(7))


def test_alone_everything_is_ones_own_and_nothing_is_exchanged() -> None:
    numbers = torch.arange(4.0)
    assert ALONE.total(numbers) is numbers
    ALONE.add_up([numbers])
    ALONE.spread(numbers, source=0)
    assert torch.equal(numbers, torch.arange(4.0))
    assert ALONE.pooled(ALONE.own(range(5))) == [0, 1, 2, 3, 4]
    assert ALONE.told(lambda: "word") == "word"
    with joined("cpu") as team:
        assert team == ALONE


def test_every_process_of_a_machine_has_a_device_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert own_device("cuda") == "cuda"  # started by hand
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device("cpu") == "cpu"
    assert own_device("cuda:3") == "cuda:3"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device("cuda") == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DataError, match="2 processes, but this machine has 1 GPUs"):
        own_device("cuda")


def saved(folder: Path) -> dict[str, Any]:
    return load_checkpoint(folder / "colours-1" / "checkpoint.pt")


def bundle(folder: Path) -> Bundle:
    return read_bundle(folder / "colours-1.safetensors")


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The length of the difference of all trained tensors, of the first ones' length."""
    names = [name for name in one if not name.endswith("counts_E")]
    first, second = (torch.cat([x[name].flatten() for name in names]) for x in (one, other))
    return float((first - second).norm() / first.norm())


def started(words: list[str], folder: Path, size: int = 2) -> list[tuple[ForkServerProcess, Path]]:
    """The command as processes of a team, with nobody to look after them, and what they say."""
    team = []
    port = free_port()
    for rank in range(size):
        said = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in said.items()}
        log = folder / f"{rank}.log"
        process = FORKS.Process(target=run_command, args=(words, environment, log), daemon=True)
        process.start()
        team.append((process, log))
    return team


def ended(process: ForkServerProcess) -> int | None:
    """The status it ended with."""
    process.join(60)
    return process.exitcode
