"""Options that several commands have, so that they are called and explained alike everywhere."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "DEFAULT_SEEDS",
    "BackboneName",
    "Cache",
    "Computes",
    "Device",
    "PrecisionName",
    "Preset",
    "Redundancy",
    "RedundancyName",
    "RedundancyWeight",
    "Seeds",
    "Weights",
]

DEFAULT_SEEDS = (0, 1, 2)


class Preset(StrEnum):
    """Whole sets of settings; paper: MoE-Adapters."""

    SMALL = "small"
    PAPER = "paper"


class RedundancyName(StrEnum):
    """How it is measured that groups of ranks do the same."""

    OFF = "off"
    FEATURE_CORRELATION = "feature_correlation"
    DISTRIBUTION_DIVERGENCE = "distribution_divergence"
    OUTPUT_COSINE = "output_cosine"
    WEIGHT = "weight"


class PrecisionName(StrEnum):
    """How the image tower computes: bit-equal to open_clip, or a fast form near it."""

    EXACT = "exact"
    FP32 = "fp32"
    BF16 = "bf16"


BackboneName = Annotated[
    str, typer.Option(help="medley-mini, or an open_clip name such as ViT-B-16/openai.")
]
Weights = Annotated[Path | None, typer.Option(help="Local weights of the backbone.")]
Device = Annotated[str, typer.Option(help="Torch device.")]
Computes = Annotated[PrecisionName, typer.Option(help="How the image tower computes.")]
Cache = Annotated[Path, typer.Option(help="Where data and features are kept.")]
Seeds = Annotated[
    list[int] | None, typer.Option(min=0, help="Repeat for more; 0, 1 and 2 unless given.")
]
Redundancy = Annotated[
    RedundancyName | None,
    typer.Option(help="Keep groups of ranks from doing the same (docs/redundancy.md)."),
]
RedundancyWeight = Annotated[float | None, typer.Option(help="Weight of the redundancy loss.")]
