"""The numbers in Markdown tables: mean +- spread over the seeds."""

from __future__ import annotations

from collections.abc import Iterable

from medley.markdown import NOTHING
from trainer.bench.metrics import OverSeeds

__all__ = ["cell", "cells"]


def cell(result: OverSeeds | None, seeds: int, *, scale: float = 100, form: str = ".1f") -> str:
    """``85.1 +- 0.3``; without spread where there is one seed, or all agree exactly.

    Args:
        result: None where there is nothing to tell.
        seeds: of the report; where this number comes from fewer, the cell says so.
        scale: of the value; shares become per cent.
        form: format of both numbers.
    """
    if result is None:
        return NOTHING
    size = form.removeprefix("+")  # a spread has no sign
    spread = f" +- {scale * result.spread:{size}}" if result.spread else ""
    fewer = "" if result.seeds == seeds else f" ({result.seeds} of {seeds} seeds)"
    return f"{scale * result.mean:{form}}{spread}{fewer}"


def cells(results: Iterable[OverSeeds | None], seeds: int) -> list[str]:
    """A row of `cell` in per cent."""
    return [cell(result, seeds) for result in results]
