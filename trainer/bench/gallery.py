"""Which pictures a report has: file names, captions, and how each is drawn."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from trainer.bench.pictures import bars_png, errors_png, matrix_png, sequence_png
from trainer.bench.record import Record
from trainer.bench.results import Result, routers_of
from trainer.plots import confusion_png

__all__ = ["Picture", "gallery"]

BARS = ("transfer", "average", "last")


# Routers that are in the tables and in no picture: nobody looks at thirty pictures.
ASIDE = (
    "prototype",
    "class-gaussians",
    "gaussian",
    "ddas+reference",
    "ddas+labels",
    "paper-1-no-reference",
    "paper-128-no-reference",
)


VARIANTS = ("-once", "-alone")  # methods, likewise
NO_MATRIX = ("labels", "ddas+aggregate", "labels+aggregate", "aggregate")  # only in bars and curves


@dataclass(frozen=True)
class Picture:
    """One file, drawn when it is needed."""

    name: str
    caption: str
    draw: Callable[[], bytes]


def gallery(records: Sequence[Record], results: Sequence[Result]) -> list[Picture]:
    """All pictures of a report, in its order; of routers only those that people look at first."""
    results = [result for result in results if _is_shown(*result.key)]
    seeds = f"mean of {len(records)} seeds" if len(records) > 1 else f"seed {records[0].seed}"
    return [
        _bars(results, f"Transfer, Average and Last, {seeds}"),
        *_sequences(records, results, seeds),
        *_matrices(records, results, seeds),
        *_confusions(records),
        *_errors(records),
    ]


def _is_shown(method: str, router: str, _: str) -> bool:
    """Variants of aggregation and of fusing are compared in the tables."""
    variant = "@" in router or router.endswith("-similarity") or method.endswith(VARIANTS)
    return router not in ASIDE and not variant


def _bars(results: Sequence[Result], caption: str) -> Picture:
    bars = {
        f"{result.protocol}: {result.name}": {m.capitalize(): result.of(m) for m in BARS}
        for result in results
    }
    return Picture("bars.png", caption, partial(bars_png, bars, title=caption))


def _sequences(
    records: Sequence[Record], results: Sequence[Result], seeds: str
) -> Iterator[Picture]:
    for protocol in dict.fromkeys(result.protocol for result in results):
        curves = {r.name: r.mean for r in results if r.protocol == protocol}
        caption = f"{protocol}: accuracy over the sequence, {seeds}"
        draw = partial(sequence_png, curves, records[0].order, title=caption)
        yield Picture(_file("sequence", protocol), caption, draw)


def _matrices(
    records: Sequence[Record], results: Sequence[Result], seeds: str
) -> Iterator[Picture]:
    for result in results:
        if result.changes and result.key[1] not in NO_MATRIX:
            caption = f"{result.protocol}: {result.name}, {seeds}"
            draw = partial(matrix_png, result.mean, records[0].order, title=caption)
            yield Picture(_file("matrix", *result.key), caption, draw)


def _confusions(records: Sequence[Record]) -> Iterator[Picture]:
    order = records[0].order
    for router, found in routers_of(records).items():
        if router in ASIDE:
            continue
        counts = np.sum([routing.counts for routing in found], axis=0)
        draw = partial(confusion_png, counts, order, (*order, "zero-shot"))
        caption = f"Where {router} sent the images, all seeds"
        yield Picture(_file("routing", router), caption, draw)


def _errors(records: Sequence[Record]) -> Iterator[Picture]:
    scored = next((record for record in records if record.scores), None)
    if scored is not None:
        caption = f"Errors by which each task's selector decides, seed {scored.seed}"
        yield Picture("errors.png", caption, partial(errors_png, scored.scores, title=caption))


def _file(*parts: str) -> str:
    return re.sub("[^a-z0-9_-]+", "-", "-".join(parts).lower()) + ".png"
