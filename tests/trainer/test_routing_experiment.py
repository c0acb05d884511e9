"""The routing experiment counts what the shipped selector does, and says it on its page."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainer.experiments.routing.bench import Bench
from trainer.experiments.routing.features import TaskTaps, feature_sets
from trainer.experiments.routing.report import write_report
from trainer.experiments.routing.rules import RULES, LevelErrors, Scored, measure
from trainer.experiments.routing.selectors import (
    DEFAULT,
    POLICIES,
    Choice,
    Comparison,
    compare,
)
from trainer.experiments.routing.selectors_report import write_selectors_report
from trainer.experiments.routing.tables import About, tabulate
from trainer.reference import make_reference
from trainer.selectors import FITS
from trainer.suite import TASKS

BLOCKS = 2
WIDTH = 6


def _taps(task: int, count: int, *, seed: int) -> dict[str, Tensor]:
    """Features in which a task is a cloud of its own, wider than the distance to the next."""
    g = torch.Generator().manual_seed(100 * task + seed)
    names = [name for (name,) in feature_sets(BLOCKS)[0]]
    return {name: task / 2 + torch.randn(count, WIDTH, generator=g) for name in names}


@pytest.fixture(scope="module")
def bench() -> Bench:
    taps = {
        name: TaskTaps(_taps(task, 180, seed=0), _taps(task, 20, seed=1), torch.arange(180) % 3)
        for task, name in enumerate(TASKS)
    }
    return Bench(taps, _taps(2, 20, seed=2), seeds=(0, 1), iterations=5)


def test_the_rule_that_is_measured_is_the_one_that_is_shipped(bench: Bench) -> None:
    shipped = bench.shipped()
    measured = bench.row(shipped.features)
    assert measured.outcomes == shipped.outcomes
    assert 0 < measured.mean("accuracy") < 1
    assert 0 < measured.mean("narrow_false_accept") <= measured.mean("false_accept") < 1


def test_rules_that_only_rescale_one_level_accept_the_same_images(bench: Bench) -> None:
    rows = [bench.row(("stem:mean",), rule=rule) for rule in RULES if rule != "shared threshold"]
    plain, *others = (r for r in rows if r.rule not in ("standardised", "worst level"))
    for other in others:
        for a, b in zip(plain.outcomes, other.outcomes, strict=True):
            assert a.accepted_ST == b.accepted_ST
            assert a.false_reject == b.false_reject


def test_images_are_counted_as_they_are_decided() -> None:
    nobody = torch.full((4, len(TASKS)), 9.0)
    tests = [nobody.clone() for _ in (*TASKS, "canary")]
    tests[0][0, 0] = 0.5  # one image reaches its own task, the first
    tests[0][1, :2] = torch.tensor([0.5, 0.1])  # one is accepted by two, the second is nearer
    tests[1][:, 0] = 0.0  # all of the second task's are claimed by the first
    tests[-1][:3, 4] = 0.0
    scored = Scored([torch.ones(50)] * len(TASKS), tests)
    outcome = measure(scored, 0.02)
    assert outcome.accuracy[:2] == [0.25, 0.0]
    assert outcome.false_reject[:2] == [0.5, 1.0]
    assert outcome.false_accept[:2] == [0.25, 1.0]
    assert outcome.narrow_false_accept[:2] == [0.25, 0.0]
    assert outcome.canary == [0.75]
    assert outcome.accepted_ST[1][0] == 1.0
    assert outcome.auroc[2] == pytest.approx(1 - (32 - 6) / 32 / 2)


def test_levels_are_combined_as_the_rules_say() -> None:
    def level(error: float, log_variance: float) -> LevelErrors:
        scores = torch.full((30,), math.log(error) + log_variance)
        table = scores[:2, None].expand(2, len(TASKS))
        return LevelErrors([scores] * len(TASKS), [table], [log_variance] * len(TASKS))

    levels = [level(2.0, 1.0), level(3.0, -0.5)]
    expected = {
        "feature units": math.log(6) + 0.5,
        "plain errors": math.log(6),
        "summed errors": math.log(2 * math.e + 3 * math.exp(-0.5)),
    }
    for rule, score in expected.items():
        assert float(RULES[rule](levels).test_SBT[0][0, 0]) == pytest.approx(score)
    assert len(RULES["shared threshold"](levels).calibration_TN[0]) == 30 * len(TASKS)


@pytest.fixture(scope="module")
def comparison(bench: Bench) -> Comparison:
    reference = make_reference("sha256:abc", _taps(4, 200, seed=3))
    names = {task: frozenset({f"a {task}", "thing"}) for task in TASKS}
    canary = _taps(2, 20, seed=2)
    return compare(bench.taps, canary, reference, names, seeds=(0, 1), iterations=5)


def test_selectors_are_compared_through_the_shipped_code(
    bench: Bench, comparison: Comparison
) -> None:
    rows = {row.name: row for row in comparison.selectors}
    assert rows["ddas"].outcomes == bench.shipped().outcomes
    assert set(rows) == {*FITS, "paper-1", "paper-1, reference"}


def test_a_label_list_leaves_only_tasks_that_have_it(comparison: Comparison) -> None:
    rows = {row.name: row for row in comparison.labels}
    none, all_labels, same = (rows[f"ddas: {policy}"] for policy in POLICIES)
    assert none.absent > 0
    assert all_labels.absent == same.absent == same.wrong == 0
    assert 0 < all_labels.wrong <= none.wrong
    assert same.strange == 1
    assert all_labels.strange < none.strange


def test_choices_are_made_on_images_that_are_not_tested(comparison: Comparison) -> None:
    chosen = comparison.choices[2]
    (tested,) = (row for row in comparison.selectors if row.name == DEFAULT)
    assert chosen.name == Choice().name
    assert chosen.outcomes != tested.outcomes


def test_the_page_of_selectors_says_what_was_measured(
    comparison: Comparison, tmp_path: Path
) -> None:
    page, numbers, picture = write_selectors_report(comparison, "sha256:abc", tmp_path)
    text = page.read_text()
    for row in (*comparison.selectors, *comparison.choices, *comparison.few):
        assert f"| {row.name} | {100 * row.mean('accuracy'):.1f} (" in text
    assert f"({picture.name})" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(numbers.read_text())["selectors"]) == len(comparison.selectors)


def test_the_page_says_what_was_measured(bench: Bench, tmp_path: Path) -> None:
    about = About("sha256:abc", BLOCKS, [("flags", "chess")], {"to the end": 7.25})
    experiment = tabulate(bench, about)
    page, numbers, picture = write_report(experiment, tmp_path)
    text = page.read_text()
    assert f"{100 * experiment.shipped.mean('accuracy'):.1f}" in text
    assert "7.25 ms" in text
    assert "flags and chess" in text
    assert f"({picture.name})" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    saved = json.loads(numbers.read_text())
    assert len(saved["features"]) == len(experiment.features)
    assert saved["shipped"]["outcomes"][0]["accuracy"] == pytest.approx(
        experiment.shipped.outcomes[0].accuracy, abs=1e-4
    )
