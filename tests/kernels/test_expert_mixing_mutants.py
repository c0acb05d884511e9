"""The cases below notice every mutant of the kernel, and find nothing wrong with itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.expert_mixing import table
from tests.kernels.interpreter import Interpreter
from tests.kernels.mixing_cases import Case, Problem, build, errors, launched, small
from tests.kernels.mutants import MUTANTS, written
from tests.tolerances import FUSED

SOURCE = Path(table.__file__).with_name("fused.py")
CASES = (
    Case(B=5, L=18, D=64, R=24, E=6, K=2, P=4, form="norm"),
    Case(B=3, L=18, D=64, R=24, E=6, K=2, form="mix", keep=True),
    Case(B=6, L=18, D=64, R=24, E=6, K=3, P=5),
)


def problem(case: Case) -> Problem:
    """A case with a path and slots just out of range."""
    p = build(case)
    paths, slots = len(p.slots_PE), len(p.weights_S2RD)
    p.paths_B[-1] = paths
    p.slots_PE[0, 2:] = slots
    p.slots_BK[0, 0] = slots
    return p


def wrongs(interpreter: Interpreter, source: Path) -> list[str]:
    """What the cases hold against a kernel; they stop at the first."""
    for case in CASES:
        p = problem(case)
        try:
            found = errors(interpreter.call(launched, p, small(split=2), source=source), p)
        except AssertionError as error:
            return [str(error)]
        limit = FUSED[torch.float32] * (2 if case.form == "norm" else 1)
        if max(found) > limit:
            return [f"{case}: {found}"]
    return []


def test_the_kernel_itself_passes(interpreter: Interpreter, tmp_path: Path) -> None:
    assert wrongs(interpreter, written(tmp_path, "itself", SOURCE.read_text())) == []


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(interpreter: Interpreter, tmp_path: Path, name: str) -> None:
    old, new = MUTANTS[name]
    text = SOURCE.read_text()
    assert text.count(old) == 1
    number = str(list(MUTANTS).index(name))
    caught = wrongs(interpreter, written(tmp_path, number, text.replace(old, new)))
    assert caught
