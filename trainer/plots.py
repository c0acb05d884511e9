"""Pictures for reports, as PNG bytes: curves, use of experts, routing, signs of deltas.

They show what the JSON beside them says and compute nothing of their own.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from trainer.freezing import Usage
from trainer.training import History

__all__ = ["agreement_png", "confusion_png", "curves_png", "usage_png"]

SMOOTHING = 20  # steps in the running mean of the curves


def curves_png(history: History) -> bytes:
    """Loss and accuracy over the steps with running means, and accuracy on held-out images."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for axes, values, name in (
        (losses, history.losses, "loss"),
        (accuracies, history.accuracies, "accuracy"),
    ):
        steps = np.arange(1, len(values) + 1)
        axes.plot(steps, values, alpha=0.25, color="tab:blue")
        axes.plot(steps, _running_mean(values), color="tab:blue", label="training")
        axes.set(xlabel="step", ylabel=name)
    if history.held_out:
        points = np.array(history.held_out)
        accuracies.plot(*points.T, marker="o", color="tab:orange", label="held out")
    accuracies.legend()
    return _png(figure)


def usage_png(usage: Usage) -> bytes:
    """Share of the gates that each expert gets, a row for each block, before any is dropped."""
    towers = {name: blocks for name, blocks in usage.items() if blocks}
    figure = Figure(figsize=(9, 1.2 + 0.4 * sum(map(len, towers.values()))), layout="constrained")
    grid = figure.subplots(len(towers), 1, squeeze=False)[:, 0]
    for axes, (tower, blocks) in zip(grid, towers.items(), strict=True):
        width = max(len(shares) for shares in blocks.values())
        shares = np.full((len(blocks), width), np.nan)
        for row, share_E in enumerate(blocks.values()):
            shares[row, : len(share_E)] = share_E.numpy()
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set(xlabel="expert (frozen ones first)", ylabel=f"{tower} block")
        axes.set_yticks(range(len(blocks)), [str(block) for block in blocks])
        axes.set_xticks(range(width))
        figure.colorbar(image, ax=axes, label="share of gates")
    return _png(figure)


def confusion_png(counts: NDArray[np.int64], rows: Sequence[str], columns: Sequence[str]) -> bytes:
    """Where the images of each data set went: row-wise shares with the counts written in."""
    size = (2.5 + 0.8 * len(columns), 1.5 + 0.6 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="routed to", ylabel="images of")
    for row, column in np.ndindex(counts.shape):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour)
    return _png(figure)


def agreement_png(shares: NDArray[np.float64], tasks: Sequence[str]) -> bytes:
    """How often the deltas of two tasks have the same sign: a row and a column for each task."""
    side = 2.5 + 0.7 * len(tasks)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    # Chance gives a half, which is what fusing has to contend with.
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="RdBu")
    axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    axes.set_yticks(range(len(tasks)), tasks)
    for row, column in np.ndindex(shares.shape):
        text = f"{shares[row, column]:.2f}"
        axes.text(column, row, text, ha="center", va="center", fontsize="small")
    figure.colorbar(image, ax=axes, label="elements of equal sign, of those that both have changed")
    return _png(figure)


def _running_mean(values: Sequence[float]) -> NDArray[np.float64]:
    """Mean over the last steps, fewer at the beginning."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - SMOOTHING)
    return (total[ends] - total[starts]) / (ends - starts)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
