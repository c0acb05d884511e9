"""Tuning, as far as it goes without a device: ranking candidates, and checking answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels import tune
from kernels.problems import Mixing, Scoring
from tests.kernels.interpreter import Interpreter
from tests.kernels.scoring_cases import IdleScoring
from tests.tolerances import FUSED, SCORED


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_tuning_without_a_device_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["autoencoder_errors"]) == 2
    assert capsys.readouterr().out == "No CUDA device to time on; --compile-only needs none.\n"


@pytest.mark.parametrize(
    "kernel", ["autoencoder_errors", pytest.param("expert_mixing", marks=pytest.mark.slow)]
)
def test_candidates_are_ranked_by_what_they_need(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = tune.SPACES[kernel]
    monkeypatch.setitem(tune.SPACES, kernel, replace(space, problems=space.problems[:2]))
    file = tmp_path / "trials.json"
    options = ["--compile-only", "--candidates", "1", "--processes", "1", "--json", str(file)]
    assert tune.main([kernel, *options]) == 0
    trials = json.loads(file.read_text())
    assert len(trials) == 2
    for trial in trials:
        assert trial["needs"]["spilled_bytes"] == 0
        assert 0 < trial["needs"]["registers"] <= 255
        assert trial["median_us"] is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kernel", sorted(tune.SPACES))
def test_a_candidate_is_checked_and_timed(kernel: str) -> None:
    space = tune.SPACES[kernel]
    error, median_us = tune.time_us(
        space.problems[0], space.launches[0], device="cuda", tolerance=space.tolerance
    )
    assert error <= space.tolerance
    assert median_us > 0


def test_a_right_kernel_has_a_small_error(interpreter: Interpreter) -> None:
    mixing = Mixing(rows=2, tokens=5, width=64, bottleneck=16, dtype=torch.float32, device="cpu")
    # y is what is left of r after x, all of one size: twice the error.
    assert interpreter.call(Mixing.error, mixing) < 2 * FUSED[torch.float32]
    scoring = Scoring(images=5, codes=8, width=48, tasks=3, device="cpu")
    assert interpreter.call(Scoring.error, scoring) < SCORED


def test_an_answer_that_is_not_written_has_no_small_error(interpreter: Interpreter) -> None:
    idle = IdleScoring(images=5, codes=8, width=48, tasks=3, device="cpu")
    assert not interpreter.call(IdleScoring.error, idle) < 1
