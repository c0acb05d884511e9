from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medley.backbone import Backbone
from medley.bundle import Bundle
from medley.errors import DataError
from tests.models import tiny_backbone
from tests.trainer.test_training import LABEL, SETTINGS, Watch
from tests.trainer.tiny import pictures
from trainer.evaluation import Case, Evaluation, evaluate, served
from trainer.run import learn

TASKS = {"warm": ["red", "yellow"], "cold": ["green", "blue"]}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


@pytest.fixture(scope="module")
def bundles(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    folder: Path = tmp_path_factory.mktemp("bundles")
    settings = replace(SETTINGS, ddas_iterations=200, hold_out=0.4)
    return [
        learn(
            backbone,
            pictures(classes, 30, seed=1),
            settings,
            label=replace(LABEL, task=task),
            folder=folder,
            watcher=Watch(),
        ).bundle
        for task, classes in TASKS.items()
    ]


def cases(*, unknown: bool = False) -> list[Case]:
    known = [
        Case(
            name=task,
            task=task,
            test=pictures(classes, 10, seed=2),
            train=pictures(classes, 20, seed=3),
        )
        for task, classes in TASKS.items()
    ]
    other = Case(name="grey", test=pictures(["white", "black"], 10, seed=4))
    return [*known, other] if unknown else known


def measured(backbone: Backbone, bundles: list[Bundle], which: list[Case]) -> Evaluation:
    classifier, paths = served(bundles, backbone)
    alphas = {b.manifest.task: b.manifest.selector.alpha for b in bundles}
    return evaluate(classifier, paths, which, alphas=alphas)


def test_learnt_tasks_are_recognised_and_answered(
    backbone: Backbone, bundles: list[Bundle]
) -> None:
    result = measured(backbone, bundles, cases())
    for score in result.scores:
        assert score.told is not None
        assert score.told > 0.9 > score.zero_shot
        assert score.agnostic >= score.told - (1 - score.routing)
        assert score.linear_probe == 1
        assert score.alpha == SETTINGS.alpha
        assert score.routing > 0.5


def test_every_image_is_routed_once_and_refusals_are_counted(
    backbone: Backbone, bundles: list[Bundle]
) -> None:
    result = measured(backbone, bundles, cases(unknown=True))
    assert result.columns == ("warm", "cold", "zero-shot")
    assert result.confusion.sum(axis=1).tolist() == [20, 20, 20]
    for row, score in enumerate(result.scores):
        right = row if score.told is not None else len(result.columns) - 1
        assert score.routing == result.confusion[row, right] / 20
    refused = result.scores[0].false_reject
    assert refused is not None
    # Who is refused by its own task cannot have been routed to it.
    assert refused <= 1 - result.scores[0].routing + 1e-9


def test_a_data_set_that_nobody_learnt_has_no_told_score(
    backbone: Backbone, bundles: list[Bundle]
) -> None:
    score = measured(backbone, bundles, cases(unknown=True)).scores[-1]
    assert (score.told, score.false_reject, score.alpha, score.linear_probe) == (None,) * 4


def test_an_order_of_the_stream_changes_no_score(backbone: Backbone, bundles: list[Bundle]) -> None:
    classifier, paths = served(bundles, backbone)
    alphas = dict.fromkeys(paths, 0.2)
    one, other = (evaluate(classifier, paths, cases(), alphas=alphas, seed=seed) for seed in (0, 1))
    assert np.array_equal(one.confusion, other.confusion)
    for a, b in zip(one.scores, other.scores, strict=True):
        assert (a.told, a.agnostic, a.zero_shot, a.false_reject) == (
            b.told,
            b.agnostic,
            b.zero_shot,
            b.false_reject,
        )


def test_two_bundles_of_one_task_are_refused(backbone: Backbone, bundles: list[Bundle]) -> None:
    with pytest.raises(DataError, match="two bundles of one task"):
        served([bundles[0], bundles[0]], backbone)
