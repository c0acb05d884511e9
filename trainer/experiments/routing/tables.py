"""The tables of the experiment: which settings are tried, and what is said beside them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track

from medley.backbone import Backbone
from medley.routed import ZERO_SHOT, RoutedModel
from trainer.ddas import DEFAULT_FEATURES
from trainer.experiments.routing.bench import Bench, Histogram, Row
from trainer.experiments.routing.features import BATCH, all_taps, feature_sets, shared_class_names
from trainer.experiments.routing.rules import RULES

__all__ = ["About", "Experiment", "run", "tabulate"]

ALPHAS = (0.01, 0.02, 0.05, 0.1)
CODE_SIZES = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class About:
    """What the numbers are about.

    Attributes:
        fingerprint: of the backbone.
        blocks: of its image tower.
        shared_class_names: pairs of tasks that have a class name in common.
        milliseconds: of one image, for parts of the image tower, one thread.
    """

    fingerprint: str
    blocks: int
    shared_class_names: list[tuple[str, str]]
    milliseconds: dict[str, float]


@dataclass(frozen=True)
class Experiment:
    """Everything that the page shows.

    Attributes:
        images: fitted, calibrated on, tested on, for each task.
        shipped: the defaults of `trainer/ddas.py` through the code that is shipped.
    """

    about: About
    images: dict[str, tuple[int, int, int]]
    features: list[Row]
    code_sizes: list[Row]
    rules: list[Row]
    alphas: list[Row]
    shipped: Row
    histograms: dict[str, Histogram]


def run(backbone: Backbone, cache_folder: Path) -> Experiment:
    """Extract, fit and measure everything."""
    blocks = len(backbone.image.blocks)
    model = RoutedModel(backbone, first_expert_block=blocks * 3 // 4)  # as `medley train` has it
    shared = shared_class_names(cache_folder)
    about = About(backbone.fingerprint, blocks, shared, _milliseconds(model))
    return tabulate(Bench(*all_taps(model, cache_folder)), about)


def tabulate(bench: Bench, about: About) -> Experiment:
    """Fit and measure every setting."""
    singles, several = feature_sets(about.blocks)
    pair = several[0]
    return Experiment(
        about=about,
        images={task: x.counts for task, x in bench.taps.items()},
        features=[bench.row(f) for f in track([*singles, *several], "features")],
        code_sizes=[
            bench.row(f, code_size=c)
            for f in track(dict.fromkeys([DEFAULT_FEATURES, pair]), "code sizes")
            for c in CODE_SIZES
        ],
        rules=[
            bench.row(f, rule=rule)
            for f in dict.fromkeys([DEFAULT_FEATURES, pair, ("stem:mean_std",)])
            for rule in RULES
        ],
        alphas=[bench.row(DEFAULT_FEATURES, alpha=alpha) for alpha in ALPHAS],
        shipped=bench.shipped(),
        histograms={task: bench.histogram(task) for task in ("letters", "clipart")},
    )


def _milliseconds(model: RoutedModel) -> dict[str, float]:
    """One image's time in a batch of 32: the shared blocks, the whole tower, the other blocks."""
    height, width = model.backbone.image_size
    images_BCHW = torch.rand(BATCH, 3, height, width)
    paths_B = torch.full((BATCH,), ZERO_SHOT)
    with torch.inference_mode():
        frozen = model.frozen(images_BCHW)
        return {
            "to first_expert_block": _best_ms(lambda: model.frozen(images_BCHW)),
            "to the end": _best_ms(lambda: model.frozen(images_BCHW, features=True)),
            "the blocks after it alone": _best_ms(lambda: model.finish(frozen, paths_B)),
        }


def _best_ms(call: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return round(1000 * min(times) / BATCH, 2)
