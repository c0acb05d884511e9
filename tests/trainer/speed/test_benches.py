"""The benches themselves, on shapes so small that they take seconds."""

from pathlib import Path

import pytest
import torch

from medley.journal import Conditions, Journal, Measurement, read_lines
from tests.models import tiny_backbone
from tests.trainer.test_commands import medley
from trainer.speed import commands
from trainer.speed.block import Shape
from trainer.speed.commands import DeviceName
from trainer.speed.mixing import KernelsPlan, measure_kernels
from trainer.speed.plans import Bench
from trainer.speed.scoring import DdasPlan, measure_ddas
from trainer.speed.swapping import SwapPlan, measure_swap
from trainer.speed.towers import ModelPlan, measure_model

CPU = torch.device("cpu")
AT: Conditions = {"backbone": "tiny", "precision": "fp32", "batch": 1, "width": 4}


def measured(folder: Path, bench: Bench) -> list[Measurement]:
    """Through the body of the commands: device, journal, bars, report."""
    commands._one(folder, DeviceName.CPU, lambda _: bench, report_only=False)
    assert (folder / "report.md").exists()
    found = read_lines(folder)
    assert not [line for line in found if line.failure]
    return found


def test_kernels_are_checked_then_timed_in_every_mix(tmp_path: Path) -> None:
    small = Shape("small", 9, 32)
    plan = KernelsPlan(device=CPU, batches=(1, 4), repeats=2, shapes=(small,))
    rows = plan.steps

    def run(journal: Journal, on_row: object) -> None:
        measure_kernels(journal, plan, on_row=seen.append)

    seen: list[int] = []
    found = measured(tmp_path, Bench("kernels", rows, run))
    assert len(seen) == rows == 14 + 12
    assert {line.bench for line in found} == {"check", "ceiling", "kernels", "low rank"}
    checks = [line for line in found if line.bench == "check"]
    assert all(line.values["error"] <= line.values["limit"] for line in checks)
    assert {line.column for line in checks} == {
        "expert_mixing",
        "expert_mixing_norm, r",
        "expert_mixing_norm, z",
        "add_low_rank_, fc",
        "add_low_rank_, proj",
        "autoencoder_errors",
    }
    columns = {line.column for line in found if line.bench == "low rank"}
    assert columns == {"layers alone", "medley", "gather + bmm"}
    timed = [line for line in found if line.bench == "kernels"]
    assert all(len(line.times_s) == 2 for line in timed)
    assert max(line.values.get("error", 0) for line in timed) < 2e-2


def test_towers_with_experts_are_timed_beside_the_frozen_one(tmp_path: Path) -> None:
    plan = ModelPlan(
        device=CPU, backbones=((tiny_backbone(), (1, 2)),), repeats=2, tasks=3, least_s=0
    )
    bench = Bench("model", plan.rows, lambda to, on: measure_model(to, plan, on_row=on))
    found = measured(tmp_path, bench)
    towers = [line for line in found if line.conditions["what"] == "tower"]
    assert len(towers) == 8 * 2 * 3  # columns, batch sizes, precisions
    assert {line.conditions["precision"] for line in found} == {"exact", "fp32", "bf16"}


def test_deciding_is_timed_beside_a_forward(tmp_path: Path) -> None:
    plan = DdasPlan(
        device=CPU,
        backbones=((tiny_backbone(), (2,)),),
        repeats=2,
        tasks=(1, 3),
        paper_tasks=(1,),
        paper_width=50,
        least_s=0,
    )
    bench = Bench("ddas", plan.rows, lambda to, on: measure_ddas(to, plan, on_row=on))
    names = [line.column for line in measured(tmp_path, bench)]
    assert names == ["forward", "1 tasks", "3 tasks", "AlexNet", "1 tasks, paper's size"]


def test_swaps_leave_the_other_tasks_alone(tmp_path: Path) -> None:
    plan = SwapPlan(
        device=CPU,
        backbone=tiny_backbone(),
        batch=2,
        repeats=1,
        tasks=2,
        swaps=6,
        checks=3,
        segment_s=0.8,
    )
    bench = Bench("swap", plan.rows, lambda to, on: measure_swap(to, plan, on_row=on))
    found = {line.column: line for line in measured(tmp_path, bench)}
    values = found["other tasks"].values
    assert (values["answers_compared"], values["answers_different"]) == (3 * 2 * 2, 0)
    assert len(found["experts enter"].times_s) == 6
    assert found["no swaps"].values["swaps"] == 0
    assert found["a swap every 100 ms"].values["swaps"] >= 1


def test_all_of_them_together_have_one_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {
        "ddas": lambda _: Bench("ddas", 1, lambda to, on: to.add("ddas", AT, "forward")),
        "swap": lambda _: Bench("swap", 1, lambda to, on: None),
    }
    commands._all(tmp_path, DeviceName.CPU, made, report_only=False)
    before = (tmp_path / "README.md").read_bytes()
    assert b"(ddas/report.md)" in before
    assert b"(swap/report.md)" in before
    commands._all(tmp_path, DeviceName.CPU, made, report_only=True)
    assert (tmp_path / "README.md").read_bytes() == before
    assert "README.md" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("kernels", "--report-only"), "measurements.jsonl"),
        (("model", "--batch", "3"), "batch size 3 is not a power of two"),
        (("ddas", "--backbone", "no-such-tower"), "no-such-tower"),
        (("swap", "--precision", "fp8"), "Invalid value"),
        (("speed", "--device", "tpu"), "Invalid value"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    line: str,
) -> None:
    assert medley(monkeypatch, "bench", *words, "--out", tmp_path / "run") == 2
    assert line in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("bench", ["kernels", "model", "ddas", "swap", "speed"])
def test_a_gpu_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bench: str
) -> None:
    out = tmp_path / "run"
    assert medley(monkeypatch, "bench", bench, "--device", "cuda", "--out", out) == 2
    assert "torch finds none here" in capsys.readouterr().err
    assert not out.exists()


def test_the_command_measures_the_real_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("bench", "kernels", "--out", tmp_path, "--batch", 1, "--repeats", 1)
    assert medley(monkeypatch, *words) == 0
    capsys.readouterr()
    assert medley(monkeypatch, "bench", "kernels", "--out", tmp_path, "--report-only") == 0
    assert "report.md" in capsys.readouterr().out.replace("\n", "")
    assert (tmp_path / "ratios.png").exists()
