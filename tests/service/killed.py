"""Registrations that die: `python -m tests.service.killed FOLDER OLD NEW`.

For every step that a registration goes through, a child process takes bundle OLD in, then NEW, and
kills itself with SIGKILL at that step. Children are forks of one process that has torch imported
but not yet used. Prints a JSON object: the step, and the signal that ended its child.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import torch

from medley.backbone import Backbone
from service.app import create_app
from service.settings import Settings
from service.versions.tasks import Wanted
from tests.models import tiny_backbone


async def register_both(
    store: Path, bundles: list[bytes], backbone: Backbone, deadly: str
) -> list[str]:
    """Returns the steps of a registration, if it lives."""
    steps: list[str] = []

    def on_step(step: str) -> None:
        steps.append(step)
        if step == deadly and steps.count(step) == len(bundles):
            os.kill(os.getpid(), signal.SIGKILL)

    app = create_app(Settings(store=store, buckets=(4,)), backbone=backbone, on_step=on_step)
    async with app.router.lifespan_context(app):
        for version, bundle in enumerate(bundles, 1):
            tasks = app.state.service.tasks
            started = await tasks.receive(Wanted("pets", str(version)), chunks(bundle))
            assert await started.result(60) is not None
    return list(dict.fromkeys(steps))


async def chunks(bundle: bytes) -> AsyncIterator[bytes]:
    yield bundle


def in_child(store: Path, bundles: list[bytes], backbone: Backbone, deadly: str) -> int:
    """Returns the signal that ended the child, 0 if none did."""
    store.mkdir()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            steps = asyncio.run(register_both(store, bundles, backbone, deadly))
            (store / "steps.json").write_text(json.dumps(steps))
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def main() -> None:
    torch.set_num_threads(1)
    folder, *paths = map(Path, sys.argv[1:])
    bundles = [path.read_bytes() for path in paths]
    backbone = tiny_backbone()
    in_child(folder / "none", bundles, backbone, "")
    steps = json.loads((folder / "none" / "steps.json").read_text())
    ends = {step: in_child(folder / step, bundles, backbone, step) for step in steps}
    sys.stdout.write(json.dumps(ends))


if __name__ == "__main__":
    main()
