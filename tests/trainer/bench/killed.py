"""Runs the tiny benchmark in a folder again and again, killed each time when a file appears.

Each run is a process of its own, forked from this one, which has imported what takes long and has
computed nothing.
"""

import os
import signal
import sys
import time
from pathlib import Path

from tests.models import tiny_backbone
from tests.trainer.bench.course import KILLED_METHODS, bench


def killed_at(awaited: Path, folder: Path) -> bool:
    """Start a run, kill it as soon as the file is there; False: it had ended before."""
    child = os.fork()
    if child == 0:
        bench(tiny_backbone(), folder, methods=KILLED_METHODS)
        os._exit(0)
    ended = 0
    while not awaited.exists() and not ended:
        time.sleep(0.005)
        ended, _ = os.waitpid(child, os.WNOHANG)
    if ended:
        return False
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


folder = Path(sys.argv[1])
sys.exit(not all(killed_at(folder / moment, folder) for moment in sys.argv[2:]))
