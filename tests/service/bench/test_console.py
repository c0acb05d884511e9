"""How a bench ends that is told to."""

from __future__ import annotations

import subprocess
import sys

BENCH = """
import signal
from contextlib import ExitStack
from service.bench.console import end_in_order
end_in_order()
with ExitStack() as servers:
    servers.callback(print, "servers are stopped")
    print("measuring", flush=True)
    signal.pause()
"""


def test_a_bench_that_is_terminated_stops_what_it_has_started() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BENCH], stdout=subprocess.PIPE, text=True
    ) as bench:
        assert bench.stdout is not None
        assert bench.stdout.readline() == "measuring\n"
        bench.terminate()
        assert bench.stdout.read() == "servers are stopped\n"
    assert bench.returncode == 143
