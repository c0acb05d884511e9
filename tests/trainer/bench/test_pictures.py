import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from trainer.bench.metrics import OverSeeds
from trainer.bench.pictures import bars_png, errors_png, matrix_png, sequence_png
from trainer.bench.record import Scores

NAMES = [f"task{place}" for place in range(11)]
MATRIX = np.linspace(0, 1, 121).reshape(11, 11)
SCORES = Scores(task="task0", threshold=2, own=(0, 1, 2.5), others=(5, 80), unseen=(7,))


def drawn(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    image.load()
    colours = image.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 10, "nothing was drawn"
    return image


@pytest.mark.parametrize("tasks", [1, 11])
def test_matrices_and_sequences_of_any_length_are_drawn(tasks: int) -> None:
    part = MATRIX[:tasks, :tasks]
    small = drawn(matrix_png(part, NAMES[:tasks], title="a"))
    many = {str(place): part for place in range(7)}
    drawn(sequence_png(many, NAMES[:tasks], title="a"))
    assert small.width < 1200


def test_a_picture_shows_its_numbers() -> None:
    part, names = MATRIX[:2, :2], NAMES[:2]
    one, other = (matrix_png(part * scale, names, title="a") for scale in (1, 0.5))
    assert one == matrix_png(part, names, title="a")
    assert one != other


@pytest.mark.parametrize(
    "scores",
    [
        SCORES,
        replace(SCORES, others=(), unseen=()),
        replace(SCORES, own=()),
        replace(SCORES, own=(), others=(), unseen=()),
        replace(SCORES, own=(0.0, 0.0), others=(), unseen=(), threshold=0.0),
        replace(SCORES, own=(0.055, 0.06), others=(0.07,), threshold=0.0655),
        replace(SCORES, threshold=float("inf")),
    ],
)
def test_errors_of_any_range_are_drawn(scores: Scores) -> None:
    drawn(errors_png([scores] * 2, title="a"))


def test_a_metric_that_a_method_lacks_leaves_its_bar_out() -> None:
    half = OverSeeds(0.5, 0.1, 3)
    whole = drawn(bars_png({"a": {"Last": half, "Transfer": half}}, title="t"))
    part = drawn(bars_png({"a": {"Last": half, "Transfer": None}}, title="t"))
    assert whole.size == part.size
    assert whole.tobytes() != part.tobytes()
