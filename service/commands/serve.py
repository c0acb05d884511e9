"""`medley serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from service.commands.console import fail, one_line_errors, out

__all__ = ["serve"]


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    store: Annotated[Path | None, typer.Option(help="Folder of registry and bundles.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Name of the frozen CLIP.")] = None,
    weights: Annotated[Path | None, typer.Option(help="File of its weights.")] = None,
    device: Annotated[str | None, typer.Option(help="Torch device.")] = None,
) -> None:
    """Run a server; further settings come from MEDLEY_* variables (docs/settings.md)."""
    from medley.errors import MedleyError
    from service.app import create_app
    from service.server import serve as run
    from service.settings import Settings
    from service.signals import logs

    given: dict[str, Any] = {
        "host": host,
        "port": port,
        "store": store,
        "backbone": backbone,
        "weights": weights,
        "device": device,
    }
    with one_line_errors():
        settings = Settings(**{k: v for k, v in given.items() if v is not None})
        logs.configure(settings.log_format, level=settings.log_level)
        app = create_app(settings, in_background=True)
    try:
        run(app, settings, on_ready=lambda url: out.print(f"Medley answers at {url}"))
    except MedleyError as error:
        fail(str(error), status=1)
