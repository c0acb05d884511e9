"""`medley bench ablation`. Heavy imports wait until it runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from trainer.options import DEFAULT_SEEDS, BackboneName, Cache, Device, Seeds, Weights
from trainer.progress import bars
from trainer.sources import DEFAULT_CACHE

__all__ = ["ablation_command"]

out, err = Console(), Console(stderr=True)


class AblationName(StrEnum):
    """What is asked."""

    FIRST_EXPERT_BLOCK = "first_expert_block"
    DDAS = "ddas"
    EXPERTS = "experts"
    FREEZE = "freeze"
    TEXT_EXPERTS = "text_experts"
    RELU = "relu"
    ALPHA = "alpha"
    REDUNDANCY = "redundancy"
    REDUNDANCY_LORA = "redundancy_lora"


def ablation_command(
    name: Annotated[AblationName, typer.Argument(help="What is asked.")],
    folder: Annotated[
        Path, typer.Option("--out", help="Folder of ablations; an interrupted one goes on.")
    ],
    seed: Seeds = None,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps of a task; default: a short run.")
    ] = None,
    backbone: BackboneName = "medley-mini",
    weights: Weights = None,
    device: Device = "cpu",
    cache: Cache = DEFAULT_CACHE,
) -> None:
    """Compare some arms on the small suite: one question, a table with seeds, a picture."""
    from medley.backbone import load_backbone
    from trainer.bench.ablation_run import run_ablation
    from trainer.bench.ablations import ablation
    from trainer.suites import open_suite

    which = ablation(name.value)
    if iterations is not None:
        which = replace(which, iterations=iterations)
    with bars(err) as show:
        report = run_ablation(
            which,
            open_suite("small", cache=cache),
            load_backbone(backbone, weights=weights, device=device),
            folder,
            seeds=seed or DEFAULT_SEEDS,
            cache=cache,
            command=" ".join(["medley", *sys.argv[1:]]),
            bars=show,
        )
    out.print(Markdown(report))
