"""The figures of the precisions count what changed, and the command knows every precision."""

from dataclasses import replace

import torch

from medley.precision import PRECISIONS
from trainer.experiments.precision import Answers, _figures
from trainer.options import PrecisionName

EXACT = Answers(
    paths_N=torch.tensor([0, -1, 1]),
    scores_NT=torch.tensor([[0.5], [1.0], [2.0]]),
    guesses={name: torch.tensor([0, 1, 1]) for name in ("zero-shot", "told", "selector")},
    logits={name: torch.tensor([1.0, 2.0, 3.0]) for name in ("zero-shot", "told", "selector")},
    self_test_logits=torch.zeros(4),
    self_test_scores=torch.zeros(2),
)


def test_the_command_knows_every_precision() -> None:
    assert tuple(name.value for name in PrecisionName) == PRECISIONS


def test_what_changed_is_counted_against_exact() -> None:
    ours = replace(
        EXACT,
        paths_N=torch.tensor([0, 1, 1]),
        guesses=EXACT.guesses | {"told": torch.tensor([0, 0, 1])},
        logits=EXACT.logits | {"told": torch.tensor([1.0, 2.0, 3.25])},
    )
    figures = _figures(ours, EXACT, labels_N=torch.tensor([0, 1, 0]))
    assert figures["other path"] == "1"
    assert (figures["told: other answer"], figures["zero-shot: other answer"]) == ("1", "0")
    assert (figures["told: right"], figures["zero-shot: right"]) == ("33.33%", "66.67%")
    assert figures["told: logits"] == "0 0.25 0.25"
    assert _figures(EXACT, EXACT, torch.tensor([0, 1, 0]))["scores"] == "0 0 0"
