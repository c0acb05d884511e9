"""Run the experiment and write its page: ``python -m trainer.experiments.routing``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from medley.backbone import MINI, load_backbone
from trainer.experiments.routing.report import write_report
from trainer.experiments.routing.tables import run
from trainer.sources import DEFAULT_CACHE


def main() -> None:
    """Half an hour on one core."""
    parser = argparse.ArgumentParser(prog="python -m trainer.experiments.routing")
    parser.add_argument("--backbone", default=MINI, help="as `load_backbone` takes it")
    parser.add_argument("--weights", type=Path, help="a file, instead of the backbone's own")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    experiment = run(load_backbone(arguments.backbone, weights=arguments.weights), arguments.cache)
    for file in write_report(experiment, arguments.out):
        Console().print(f"wrote {file}")


if __name__ == "__main__":
    main()
