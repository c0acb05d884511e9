"""What each bench measures unless told otherwise: minutes on two cores, all of it on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from medley.backbone import MINI, Backbone
from medley.journal import Journal
from medley.precision import PRECISIONS, Precision
from trainer.speed.mixing import KernelsPlan, measure_kernels
from trainer.speed.scoring import DdasPlan, measure_ddas
from trainer.speed.swapping import SwapPlan, measure_swap
from trainer.speed.towers import ModelPlan, measure_model, open_backbone

__all__ = ["Bench", "ddas_bench", "kernels_bench", "model_bench", "swap_bench"]

BATCHES, GPU_BATCHES = (1, 8, 32), (1, 8, 32, 64, 256)
# A CPU needs seconds for a large batch of a large tower.
LARGE_BATCHES = (1, 8)
BACKBONES, GPU_BACKBONES = (MINI, "ViT-B-16"), (MINI, "ViT-B-16", "ViT-L-14")
REPEATS, GPU_REPEATS = 5, 20
TOWER_REPEATS = 3  # at least: a quick tower has more, until seconds are over

OnRow = Callable[[int], object]


@dataclass(frozen=True)
class Bench:
    """One bench, ready to run: how many steps it has, and what takes them."""

    name: str
    steps: int
    run: Callable[[Journal, OnRow], None]


def kernels_bench(
    device: torch.device,
    *,
    repeats: int | None = None,
    batches: tuple[int, ...] = (),
    compiled: bool = False,
) -> Bench:
    """The expert branch of one block."""
    plan = KernelsPlan(
        device=device,
        batches=batches or (GPU_BATCHES if device.type == "cuda" else BATCHES),
        repeats=repeats or _repeats(device),
        compiled=compiled,
    )
    return Bench("kernels", plan.steps, lambda to, on: measure_kernels(to, plan, on_row=on))


def model_bench(
    device: torch.device,
    *,
    repeats: int | None = None,
    batches: tuple[int, ...] = (),
    backbones: tuple[str, ...] = (),
    precisions: tuple[Precision, ...] = (),
    tasks: int = 256,
    first_expert_block: int = 0,
    compiled: bool = False,
) -> Bench:
    """Whole image towers."""
    plan = ModelPlan(
        device=device,
        backbones=_backbones(device, backbones, batches),
        repeats=repeats or _repeats(device, TOWER_REPEATS),
        precisions=precisions or PRECISIONS,
        tasks=tasks,
        first_expert_block=first_expert_block,
        compiled=compiled,
    )
    return Bench("model", plan.rows, lambda to, on: measure_model(to, plan, on_row=on))


def ddas_bench(
    device: torch.device,
    *,
    repeats: int | None = None,
    batches: tuple[int, ...] = (),
    backbones: tuple[str, ...] = (),
    precision: Precision | None = None,
) -> Bench:
    """Deciding among tasks."""
    plan = DdasPlan(
        device=device,
        backbones=_backbones(device, backbones, batches),
        repeats=repeats or _repeats(device),
        precision=precision or _precision(device),
    )
    return Bench("ddas", plan.rows, lambda to, on: measure_ddas(to, plan, on_row=on))


def swap_bench(
    device: torch.device,
    *,
    repeats: int | None = None,
    batch: int = 8,
    backbone: str = MINI,
    precision: Precision | None = None,
    swaps: int = 1000,
) -> Bench:
    """Swapping tasks; a repeat is a segment of three seconds in each rhythm."""
    plan = SwapPlan(
        device=device,
        backbone=open_backbone(backbone, device),
        batch=batch,
        repeats=repeats or REPEATS,
        precision=precision or _precision(device),
        swaps=swaps,
    )
    return Bench("swap", plan.rows, lambda to, on: measure_swap(to, plan, on_row=on))


def _backbones(
    device: torch.device, names: tuple[str, ...], batches: tuple[int, ...]
) -> tuple[tuple[Backbone, tuple[int, ...]], ...]:
    gpu = device.type == "cuda"

    def usual(name: str) -> tuple[int, ...]:
        return GPU_BATCHES if gpu else BATCHES if name == MINI else LARGE_BATCHES

    chosen = names or (GPU_BACKBONES if gpu else BACKBONES)
    return tuple((open_backbone(name, device), batches or usual(name)) for name in chosen)


def _repeats(device: torch.device, on_cpu: int = REPEATS) -> int:
    return GPU_REPEATS if device.type == "cuda" else on_cpu


def _precision(device: torch.device) -> Precision:
    """The quicker one."""
    return "bf16" if device.type == "cuda" else "fp32"
