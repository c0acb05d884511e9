"""`medley pretrain`: make the embedded base again from public packages. Light to import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_STAGES = "fetch, render, embed, cache, image, text, joint, export, evaluate"


def pretrain_command(
    stage: Annotated[
        list[str] | None,
        typer.Option(help=f"Only this stage; may be repeated. In order: {_STAGES}."),
    ] = None,
    evaluate_only: Annotated[
        bool, typer.Option("--evaluate-only", help="Examine the embedded weights, train nothing.")
    ] = False,
    cache: Annotated[
        Path, typer.Option(help="Folder for packages, pictures, features, checkpoints (7 GB).")
    ] = Path("~/.cache/medley"),
    workers: Annotated[int, typer.Option(help="Processes that render and cache.")] = 2,
    threads: Annotated[int, typer.Option(help="Threads of a training stage.")] = 2,
) -> None:
    """Train medley-mini from scratch: hours on two cores, resumable at any point.

    Run it again after an interruption and it goes on where it stopped. `--stage text` and
    `--stage image` do not need each other and may run side by side.
    """
    import torch

    from medley.errors import DataError
    from trainer.pretrain.config import PretrainConfig
    from trainer.pretrain.progress import Progress
    from trainer.pretrain.stages import Pretraining
    from trainer.pretrain.workplace import Workplace

    torch.set_num_threads(threads)
    place = Workplace(PretrainConfig(), cache)
    pretraining = Pretraining(place, Progress(), workers=workers)
    chosen = ["fetch", "render", "embed", "evaluate"] if evaluate_only else stage or []
    unknown = set(chosen) - set(pretraining.stage_names)
    if unknown:
        raise DataError(f"no stage is called {', '.join(sorted(unknown))}; there are {_STAGES}")
    pretraining.run(*chosen)
