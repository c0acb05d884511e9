"""What is known of a data set before it is opened: its card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trainer.datasets import Split

__all__ = ["Card"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """One data set.

    Attributes:
        task: its name in the suite.
        classes: how many there are.
        images: how many there must be in each part.
        licence: SPDX expression, or the terms in a few words.
        source: what it is made of or who gives it out, by name.
        split: how training is parted from test.
    """

    task: str
    classes: int
    images: Mapping[Split, int]
    licence: str
    source: str
    split: str
