"""A class-incremental run before and after: what is learnt in which order, what it came to.

The run itself is `cil.py`.

Legend: S steps.

Source: MoE-Adapters, arXiv:2403.11549, for the settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from medley.errors import DataError
from trainer.bench.metrics import Cil, cil, over_seeds
from trainer.settings import Method, TrainSettings

__all__ = [
    "CIL_METHODS",
    "CilMethod",
    "CilPlan",
    "CilResult",
    "cil_settings",
    "class_steps",
    "markdown",
]

CilMethod = Literal["zero-shot", "linear-probe", "bundles"] | Method
CIL_METHODS: tuple[CilMethod, ...] = (
    "zero-shot",
    "linear-probe",
    "finetune",
    "lora",
    "moe_adapter",
    "bundles",
)
TEMPLATE = "a bad photo of a {}."  # the only one, in training and in evaluation


@dataclass(frozen=True, kw_only=True)
class CilPlan:
    """What is learnt, in which order, and how long.

    Attributes:
        steps: class names of each step.
        settings: of every step; iterations and warm-up follow from the step's images.
        epochs: over the images of a step. The paper's one is meant for 500 images a class.
        template: of all prompts.
    """

    steps: tuple[tuple[str, ...], ...]
    settings: TrainSettings
    epochs: int = 1
    template: str = TEMPLATE

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise DataError(f"epochs is {self.epochs}; it must be at least 1", code="settings")


@dataclass(frozen=True, kw_only=True)
class CilResult:
    """What one method came to with one seed.

    Attributes:
        accuracy_S: after each step, over all classes seen until then.
        stored_parameters: that the method keeps beside the backbone.
        seconds: of learning and evaluating, resumed or not.
    """

    data: str
    method: CilMethod
    backbone: str
    seed: int
    steps: tuple[tuple[str, ...], ...]
    accuracy_S: tuple[float, ...]
    stored_parameters: int
    seconds: float
    settings: dict[str, Any]

    @property
    def metrics(self) -> Cil:
        """Avg and Last."""
        return cil(self.accuracy_S)

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON, Avg and Last included."""
        return {**asdict(self), **asdict(self.metrics)}


def cil_settings(method: CilMethod, settings: TrainSettings) -> TrainSettings:
    """Turn settings of a task into those of MoE-Adapters' CIL runs.

    Two experts, both always chosen, so that the router only weighs them; no label smoothing. One
    router serves all steps, nothing is frozen, and nothing chooses among steps. With the preset
    "paper" the rest is the paper's too. Bundles keep their own settings: experts to choose from,
    and images held out for DDAS.

    Args:
        method: of `CIL_METHODS`.
        settings: the learning rate is that of moe_adapter; other learners get the one that suits
            them.
    """
    if method == "bundles":
        return settings
    if method in ("finetune", "lora"):
        settings = settings.for_method(method)
    return replace(
        settings, num_experts=2, top_k=2, batch_size=128, label_smoothing=0.0, balance=0.0
    )


def class_steps(
    class_names: Sequence[str], count: int, *, base: int = 0, seed: int | None = None
) -> tuple[tuple[str, ...], ...]:
    """Cut a list of classes into steps of equal size.

    Args:
        class_names: in the fixed order of a published protocol, or in any.
        count: how many steps, after the base.
        base: so many classes come first, in a step of their own; 0: no such step.
        seed: shuffles the classes; None: their order is kept.

    Raises:
        DataError: the classes cannot be cut so.
    """
    names = list(class_names)
    if seed is not None:
        names = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    rest = len(names) - base
    if base < 0 or count < 1 or rest < count or rest % count:
        raise DataError(
            f"{len(names)} classes, {base} of them first, cannot be cut into {count} equal steps",
            code="settings",
        )
    size = rest // count
    cut = [tuple(names[start : start + size]) for start in range(base, len(names), size)]
    return (*([tuple(names[:base])] if base else []), *cut)


def markdown(results: Sequence[CilResult]) -> str:
    """Tables for people, in per cent: Avg and Last by method, mean and spread over seeds.

    Args:
        results: of one data set and one number of steps; seeds of a method are put together.
    """
    methods = list(dict.fromkeys(result.method for result in results))
    of = {m: [r for r in results if r.method == m] for m in methods}
    steps = range(len(results[0].accuracy_S))
    head = ["", "Avg", "Last", *(f"step {step + 1}" for step in steps)]
    lines = [
        [
            method,
            _percent([r.metrics.average for r in of[method]]),
            _percent([r.metrics.last for r in of[method]]),
            *(_percent([r.accuracy_S[step] for r in of[method]]) for step in steps),
        ]
        for method in methods
    ]
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _percent(shares: Sequence[float]) -> str:
    found = over_seeds(shares)
    spread = "" if found.spread is None else f" +- {100 * found.spread:.1f}"
    return f"{100 * found.mean:.1f}{spread}"
