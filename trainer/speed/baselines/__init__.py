"""What the product's expert mixing is compared with; each computes the same y, tests say so.

A baseline prepares itself for a `Block` outside of the clock (layouts of weights, groups of rows:
generous to those that need them) and returns a function from x (B, L, D) to y (B, L, D). All of
them route in float32, so that they choose the same experts.
"""

from trainer.speed.baselines.columns import Baseline, Column, baselines
from trainer.speed.baselines.oracle import oracle

__all__ = ["Baseline", "Column", "baselines", "oracle"]
