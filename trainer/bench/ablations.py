"""The ablations that decide the defaults: which arms are compared, on what, and why.

A table, and nothing that computes: `trials.py` runs one arm, `ablation_run.py` all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from medley.backbone import Backbone
from medley.errors import DataError
from trainer.ddas import DEFAULT_CODE_SIZE, DEFAULT_FEATURES
from trainer.redundancy import MEASURES
from trainer.settings import METHOD_DEFAULTS, TrainSettings

__all__ = ["ABLATIONS", "Ablation", "Arms", "ablation"]

Arms = Mapping[str, Mapping[str, Any]]  # by label: what differs from the defaults

LEARNT = ("clipart", "chess", "letters")  # few classes, so that a step is short
ROUTED = (*LEARNT, "animals", "fashion", "flags", "digits", "counting", "textile")


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """One question, and the arms that answer it.

    Attributes:
        kind: ``learning`` trains experts and measures told accuracy, each task by itself; its arms
            are overrides of `TrainSettings`, over `base`. ``routing`` fits the selectors of all
            tasks and measures where the images go; its arms are arguments of `fit_selector`.
        arms: for a backbone, whose depth they may ask.
        base: what of the settings all arms share, where it is not the default.
        against: an arm that all others are compared with, seed by seed and task by task.
        iterations: of learning, unless an arm says otherwise; a sixth of the default.
    """

    name: str
    question: str
    kind: Literal["learning", "routing"]
    tasks: tuple[str, ...]
    arms: Callable[[Backbone], Arms]
    base: Mapping[str, Any] = field(default_factory=dict)
    against: str | None = None
    iterations: int = 100

    def settings(self, arm: Mapping[str, Any], seed: int) -> TrainSettings:
        """What an arm learns with; a routing arm learns nothing, and only the seed matters."""
        if self.kind == "routing":
            return TrainSettings(seed=seed)
        return TrainSettings(**{"iterations": self.iterations, **self.base, **arm, "seed": seed})


def ablation(name: str) -> Ablation:
    """Find an ablation.

    Raises:
        DataError: there is none of that name.
    """
    if name not in ABLATIONS:
        raise DataError(f"there is no ablation {name!r}; there are {', '.join(ABLATIONS)}")
    return ABLATIONS[name]


def _first_expert_blocks(backbone: Backbone) -> Arms:
    return {
        f"block {block}": {"first_expert_block": block}
        for block in range(len(backbone.image.blocks))
    }


def _ddas(backbone: Backbone) -> Arms:
    """Every depth at the default code, every code at the default depth, and two depths at once."""
    blocks = [f"block{n}:mean" for n in range(1, len(backbone.image.blocks) + 1)]
    depths = [(name,) for name in ("stem:mean", *blocks, "embedding")]
    looks = [*depths, DEFAULT_FEATURES, ("block1:mean", "embedding")]
    sizes = [(look, DEFAULT_CODE_SIZE) for look in looks]
    sizes += [(DEFAULT_FEATURES, code) for code in (8, 16, 64, 128)]
    return {
        f"{' and '.join(look)}, code {code}": {"features": [*look], "code_size": code}
        for look, code in sizes
    }


def _experts(_: Backbone) -> Arms:
    sizes = ((1, 1, 32), (1, 1, 64), (2, 2, 32), (4, 1, 32), (4, 2, 16), (4, 2, 32), (4, 2, 64))
    return {
        f"{experts} experts, top {top_k}, rank {rank}": {
            "num_experts": experts,
            "top_k": top_k,
            "bottleneck": rank,
        }
        for experts, top_k, rank in (*sizes, (8, 2, 32))
    }


def _freeze(_: Backbone) -> Arms:
    mass: dict[str, dict[str, Any]] = {
        f"mass {share:g}": {"freeze_mass": share} for share in (0.9, 0.95, 0.99, 1.0)
    }
    counts = {f"count {count}": {"freeze": "count", "freeze_count": count} for count in (1, 2, 3)}
    return mass | counts


def _text_experts(backbone: Backbone) -> Arms:
    off = len(backbone.text.blocks) if backbone.text else 0
    return {"text experts": {}, "image experts only": {"first_text_block": off}}


def _relu(_: Backbone) -> Arms:
    return {"ReLU": {}, "linear": {"relu": False}}


def _alphas(_: Backbone) -> Arms:
    return {f"alpha {alpha:g}": {"alpha": alpha} for alpha in (0.005, 0.01, 0.02, 0.05, 0.1)}


def _redundancy(_: Backbone) -> Arms:
    weighted = {
        f"{measure} {weight:g}": {"redundancy": measure, "redundancy_weight": weight}
        for measure in MEASURES
        for weight in (1e-3, 1e-2, 1e-1)
    }
    return {"off": {"redundancy": "off"}, **weighted}


ABLATIONS = {
    one.name: one
    for one in (
        Ablation(
            name="first_expert_block",
            question="From which image block on do experts pay?",
            kind="learning",
            tasks=LEARNT,
            arms=_first_expert_blocks,
            iterations=50,  # a step from block 0 takes three times that from the last
        ),
        Ablation(
            name="ddas",
            question="How deep should DDAS look, and how narrow should its code be?",
            kind="routing",
            tasks=ROUTED,
            arms=_ddas,
        ),
        Ablation(
            name="experts",
            question="How many experts, how many for an image, and how wide?",
            kind="learning",
            tasks=LEARNT,
            arms=_experts,
        ),
        Ablation(
            name="freeze",
            question="Which experts must be kept: those that cover the gates, or the most counted?",
            kind="learning",
            tasks=LEARNT,
            arms=_freeze,
        ),
        Ablation(
            name="text_experts",
            question="Are experts in the text tower worth it?",
            kind="learning",
            tasks=LEARNT,
            arms=_text_experts,
        ),
        Ablation(
            name="relu",
            question="Does an expert need its ReLU?",
            kind="learning",
            tasks=LEARNT,
            arms=_relu,
        ),
        Ablation(
            name="alpha",
            question="What does a smaller share of refused images cost in false accepts?",
            kind="routing",
            tasks=ROUTED,
            arms=_alphas,
        ),
        Ablation(
            name="redundancy",
            question="Does it pay to keep groups of ranks from doing the same?",
            kind="learning",
            tasks=LEARNT,
            arms=_redundancy,
            against="off",
        ),
        Ablation(
            name="redundancy_lora",
            question="Does it pay to keep groups of ranks of LoRA from doing the same?",
            kind="learning",
            tasks=LEARNT,
            arms=_redundancy,
            base={"method": "lora", **METHOD_DEFAULTS["lora"]},
            against="off",
        ),
    )
}
