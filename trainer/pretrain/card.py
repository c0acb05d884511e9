"""The numbers in the model card: the table between its marks, rewritten by each examination."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medley.errors import DataError
from trainer.pretrain.examination import Result

BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"


def write_numbers(card: Path, results: Sequence[Result]) -> None:
    """Replace what stands between the marks of ``card``.

    Raises:
        DataError: the card does not have them.
    """
    text = card.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(f"{card} has no place for numbers ({BEGIN} ... {END})")
    card.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}", encoding="utf-8")


def table(results: Sequence[Result]) -> str:
    """Markdown, one line a test: shipped and teacher's text side by side."""
    by_test: dict[str, dict[str, Result]] = {}
    for result in results:
        by_test.setdefault(result.test, {})[result.text] = result
    lines = [
        "| test | images | names | chance, top-1 | shipped text, top-1 / top-5 | teacher's text |",
        "|---|---|---|---|---|---|",
    ]
    for test, row in by_test.items():
        shipped, teacher = row["shipped"], row["teacher"]
        chance = 100 / shipped.classes
        lines.append(
            f"| {test} | {shipped.images} | {shipped.classes} | {chance:.2g} "
            f"| **{shipped.top1}** / {shipped.top5} | {teacher.top1} / {teacher.top5} |"
        )
    return "\n".join(lines)
