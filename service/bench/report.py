"""Report and pictures of a folder of lines; the same lines give the same report again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from medley.files import write_whole
from medley.journal import Measurement, read_lines
from medley.markdown import NOTHING, table

__all__ = ["REPORT", "write_report"]

REPORT = "report.md"


def write_report(folder: Path) -> None:
    """Read the lines of a folder, write `report.md` and its pictures.

    Raises:
        DataError: see `read_lines`.
    """
    lines = read_lines(folder)
    rows = [
        (line.bench, *map(str, line.conditions.values()), line.column,
         *(f"{k}={v:.4g}" for k, v in line.values.items()), f"{np.median(line.times_s):.4f}" if line.times_s else "")
        for line in lines
    ]
    write_whole(folder / REPORT, ("\n".join(" | ".join(r) for r in rows)).encode())
