"""`medley bench ddas`: what deciding among T tasks costs, as a share of the image's forward.

Timed as the product does it: the tokens pooled to the feature, all autoencoders, thresholds, the
choice. The paper's size stands beside it: an AlexNet forward and autoencoders on 43,264 numbers.

Legend: B images, L tokens, D width, F feature width, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models import AlexNet

from kernels.autoencoder_errors import autoencoder_errors
from medley.backbone import Backbone
from medley.journal import Journal
from medley.precision import Precision
from medley.routed import RoutedModel
from medley.selector import SelectorBank
from trainer.ddas import DEFAULT_FEATURES
from trainer.speed.tasks import random_selector
from trainer.speed.timing import Pass, Work, graphed, in_turns

__all__ = ["FORWARD", "DdasPlan", "measure_ddas", "tasks_column"]

FORWARD = "forward"
PAPER_WIDTH, PAPER_CODE = 43_264, 100  # MoE-Adapters: AlexNet's conv5, flattened


@dataclass(frozen=True, kw_only=True)
class DdasPlan:
    """Which rows are measured, and how often."""

    device: torch.device
    backbones: tuple[tuple[Backbone, tuple[int, ...]], ...]  # and its batch sizes
    repeats: int
    tasks: tuple[int, ...] = (1, 10, 64, 256, 1000)
    paper_tasks: tuple[int, ...] = (1, 10)
    paper_width: int = PAPER_WIDTH
    precision: Precision = "fp32"
    least_s: float = 2.0

    @property
    def rows(self) -> int:
        """How many rows there will be."""
        return sum(len(batches) for _, batches in self.backbones)


def tasks_column(tasks: int) -> str:
    """Name of the column of the product's selectors."""
    return f"{tasks} tasks"


def measure_ddas(
    journal: Journal, plan: DdasPlan, *, on_row: Callable[[int], object] = lambda _: None
) -> None:
    """Write a line for each column of each row."""
    paper = _paper_columns(plan)
    for backbone, batches in plan.backbones:
        model = RoutedModel(backbone, precision=plan.precision)
        banks = {count: _bank(count, backbone) for count in plan.tasks}
        for batch in batches:
            conditions: dict[str, str | int] = {
                "backbone": backbone.name,
                "precision": plan.precision,
                "batch": batch,
                "width": backbone.image.width,
            }
            with torch.inference_mode():
                works = _columns(model, banks, batch)
                works |= {name: make(batch) for name, make in paper.items()}
                passes = {name: Pass(work) for name, work in works.items()}
                if plan.device.type == "cuda":
                    passes |= {f"{name}, graph": graphed([work]) for name, work in works.items()}
                timed = in_turns(
                    passes, device=plan.device, repeats=plan.repeats, least_s=plan.least_s
                )
            for name, one in timed.items():
                journal.add("ddas", conditions, name, times_s=one.times_s, failure=one.failure)
            on_row(1)


def _bank(count: int, backbone: Backbone) -> SelectorBank:
    bank = SelectorBank(backbone.device)
    width = backbone.image.width
    bank.add_all({path: random_selector(width, seed=path) for path in range(count)})
    return bank


def _columns(model: RoutedModel, banks: dict[int, SelectorBank], batch: int) -> dict[str, Work]:
    backbone = model.backbone
    images_BCHW = torch.randn(batch, 3, *backbone.image_size).to(backbone.device)
    hidden_BLD = model.frozen(images_BCHW).hidden_BLD
    works: dict[str, Work] = {FORWARD: lambda: model.frozen(images_BCHW, features=True).features_BE}
    for count, bank in banks.items():
        works[tasks_column(count)] = _decision(bank, hidden_BLD, count)
    return works


def _decision(bank: SelectorBank, hidden_BLD: Tensor, count: int) -> Work:
    batch = len(hidden_BLD)
    eligible_BT = torch.ones(batch, count, dtype=torch.bool, device=hidden_BLD.device)

    def decide() -> Tensor:
        taps = {DEFAULT_FEATURES[0]: hidden_BLD.float().mean(1)}
        scores_BT, accepted_BT = bank.scores(taps, batch)
        return bank.decide(scores_BT, accepted_BT, eligible_BT)

    return decide


def _paper_columns(plan: DdasPlan) -> dict[str, Callable[[int], Work]]:
    """By name, what makes a column for a batch size; the weights are shared by all rows."""
    if not plan.paper_tasks:
        return {}
    network = AlexNet().features[:-2].eval().requires_grad_(requires_grad=False).to(plan.device)
    most, width, code = max(plan.paper_tasks), plan.paper_width, PAPER_CODE
    drawn = (
        torch.zeros(most, width),
        torch.ones(most, width),
        torch.randn(most, width, code) / width**0.5,
        torch.zeros(most, code),
        torch.randn(most, code, width) / code**0.5,
        torch.zeros(most, width),
    )
    weights = [tensor.to(plan.device) for tensor in drawn]

    def alexnet(batch: int) -> Work:
        images_BCHW = torch.randn(batch, 3, 224, 224, device=plan.device)
        return lambda: network(images_BCHW).flatten(1).sigmoid()

    def scoring(count: int) -> Callable[[int], Work]:
        some = [tensor[:count] for tensor in weights]

        def make(batch: int) -> Work:
            x_BF = torch.rand(batch, width, device=plan.device)
            return lambda: autoencoder_errors(x_BF, *some, output="sigmoid")

        return make

    columns = {f"{count} tasks, paper's size": scoring(count) for count in plan.paper_tasks}
    return {"AlexNet": alexnet, **columns}
