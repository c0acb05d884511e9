"""Selectors to compare with those of the bundles, fitted on the same images of the same course."""

from __future__ import annotations

from medley.selector import TaskSelector
from trainer.bench.course import Course

__all__ = ["rivals"]


def rivals(course: Course) -> dict[str, dict[str, TaskSelector]]:
    """Fit every selector that is compared, by name, by task."""
    return {}
