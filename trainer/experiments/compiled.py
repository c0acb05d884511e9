"""What torch.compile would gain over the fast form of a tower on a CPU, and what it takes (ADR 15).

    python -m trainer.experiments.compiled BACKBONE BATCH PRECISION

Weights are random but for medley-mini, and every block has experts; rows follow eight tasks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor

from medley.pool import Capacity
from medley.routed import RoutedModel
from trainer.options import PrecisionName
from trainer.speed.tasks import random_task
from trainer.speed.towers import open_backbone

TASKS, BOTTLENECK = 8, 64
Tower = Callable[..., Tensor]


def main(
    backbone: Annotated[str, typer.Argument()] = "medley-mini",
    batch: Annotated[int, typer.Argument(min=1)] = 1,
    precision: Annotated[PrecisionName, typer.Argument()] = PrecisionName.FP32,
    repeats: Annotated[int, typer.Option(min=1)] = 15,
) -> None:
    """Measure and print."""
    base = open_backbone(backbone, torch.device("cpu"))
    capacity = Capacity(paths=TASKS, slots=2 * TASKS, experts=2, bottleneck=BOTTLENECK)
    model = RoutedModel(base, precision=precision.value, capacity=capacity)
    paths = [model.load(random_task(base, first_block=0, seed=seed)) for seed in range(TASKS)]
    rows = torch.tensor((paths * batch)[:batch])
    images_BCHW = torch.randn(batch, 3, *base.image_size)
    columns: dict[str, tuple[Tower, tuple[Tensor, ...]]] = {
        "frozen": (lambda x: model.finish(model.frozen(x), None), (images_BCHW,)),
        "experts": (model.encode_image, (images_BCHW, rows)),
    }
    for name, (tower, inputs) in columns.items():
        figures = _compare(tower, inputs, repeats)
        Console().print(f"{backbone}, batch {batch}, {precision.value}, {name}: {figures}")


@torch.inference_mode()
def _compare(tower: Tower, inputs: tuple[Tensor, ...], repeats: int) -> str:
    compiled: Tower = torch.compile(tower, dynamic=False)
    compile_s = _seconds(compiled, inputs)
    works = (tower, compiled)
    times = [[_seconds(work, inputs) for work in works] for _ in range(2 + repeats)][2:]
    eager_ms = 1000 * statistics.median(eager_s for eager_s, _ in times)
    ratio = statistics.median(compiled_s / eager_s for eager_s, compiled_s in times)
    return f"{eager_ms:.1f} ms, compiled {ratio:.2f} of it, {compile_s:.0f} s to compile"


def _seconds(work: Tower, inputs: tuple[Tensor, ...]) -> float:
    started_s = time.perf_counter()
    work(*inputs)
    return time.perf_counter() - started_s


if __name__ == "__main__":
    typer.run(main)
