"""Task `chess`: which piece, of which colour? The piece sets of the test are not those of training.

The sets are under the GPL: they are drawn on the machine that wants them and never shipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from trainer.datasets import ImageSet, PixelPicture
from trainer.suite.drawing import SIDE, jitter, render_svg

__all__ = ["CLASSES", "TEST_SETS", "TRAIN_SETS", "build"]

PIECES = {"k": "king", "q": "queen", "r": "rook", "b": "bishop", "n": "knight", "p": "pawn"}
COLOURS = {"w": "white", "b": "black"}
CLASSES = tuple(f"{colour} {piece}" for colour in COLOURS.values() for piece in PIECES.values())
TEMPLATES = ("a {} chess piece", "a picture of a {}")
BOARDS = (  # light and dark squares of three common boards
    (240, 217, 181),
    (181, 136, 99),
    (238, 238, 210),
    (118, 150, 86),
    (222, 227, 230),
    (140, 162, 173),
)
COPIES = 12
SEED = 2

# Left out: ada, makruk and sittuyin show other games' pieces, and the black pawn of chessicons is
# white. Sets that resemble one another (alpha, cburnett, chessmonk, merida, pirat) train together.
TRAIN_SETS = (
    "alfonso",
    "alpha",
    "cburnett",
    "chessmonk",
    "leipzig",
    "magnetic",
    "merida",
    "merida_new",
    "metaltops",
    "pirat",
)
TEST_SETS = ("freestaunton", "kilfiger", "kosal", "maya", "regular")


def build(pychess: Path) -> tuple[ImageSet, ImageSet]:
    """Pieces of `TRAIN_SETS` and of `TEST_SETS` on squares of common boards."""
    generator = np.random.default_rng(SEED)
    folder = pychess / "usr/share/pychess/pieces"
    train, test = (
        ImageSet("chess", CLASSES, TEMPLATES, list(_pictures(folder, sets, generator)))
        for sets in (TRAIN_SETS, TEST_SETS)
    )
    return train, test


def _pictures(
    folder: Path, sets: Sequence[str], generator: np.random.Generator
) -> Iterator[tuple[PixelPicture, int]]:
    for name in sets:
        for label, code in enumerate(colour + piece for colour in COLOURS for piece in PIECES):
            svg = (folder / name / f"{code}.svg").read_text(encoding="utf-8", errors="replace")
            drawing = render_svg(svg, SIDE, SIDE)
            for _ in range(COPIES):
                board = BOARDS[generator.integers(len(BOARDS))]
                yield PixelPicture(jitter(drawing, board, generator=generator)), label
