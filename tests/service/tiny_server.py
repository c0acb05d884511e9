"""A real server process with the tiny backbone: `python -m tests.service.tiny_server STORE [STEP]`.

Prints its URL once it answers. With a STEP it kills itself there, as a power cut would.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from service.app import create_app
from service.server import serve
from service.settings import Settings
from tests.models import tiny_backbone


def main() -> None:
    deadly = sys.argv[2] if len(sys.argv) > 2 else None

    def on_step(step: str) -> None:
        if step == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    settings = Settings(port=0, store=Path(sys.argv[1]), bucket=4)
    app = create_app(settings, backbone=tiny_backbone(), on_step=on_step)
    serve(app, settings, on_ready=announce)


def announce(url: str) -> None:
    sys.stdout.write(f"{url}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
