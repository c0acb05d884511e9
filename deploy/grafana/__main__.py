"""`python -m deploy.grafana write` makes the JSON; `draw` makes pictures of what they show.

Both for those who change the dashboards: what is served by Grafana is the JSON, as it is kept here.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console

from deploy.grafana.boards import BOARDS
from deploy.grafana.model import text
from deploy.grafana.pictures import png
from deploy.grafana.source import Source, Span
from medley.files import write_whole

FOLDER = Path(__file__).parent / "dashboards"
commands = typer.Typer(add_completion=False, no_args_is_help=True)
console = Console()


@commands.command()
def write(out: Annotated[Path, typer.Option(help="Folder of the JSON")] = FOLDER) -> None:
    """Write each dashboard's JSON."""
    out.mkdir(parents=True, exist_ok=True)
    for board in BOARDS:
        write_whole(out / f"{board.uid}.json", text(board).encode())
    console.print(f"{len(BOARDS)} dashboards in {out}")


@commands.command()
def draw(
    prometheus: Annotated[str, typer.Option(help="URL of Prometheus")] = "http://127.0.0.1:9090",
    out: Annotated[Path, typer.Option(help="Folder of the pictures")] = Path("runs/dashboards"),
    minutes: Annotated[float, typer.Option(help="How far back")] = 60.0,
    rate: Annotated[str, typer.Option(help="Window of rates")] = "1m",
    job: Annotated[str, typer.Option(help="Which cluster, a pattern")] = ".+",
) -> None:
    """Draw each dashboard as Prometheus answers its queries now."""
    out.mkdir(parents=True, exist_ok=True)
    now_s = time.time()
    with httpx.Client(base_url=prometheus, timeout=30) as http:
        source = Source(http, Span(now_s - 60 * minutes, now_s), rate=rate, job=job)
        for board in BOARDS:
            write_whole(out / f"{board.uid}.png", png(board, source))
    console.print(f"{len(BOARDS)} pictures in {out}")


if __name__ == "__main__":
    commands()
