"""What one fixed batch size costs: images per second through the classifier, by bucket and trunk.

    python -m trainer.experiments.batch_size

Zero-shot on the embedded base; experts cost the same pass and a few percent. Run two at once, with
OMP_WAIT_POLICY=ACTIVE and PASSIVE, to see what spinning threads do to a neighbour (ADR 11).
"""

from __future__ import annotations

import statistics
import time

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from medley.backbone import load_backbone
from medley.classifier import Ask, Classifier
from medley.routed import ZERO_SHOT, RoutedModel

IMAGES, REPEATS = 64, 5
BUCKETS = (1, 2, 4, 8, 16)


def main() -> None:
    """Measure and print."""
    backbone = load_backbone()
    shape = (IMAGES, 3, *backbone.image_size)
    pixels_BCHW = torch.randint(256, shape, dtype=torch.uint8)
    table = Table("bucket", "images/s, median", "slowest", "fastest", "ms for one image")
    for bucket in track(BUCKETS, description="batch sizes"):
        classifier = Classifier(RoutedModel(backbone), buckets=(bucket,))
        rates = sorted(_images_per_s(classifier, pixels_BCHW) for _ in range(REPEATS))
        median = statistics.median(rates)
        figures = (median, rates[0], rates[-1], 1000 * bucket / median)
        table.add_row(str(bucket), *(f"{figure:.1f}" for figure in figures))
    Console().print(f"{backbone.name}, {torch.get_num_threads()} threads", table)


def _images_per_s(classifier: Classifier, pixels_BCHW: torch.Tensor) -> float:
    started_s = time.perf_counter()
    classifier.route(pixels_BCHW, [Ask(ZERO_SHOT)] * len(pixels_BCHW))
    return len(pixels_BCHW) / (time.perf_counter() - started_s)


if __name__ == "__main__":
    main()
