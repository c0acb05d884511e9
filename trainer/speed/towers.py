"""`medley bench model`: a whole image tower, frozen and with experts, open_clip's beside it.

A row is one backbone, precision and batch size. The frozen tower gets every treatment that the
tower with experts gets (precision, last block, graph), so that what is left is the experts' price.

Legend: B images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import count

import open_clip
import torch
from torch import Tensor

from medley.backbone import MINI, Backbone, load_backbone, wrap
from medley.classifier import Ask, Classifier
from medley.journal import Journal
from medley.pool import Capacity
from medley.precision import PRECISIONS, Precision, dtype_of
from medley.replay import ReplayedClassifier
from medley.routed import ZERO_SHOT, RoutedModel
from trainer.speed.block import BOTTLENECK, SHARED_EXPERTS, TASKS, TOP_K
from trainer.speed.tasks import random_selector, random_task
from trainer.speed.timing import Pass, Work, graphed, in_turns

__all__ = [
    "FROZEN",
    "MANY",
    "MIXED",
    "ONE_OF_MANY",
    "OPEN_CLIP",
    "ModelPlan",
    "measure_model",
    "open_backbone",
    "open_classifier",
]

OPEN_CLIP, FROZEN, MIXED, ALL_NULL = "open_clip", "frozen", "11 tasks mixed", "all zero-shot"
ONE_OF_MANY, MANY = "1 task of many", "all of many"
INPUTS = 16  # batches of images and paths that take turns


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """Which rows are measured, and how often."""

    device: torch.device
    backbones: tuple[tuple[Backbone, tuple[int, ...]], ...]  # and its batch sizes
    repeats: int
    precisions: tuple[Precision, ...] = PRECISIONS
    tasks: int = 256
    first_expert_block: int = 0
    compiled: bool = False
    least_s: float = 4.0

    @property
    def rows(self) -> int:
        """How many rows there will be."""
        return len(self.precisions) * sum(2 * len(batches) for _, batches in self.backbones)


def open_backbone(name: str, device: torch.device) -> Backbone:
    """Load medley-mini, or build an open_clip architecture with random weights: speed is the same.

    Raises:
        BackboneError: see `load_backbone`; a name with a tag ("ViT-B-16/openai") is loaded.
    """
    if name == MINI or "/" in name or name not in open_clip.list_models():
        return load_backbone(name, device=device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model(name)
    backbone = wrap(model, name=name, tokenizer=open_clip.get_tokenizer(name))
    model.to(device)
    return backbone


def measure_model(
    journal: Journal, plan: ModelPlan, *, on_row: Callable[[int], object] = lambda _: None
) -> None:
    """Write a line for each column of each row."""
    for backbone, batches in plan.backbones:
        for precision in plan.precisions:
            model, shared, distinct = _loaded(backbone, precision, plan)
            for batch in batches:
                conditions: dict[str, str | int] = {
                    "backbone": backbone.name,
                    "precision": precision,
                    "batch": batch,
                    "tasks": plan.tasks,
                    "first_expert_block": plan.first_expert_block,
                }
                # Nothing of a row outlives it: its graphs hold gigabytes on a device.
                with torch.inference_mode():
                    _measure(
                        journal,
                        plan,
                        conditions | {"what": "tower"},
                        _tower(model, plan, precision, batch, shared, distinct),
                    )
                    on_row(1)
                    _measure(
                        journal,
                        plan,
                        conditions | {"what": "classifier"},
                        _classifier(model, batch, distinct),
                    )
                    on_row(1)


def _measure(
    journal: Journal,
    plan: ModelPlan,
    conditions: dict[str, str | int],
    works: dict[str, Pass],
) -> None:
    timed = in_turns(works, device=plan.device, repeats=plan.repeats, least_s=plan.least_s)
    for name, one in timed.items():
        journal.add("model", conditions, name, times_s=one.times_s, failure=one.failure)


def _loaded(
    backbone: Backbone, precision: Precision, plan: ModelPlan
) -> tuple[RoutedModel, list[int], list[int]]:
    """Return a model, the paths of tasks that share experts, and of tasks that share none."""
    tasks, first = plan.tasks, plan.first_expert_block
    capacity = Capacity(
        paths=TASKS + tasks,
        slots=SHARED_EXPERTS + TOP_K * tasks,
        experts=SHARED_EXPERTS,
        bottleneck=BOTTLENECK,
        max_top_k=TOP_K,
    )
    model = RoutedModel(backbone, precision=precision, first_expert_block=first, capacity=capacity)
    draw = partial(random_task, backbone, first_block=first)
    shared = [
        model.load(draw(seed=task, experts_seed=0, num_experts=SHARED_EXPERTS))
        for task in range(TASKS)
    ]
    distinct = [model.load(draw(seed=1000 + task)) for task in range(tasks)]
    return model, shared, distinct


class _Feed:
    """Static inputs, as a graph needs them, that are written anew before every call."""

    def __init__(self, model: RoutedModel, batch: int) -> None:
        backbone = model.backbone
        shape = (INPUTS, batch, 3, *backbone.image_size)
        self._images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self._images = self._images.to(backbone.device)
        self._turn = count()
        self.images_BCHW = self._images[0].clone()
        self.paths_B = torch.full((batch,), ZERO_SHOT, device=backbone.device)

    def before(self, work: Work, paths: Sequence[int]) -> Work:
        """Let every call of `work` see the next images, and the next of `paths` in turn."""
        batch = len(self.paths_B)
        rows = [paths[i % len(paths)] for i in range(max(INPUTS * batch, len(paths)))]
        turns_NB = torch.tensor(rows[: len(rows) // batch * batch], device=self.paths_B.device)
        turns_NB = turns_NB.view(-1, batch)

        def call() -> object:
            turn = next(self._turn)
            self.images_BCHW.copy_(self._images[turn % INPUTS])
            self.paths_B.copy_(turns_NB[turn % len(turns_NB)])
            return work()

        return call


def _tower(
    model: RoutedModel,
    plan: ModelPlan,
    precision: Precision,
    batch: int,
    shared: Sequence[int],
    distinct: Sequence[int],
) -> dict[str, Pass]:
    feed = _Feed(model, batch)
    visual = _visual(model.backbone, dtype_of(precision))

    def clip() -> Tensor:
        return visual(feed.images_BCHW.to(dtype_of(precision)))

    def frozen() -> Tensor | None:
        return model.frozen(feed.images_BCHW, features=True).features_BE

    def experts() -> Tensor:
        return model.encode_image(feed.images_BCHW, feed.paths_B)

    half = [path for task in shared for path in (task, ZERO_SHOT)]
    columns: dict[str, tuple[Work, Sequence[int]]] = {
        OPEN_CLIP: (clip, [ZERO_SHOT]),
        FROZEN: (frozen, [ZERO_SHOT]),
        "one task": (experts, shared[:1]),
        MIXED: (experts, shared),
        "half zero-shot": (experts, half),
        ALL_NULL: (experts, [ZERO_SHOT]),
        ONE_OF_MANY: (experts, distinct[:1]),
        MANY: (experts, distinct),
    }
    if plan.compiled:
        compiled = torch.compile(visual, dynamic=False)
        columns[f"{OPEN_CLIP}, compiled"] = (
            lambda: compiled(feed.images_BCHW.to(dtype_of(precision))),
            [ZERO_SHOT],
        )
    works: dict[str, Pass] = {}
    for name, (work, paths) in columns.items():
        works[name] = Pass(feed.before(work, paths))
        if plan.device.type == "cuda":
            works[f"{name}, graph"] = Pass(feed.before(graphed([work]).run, paths))
    return works


def _classifier(model: RoutedModel, batch: int, distinct: Sequence[int]) -> dict[str, Pass]:
    """Uint8 pixels to features with DDAS deciding, one task live or all of them."""
    shape = (batch, 3, *model.backbone.image_size)
    pixels_BCHW = torch.randint(256, shape, dtype=torch.uint8)
    works: dict[str, Pass] = {}
    for name, paths in ((ONE_OF_MANY, distinct[:1]), (MANY, distinct)):
        classifier = open_classifier(model, batch)
        width = model.backbone.image.width
        classifier.selectors.add_all({path: random_selector(width, seed=path) for path in paths})
        classifier.prepare()
        works[name] = Pass(_route(classifier, pixels_BCHW, [Ask()] * batch))
        if model.backbone.device.type == "cuda":
            works[f"{name}, two in flight"] = Pass(_two_in_flight(classifier, pixels_BCHW, batch))
    told = [Ask(ZERO_SHOT)] * batch
    works["told zero-shot"] = Pass(_route(open_classifier(model, batch), pixels_BCHW, told))
    return works


def open_classifier(model: RoutedModel, batch: int) -> Classifier:
    """The classifier that a server has on the model's device, with one bucket."""
    cuda = model.backbone.device.type == "cuda"
    return (ReplayedClassifier if cuda else Classifier)(model, buckets=(batch,))


def _route(classifier: Classifier, pixels_BCHW: Tensor, asks: Sequence[Ask]) -> Work:
    return lambda: classifier.route(pixels_BCHW, asks)


def _two_in_flight(classifier: Classifier, pixels_BCHW: Tensor, batch: int) -> Work:
    """Launch a batch, then wait for the one before, as the server does; for throughput."""
    before = [classifier.launch(pixels_BCHW, [Ask()] * batch)]

    def call() -> object:
        before.append(classifier.launch(pixels_BCHW, [Ask()] * batch))
        return before.pop(0).wait()

    return call


def _visual(backbone: Backbone, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """open_clip's own image tower; a copy where the weights must be of another type."""
    visual = backbone.model.visual
    return visual if dtype == torch.float32 else deepcopy(visual).to(dtype)
