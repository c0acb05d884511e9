"""A real server process with the tiny backbone: `python -m tests.service.tiny_server STORE ...`.

Further words set settings, as in `drain_delay_s=1`. Prints its URL once it is ready.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from service.app import create_app
from service.server import serve
from service.settings import Settings
from service.signals import logs
from tests.models import tiny_backbone


def main() -> None:
    torch.set_num_threads(1)
    store, *words = sys.argv[1:]
    given = dict(word.split("=", 1) for word in words)
    fields = {"port": 0, "buckets": (4,), "store": Path(store), "log_level": "warning"}
    settings = Settings.model_validate(fields | given)
    logs.configure(settings.log_format, level=settings.log_level)
    app = create_app(settings, backbone=tiny_backbone(), in_background=True)
    serve(app, settings, on_ready=announce)


def announce(url: str) -> None:
    sys.stdout.write(f"{url}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
