"""A real server process with the tiny backbone: `python -m tests.service.tiny_server STORE`.

Prints its URL once it answers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from service.app import create_app
from service.server import serve
from service.settings import Settings
from tests.models import tiny_backbone


def main() -> None:
    torch.set_num_threads(1)
    settings = Settings(port=0, store=Path(sys.argv[1]), buckets=(4,))
    serve(create_app(settings, backbone=tiny_backbone()), settings, on_ready=announce)


def announce(url: str) -> None:
    sys.stdout.write(f"{url}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
