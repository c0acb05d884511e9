"""Markdown tables of reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["NOTHING", "table"]

NOTHING = "-"  # in a cell: there is nothing to tell


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar within a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_escaped, row)) + " |" for row in lines)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
