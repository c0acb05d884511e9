"""`python -m tests.fuzz`, or `make fuzz`: damaged pictures, bundles and requests by the 100,000.

Writes one line of JSON per target, with the seed that repeats it, and each finding's bytes. What
has been mended goes to `tests/fuzz/kept/`, which the ordinary tests feed in again.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import SystemRandom
from tempfile import TemporaryDirectory
from typing import Annotated

import httpx
import typer
from rich.console import Console

from tests.fuzz.bundles import Bundles, Resealed
from tests.fuzz.campaign import Result, Target, case, run
from tests.fuzz.fusions import Fusions
from tests.fuzz.images import Images
from tests.fuzz.served import IMAGES_PER_REQUEST, Requests, Served, Uploads
from tests.service.conftest import ServerProcess, running_server

console = Console()
MAX_GROWTH_BYTES = 64_000_000  # of a process, after its first quarter


def main(
    share: Annotated[float, typer.Option(help="Of the whole campaign.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="To repeat a campaign.")] = None,
    processes: Annotated[int, typer.Option(help="That feed.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder for the record.")] = Path("runs/fuzz"),
) -> None:
    """Run all targets; status 1 if there is a finding."""
    seed = SystemRandom().randrange(1_000_000) if seed is None else seed
    console.print(f"seed {seed}")
    out.mkdir(parents=True, exist_ok=True)
    here = partial(_campaign, seed=seed, processes=processes, out=out, share=share)
    good = here("images", Images, 100_000)
    good &= here("bundles", Bundles, 100_000)
    good &= here("resealed", Resealed, 20_000)
    good &= here("fusions", Fusions, 20_000)
    with TemporaryDirectory() as store, running_server(Path(store)) as server:
        url = server.url
        good &= here("served", partial(Served, url), 100_000 // IMAGES_PER_REQUEST, server=server)
        good &= here("requests", partial(Requests, url), 20_000, server=server)
        good &= here("uploads", partial(Uploads, url), 5_000, server=server)
        good &= httpx.get(f"{url}/readyz").status_code == 200
    raise typer.Exit(0 if good else 1)


def _campaign(
    name: str,
    make_target: Callable[[], Target],
    count: int,
    *,
    seed: int,
    processes: int,
    out: Path,
    share: float,
    server: ServerProcess | None = None,
) -> bool:
    count, begun_s = max(1, int(share * count)), time.monotonic()
    memory: list[int] = []

    def watch(result: Result) -> None:
        if server is not None:
            assert server.process.poll() is None, "the server has died"
            memory.append(_resident_bytes(server.process.pid))

    if server is not None:
        processes = 1  # the server has the other core
    result = run(make_target, seed=seed, count=count, processes=processes, on_chunk=watch)
    growth = memory[-1] - max(memory[: 1 + len(memory) // 4]) if memory else result.growth_bytes
    line = {
        "target": name,
        "seed": seed,
        "count": count,
        "seconds": round(time.monotonic() - begun_s, 1),
        "slowest_cpu_ms": round(1000 * result.slowest_s, 1),
        "growth_mb": round(growth / 1e6, 1),
        "outcomes": dict(result.outcomes.most_common()),
        "findings": {str(number): text for number, text in sorted(result.findings.items())},
    }
    console.print_json(json.dumps(line), indent=None)
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    if result.findings:
        _keep(make_target(), name, seed, list(result.findings), out)
    return not result.findings and growth < MAX_GROWTH_BYTES


def _keep(target: Target, name: str, seed: int, numbers: list[int], out: Path) -> None:
    for number in numbers[:100]:
        (out / f"{name}-{seed}-{number}.bin").write_bytes(case(target, seed, number))


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    typer.run(main)
