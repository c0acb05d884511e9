"""One model behind an eager and a replayed classifier, on whatever device its backbone is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from medley.backbone import Backbone
from medley.classifier import Ask, Classifier, Routed
from medley.experts import TaskUpdate
from medley.pool import Capacity
from medley.precision import Precision
from medley.replay import ReplayedClassifier
from medley.routed import ZERO_SHOT, PackedTask, RoutedModel
from medley.selector import TaskSelector
from medley.streams import Capture, Work, streams_of
from tests.fakes import random_selector
from tests.models import random_experts, tiny_backbone
from tests.streams import LateStreams

__all__ = ["BUCKETS", "SMALL", "Operations", "Pair", "assert_same", "mixed", "tiny_on", "unclaimed"]

SMALL = Capacity(paths=5, slots=12, experts=4, bottleneck=8)
BUCKETS = (1, 4, 8)
# What a device may differ by, of features of unit length, where a library chooses another algorithm
# in a capture: some thirty roundings of 2^-24 or 2^-8, that mostly cancel.
ROUNDING: dict[Precision, float] = {"exact": 1e-5, "fp32": 1e-5, "bf16": 0.02}


class Operations(TorchDispatchMode):
    """Keeps the names of the operations that run, or are captured."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.add(func.name())
        return func(*args, **kwargs or {})

    @property
    def experts(self) -> set[str]:
        """Routers choose by a top-k, in the open or within the one operation."""
        return {n for n in self.names if n == "aten::topk" or n.startswith("medley::expert_mixing")}


class Captures:
    """The streams of a device; keeps what is captured, and of which operations what is replayed."""

    def __init__(self, device: torch.device) -> None:
        streams = streams_of(device)
        self.main, self.up, self.down = streams.main, streams.up, streams.down
        self.host_tensor = streams.host_tensor
        self.names: list[str] = []
        self.replayed: list[Operations] = []
        self._capture = streams.capture

    def capture(self, work: Work) -> Capture:
        with Operations() as operations:
            captured = self._capture(work)
        self.names.append(work.__name__)

        def replay() -> None:
            self.replayed.append(operations)
            captured.replay()

        return replace(captured, replay=replay)


class Pair:
    """The two classifiers, with the same tasks."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        streams: LateStreams | None = None,
        precision: Precision = "exact",
        buckets: Sequence[int] = BUCKETS,
        first_expert_block: int | None = None,
    ) -> None:
        self.model = RoutedModel(
            backbone,
            precision=precision,
            first_expert_block=first_expert_block,
            capacity=SMALL,
        )
        self.captures = Captures(backbone.device)
        self.eager = Classifier(self.model, buckets=buckets)
        self.replayed = ReplayedClassifier(
            self.model, buckets=buckets, streams=streams or self.captures
        )
        self.rounding = 0.0 if backbone.device.type == "cpu" else ROUNDING[precision]

    def load(self, seed: int, *, first: int = 1, selector: TaskSelector | None = None) -> int:
        experts = random_experts(seed, first_expert_block=first, backbone=self.model.backbone)
        return self.enter(experts, seed=seed, selector=selector)

    def enter(
        self, task: TaskUpdate | PackedTask, *, seed: int, selector: TaskSelector | None = None
    ) -> int:
        path = self.model.load(task)
        chance, width = torch.Generator().manual_seed(seed), self.model.backbone.image.width
        stem = random_selector({"stem:mean_std": 2 * width}, random=chance)
        prototypes_CE = torch.randn(3, self.model.backbone.embed_dim, generator=chance)
        for classifier in (self.eager, self.replayed):
            classifier.selectors.add(path, selector or replace(stem, threshold=0.0))
            classifier.neighbours.add(path, prototypes_CE)
        return path

    def unload(self, path: int) -> None:
        for classifier in (self.eager, self.replayed):
            classifier.selectors.remove(path)
            classifier.neighbours.remove(path)
        self.model.unload(path)

    def pixels(self, count: int, *, seed: int = 0) -> Tensor:
        chance = torch.Generator().manual_seed(seed)
        shape = (count, 3, *self.model.backbone.image_size)
        return torch.randint(256, shape, dtype=torch.uint8, generator=chance)

    def check(self, count: int, asks: Sequence[Ask], *, seed: int = 0) -> Routed:
        images = self.pixels(count, seed=seed)
        asks = [asks[i % len(asks)] for i in range(count)]
        routed = self.replayed.route(images, asks)
        assert_same(routed, self.eager.route(images, asks), rounding=self.rounding)
        return routed

    def check_alone(self, count: int, asks: Sequence[Ask]) -> None:
        self.replayed.route(self.pixels(count), [asks[i % len(asks)] for i in range(count)])

    def captured(self) -> list[str]:
        """What has been captured since the last time, by name."""
        names, self.captures.names = self.captures.names, []
        return names

    def operations(self, asks: Sequence[Ask]) -> set[str]:
        """The expert operations of a batch, whose graphs have been captured before."""
        self.replayed.prepare()
        self.captures.replayed.clear()
        with Operations() as running:
            self.check_alone(4, asks)
        # A device runs what was captured, and nobody sees it; a CPU runs it again.
        return running.experts.union(*(replayed.experts for replayed in self.captures.replayed))


def assert_same(ours: Routed, theirs: Routed, *, rounding: float = 0.0) -> None:
    assert ours.paths == theirs.paths
    assert ours.tasks == theirs.tasks
    assert torch.equal(ours.accepted_BT, theirs.accepted_BT)
    near = torch.testing.assert_close
    near(ours.features_BE, theirs.features_BE, rtol=0, atol=rounding)
    near(ours.scores_BT, theirs.scores_BT, rtol=rounding, atol=10 * rounding)
    for one, other in zip(ours.others, theirs.others, strict=True):
        assert [near_by.path for near_by in one] == [near_by.path for near_by in other]
        for a, b in zip(one, other, strict=True):
            near(a.features_E, b.features_E, rtol=0, atol=rounding)
            assert abs(a.similarity - b.similarity) <= rounding


def mixed(*paths: int) -> list[Ask]:
    eligible = frozenset(paths[:1])
    return [
        Ask(),
        Ask(ZERO_SHOT),
        *map(Ask, paths),
        Ask(eligible=eligible),
        Ask(eligible=frozenset()),
    ]


def unclaimed(*paths: int) -> list[Ask]:
    """Asks for neighbours, of images that nobody may have, or somebody may; and some that do not.

    Two of them may have more neighbours than there are.
    """
    nobody: frozenset[int] = frozenset()
    return [
        Ask(eligible=nobody, nearest=2),
        Ask(nearest=16),
        *(Ask(path, nearest=2) for path in paths),
        Ask(eligible=nobody, nearest=3, among=frozenset(paths[:1])),
        Ask(ZERO_SHOT, nearest=2),
        Ask(eligible=nobody, nearest=1),
        Ask(eligible=nobody),
    ]


def tiny_on(device: str) -> Backbone:
    backbone = tiny_backbone()
    backbone.model.to(device)
    return backbone
