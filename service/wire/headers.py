"""Names of the headers that Medley has of its own. Light to import: the client reads it."""

from __future__ import annotations

__all__ = ["GENERATION_HEADER", "MIN_GENERATION_HEADER", "REPLICA_HEADER", "TIMEOUT_HEADER"]

GENERATION_HEADER = "X-Registry-Generation"
MIN_GENERATION_HEADER = "X-Min-Generation"
REPLICA_HEADER = "X-Replica"
TIMEOUT_HEADER = "X-Request-Timeout-Ms"
