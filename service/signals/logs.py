"""How the server's log is written: one JSON object per line for machines, or text for people.

Every line that is written for a request carries the request's id and trace. What is in a line is
its writer's business: never an image, a label, a query, a key.
"""

from __future__ import annotations

import logging
import sys
import threading
from types import TracebackType
from typing import Literal, TextIO

from pythonjsonlogger.json import JsonFormatter

from service.signals.notes import CURRENT

__all__ = ["LogFormat", "LogLevel", "configure"]

log = logging.getLogger(__name__)
LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
OURS = ("service", "medley", "kernels")


def configure(format: LogFormat, *, level: LogLevel = "info", stream: TextIO | None = None) -> None:
    """Let everything that is logged in this process come out so; for the process's start.

    Args:
        format: of the lines.
        level: the least that is written of our own; of the libraries it is `warning`, as some of
            them log the addresses that they ask for.
        stream: where to; standard error if None.
    """
    handler = logging.StreamHandler(stream)
    handler.addFilter(_name_request)
    handler.setFormatter(_json() if format == "json" else _text())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in OURS:
        logging.getLogger(name).setLevel(level.upper())
    logging.captureWarnings(True)
    sys.excepthook = _crashed
    threading.excepthook = lambda args: _crashed(args.exc_type, args.exc_value, args.exc_traceback)


def _json() -> logging.Formatter:
    return JsonFormatter(
        ("levelname", "name", "message"),
        rename_fields={"levelname": "level", "name": "logger"},
        timestamp="time",
    )


def _text() -> logging.Formatter:
    line = "%(asctime)s %(levelname)s [%(request_id)s] %(message)s"
    return logging.Formatter(line, defaults={"request_id": "-"})


def _crashed(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    """What nobody caught is a line like any other."""
    log.critical("ended by an error", exc_info=(kind, error or kind(), trace))


def _name_request(record: logging.LogRecord) -> bool:
    """Add the ids of the request that a line is written for; every line passes."""
    notes = CURRENT.get()
    if notes is not None:
        record.request_id = notes.request_id
        record.trace_id = notes.trace_id
        record.span_id = notes.span_id
    return True
