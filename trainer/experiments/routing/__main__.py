"""Run the experiment and write its pages: ``python -m trainer.experiments.routing``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from medley.backbone import MINI, Backbone, load_backbone
from medley.errors import DataError
from medley.routed import RoutedModel
from trainer.experiments.routing.features import all_taps, class_names
from trainer.experiments.routing.report import write_report
from trainer.experiments.routing.selectors import compare
from trainer.experiments.routing.selectors_report import write_selectors_report
from trainer.experiments.routing.tables import run
from trainer.reference import load_reference
from trainer.sources import DEFAULT_CACHE

PAGES = ("features", "selectors")


def main() -> None:
    """Half an hour on one core for the features, six minutes for the selectors."""
    parser = argparse.ArgumentParser(prog="python -m trainer.experiments.routing")
    parser.add_argument("--only", choices=PAGES, help="one of the pages")
    parser.add_argument("--backbone", default=MINI, help="as `load_backbone` takes it")
    parser.add_argument("--weights", type=Path, help="a file, instead of the backbone's own")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    backbone = load_backbone(arguments.backbone, weights=arguments.weights)
    for page in [arguments.only] if arguments.only else PAGES:
        write = _features if page == "features" else _selectors
        for file in write(backbone, arguments.cache, arguments.out):
            Console().print(f"wrote {file}")


def _features(backbone: Backbone, cache: Path, out: Path) -> list[Path]:
    return write_report(run(backbone, cache), out)


def _selectors(backbone: Backbone, cache: Path, out: Path) -> list[Path]:
    reference = load_reference(backbone, cache)
    if reference is None:
        raise DataError("this backbone has no reference: see python -m trainer.reference")
    taps, canary = all_taps(RoutedModel(backbone, first_expert_block=1), cache)
    comparison = compare(taps, canary, reference, class_names(cache))
    return write_selectors_report(comparison, backbone.fingerprint, out)


if __name__ == "__main__":
    main()
