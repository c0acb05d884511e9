"""One training loop for every stage: learning rate, checkpoints, exact resume.

A learner draws whatever chance it needs from the step's number, so its state and the step are the
whole state of a run: one that is interrupted ends with the same numbers as one that is not.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from medley.errors import DataError
from trainer.pretrain.files import load_state, save_state
from trainer.pretrain.progress import Task


class Learner(Protocol):
    """What learns: one step at a time, and can be put away."""

    def step(self, index: int, learning_rate: float) -> dict[str, float]:
        """Learn from the batch of this step; returns what is worth showing."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that `step` changes."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to that."""


class Schedule:
    """Warm up, stay, and decay linearly to zero from ``decay_from`` to ``steps``.

    The long constant middle makes a checkpoint independent of how long the run was meant to be.
    """

    def __init__(self, peak: float, *, warmup: int, decay_from: int, steps: int) -> None:
        self._peak = peak
        self._warmup = warmup
        self._decay_from = decay_from
        self._steps = steps

    def __call__(self, step: int) -> float:
        """Learning rate of a step."""
        rise = min(1.0, (step + 1) / max(self._warmup, 1))
        fall = (self._steps - step) / max(self._steps - self._decay_from, 1)
        return self._peak * rise * min(1.0, fall)


def learn(
    learner: Learner,
    schedule: Schedule,
    checkpoint: Path,
    task: Task,
    *,
    steps: range,
    batch: int,
    every_s: float,
) -> None:
    """Run the steps that are left and leave the final state in ``checkpoint``.

    Args:
        learner: its state is replaced by the checkpoint's, if there is one.
        schedule: learning rate by step.
        checkpoint: file with the learner's state and the number of the next step.
        task: shows samples.
        steps: of this stage, first to last.
        batch: samples a step.
        every_s: seconds between checkpoints.
    """
    start = steps.start
    if checkpoint.exists():
        saved = load_state(checkpoint)
        learner.load_state_dict(saved["learner"])
        start = saved["next_step"]
    task.skip((start - steps.start) * batch)
    last_s = time.monotonic()
    shown: dict[str, float] = {}
    for index in range(start, steps.stop):
        shown = _smooth(shown, learner.step(index, schedule(index)))
        note = " ".join(f"{name} {value:.4g}" for name, value in shown.items())
        task.advance(batch, note=note)
        if time.monotonic() - last_s > every_s:
            _save(learner, index + 1, checkpoint)
            last_s = time.monotonic()
    if start < steps.stop:
        _save(learner, steps.stop, checkpoint)


def finished(checkpoint: Path, steps: range) -> bool:
    """Does the checkpoint hold the state after the last step?

    Raises:
        DataError: it is already past it.
    """
    if not checkpoint.exists():
        return False
    next_step = load_state(checkpoint)["next_step"]
    if next_step > steps.stop:
        raise DataError(
            f"{checkpoint} has made {next_step} steps, the recipe wants {steps.stop}; remove it"
        )
    return bool(next_step == steps.stop)


def adamw(named: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    parameters = [parameter for _, parameter in named if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def update(optimizer: torch.optim.Optimizer, loss: Tensor, learning_rate: float) -> None:
    """One clipped step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


def _smooth(shown: dict[str, float], new: dict[str, float]) -> dict[str, float]:
    return {name: 0.99 * shown.get(name, value) + 0.01 * value for name, value in new.items()}


def _save(learner: Learner, next_step: int, checkpoint: Path) -> None:
    save_state(checkpoint, {"learner": learner.state_dict(), "next_step": next_step})
