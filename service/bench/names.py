"""What benches and columns are called in the lines of a run, for who writes and who reads them."""

from __future__ import annotations

__all__ = [
    "AGREEMENT",
    "ALONE",
    "BARE",
    "BARE_PIXELS",
    "BATCHED",
    "INFINITY",
    "LOAD",
    "MEDLEY",
    "RIVAL",
    "RIVAL_LOAD",
    "SATURATED",
    "SATURATION",
    "SERVED",
    "STAGES",
    "TOLERANCE",
]

# Benches.
SERVED = "served"  # with which settings; no numbers
SATURATION, LOAD = "saturation", "load"
SATURATED, ALONE = "beside bare, saturated", "beside bare, alone"
AGREEMENT = "beside infinity, agreement"
RIVAL, RIVAL_LOAD = "beside infinity, saturated", "beside infinity, same load"

# Columns.
MEDLEY, BATCHED, INFINITY = "medley", "medley, batches", "infinity"
BARE, BARE_PIXELS = "bare loop", "bare loop, decoded before"

STAGES = ("decode", "queue", "forward", "head")  # of an image in our server
TOLERANCE = 1e-4  # between embeddings that two servers compute from the same pixels
