"""Replayed batches answer as eager ones, whatever comes and goes, and capture no more than needed.

What is replayed here is a function that is called again: no CUDA graph has been captured. The
buffers, the padding, the order of copies and the rules of what is captured anew are the real ones.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from medley.backbone import Backbone
from medley.classifier import Ask, Classifier, Launched, Routed
from medley.levels import Level
from medley.pool import Capacity
from medley.precision import Precision
from medley.replay import ReplayedClassifier
from medley.routed import ZERO_SHOT, RoutedModel
from medley.selector import TaskSelector
from medley.streams import Capture, Work, streams_of
from tests.fakes import LEVEL_KINDS, random_level, random_selector
from tests.models import random_experts, tiny_backbone
from tests.streams import LateStreams

SMALL = Capacity(paths=5, slots=12, experts=4, bottleneck=8)
STEM = {"stem:mean_std": 128}
BUCKETS = (1, 4, 8)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


class Captures:
    """The streams of a CPU; counts what is captured and what is replayed."""

    def __init__(self) -> None:
        streams = streams_of(torch.device("cpu"))
        self.main, self.up, self.down = streams.main, streams.up, streams.down
        self.host_tensor = streams.host_tensor
        self.names: list[str] = []
        self.replayed: list[str] = []
        self._capture = streams.capture

    def capture(self, work: Work) -> Capture:
        name = work.__name__
        captured = self._capture(work)
        self.names.append(name)

        def replay() -> None:
            self.replayed.append(name)
            captured.replay()

        return replace(captured, replay=replay)


class Pair:
    """One model behind an eager and a replayed classifier."""

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
        self.captures = Captures()
        self.eager = Classifier(self.model, buckets=buckets)
        self.replayed = ReplayedClassifier(
            self.model, buckets=buckets, streams=streams or self.captures
        )

    def load(self, seed: int, *, first: int = 1, selector: TaskSelector | None = None) -> int:
        path = self.model.load(random_experts(seed, first_expert_block=first))
        chance = torch.Generator().manual_seed(seed)
        selector = selector or replace(random_selector(STEM, random=chance), threshold=0.0)
        for classifier in (self.eager, self.replayed):
            classifier.selectors.add(path, selector)
        return path

    def unload(self, path: int) -> None:
        for classifier in (self.eager, self.replayed):
            classifier.selectors.remove(path)
        self.model.unload(path)

    def check(self, count: int, asks: Sequence[Ask], *, seed: int = 0) -> Routed:
        images = pixels(count, seed=seed)
        asks = [asks[i % len(asks)] for i in range(count)]
        routed = self.replayed.route(images, asks)
        assert_equal(routed, self.eager.route(images, asks))
        return routed

    def check_alone(self, count: int, asks: Sequence[Ask]) -> None:
        self.replayed.route(pixels(count), [asks[i % len(asks)] for i in range(count)])

    def captured(self) -> list[str]:
        """What has been captured since the last time, by name."""
        names, self.captures.names = self.captures.names, []
        return names


def assert_equal(ours: Routed, theirs: Routed) -> None:
    assert ours.paths == theirs.paths
    assert ours.tasks == theirs.tasks
    assert torch.equal(ours.features_BE, theirs.features_BE)
    assert torch.equal(ours.scores_BT, theirs.scores_BT)
    assert torch.equal(ours.accepted_BT, theirs.accepted_BT)


def pixels(count: int, *, seed: int = 0) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=chance)


def mixed(*paths: int) -> list[Ask]:
    eligible = frozenset(paths[:1])
    return [
        Ask(),
        Ask(ZERO_SHOT),
        *map(Ask, paths),
        Ask(eligible=eligible),
        Ask(eligible=frozenset()),
    ]


@pytest.mark.parametrize("precision", ["exact", "fp32", "bf16"])
def test_replayed_answers_are_the_eager_ones_bit_for_bit(
    backbone: Backbone, precision: Precision
) -> None:
    pair = Pair(backbone, precision=precision)
    pair.check(3, [Ask(), Ask(ZERO_SHOT)])
    asks = mixed(pair.load(1), pair.load(2, first=2))
    taken = set()
    for count in (1, 2, 4, 5, 8, 11, 20, 0):
        taken |= set(pair.check(count, asks or [Ask()], seed=count).paths)

    assert taken == {ZERO_SHOT, 0, 1}


@pytest.mark.parametrize("kind", LEVEL_KINDS)
def test_every_kind_of_level_is_replayed(backbone: Backbone, kind: str) -> None:
    pair, chance = Pair(backbone), torch.Generator().manual_seed(1)

    def level(feature: str, width: int) -> Level:
        return random_level(kind, feature, width, random=chance)

    features = [("stem:mean_std", 128), ("block2:mean", 64), ("embedding", 24)]
    selector = TaskSelector(
        tuple(level(*feature) for feature in features * 2),
        threshold=30.0,
        alpha=None,
        reference=(level(*features[0]),),
        margin=20.0,
    )
    asks = mixed(pair.load(1, selector=selector), pair.load(2))

    assert {ZERO_SHOT, 0} <= set(pair.check(8, asks).paths) | set(pair.check(5, asks).paths)


def test_swapped_slots_are_seen_by_a_replay_without_a_new_capture(backbone: Backbone) -> None:
    pair = Pair(backbone, buckets=(4,))
    kept, swapped = pair.load(1), pair.load(2)
    asks = [Ask(kept), Ask(swapped), Ask(ZERO_SHOT)]
    before = pair.check(3, asks)
    pair.captured()
    pair.model.unload(swapped)
    assert pair.model.load(random_experts(9, first_expert_block=1)) == swapped
    after = pair.check(3, asks)

    assert pair.captured() == []
    same = [
        bool(torch.equal(a, b)) for a, b in zip(before.features_BE, after.features_BE, strict=True)
    ]
    assert same == [True, False, True]


def test_only_the_selection_is_captured_again_when_tasks_come_and_go(backbone: Backbone) -> None:
    pair = Pair(backbone)
    asks = mixed(pair.load(1))
    pair.replayed.prepare()
    every = ["trunk", "selection", "encoding", "encoding"]
    assert pair.captured() == every * len(BUCKETS)
    path = pair.load(2)
    pair.check(3, asks)
    assert pair.captured() == ["selection"]
    pair.replayed.prepare()
    assert pair.captured() == ["selection"] * 2
    pair.unload(path)
    pair.replayed.prepare()
    pair.check(3, asks)
    assert pair.captured() == ["selection"] * 3


def test_another_depth_of_the_trunk_captures_all_of_it_again(backbone: Backbone) -> None:
    pair = Pair(backbone, buckets=(4,))
    every = ["trunk", "selection", "encoding", "encoding"]
    pair.check(3, [Ask()])
    assert pair.captured() == every
    for first, expected in ((2, every), (2, ["selection"]), (1, every), (1, ["selection"])):
        asks = mixed(pair.load(first, first=first))
        pair.check(4, asks)
        assert pair.captured() == expected
    for path, expected in ((3, ["selection"]), (2, every)):
        pair.unload(path)
        pair.check(4, [Ask(0), Ask(1), Ask()])
        assert pair.captured() == expected


def test_another_feature_captures_all_of_it_again(backbone: Backbone) -> None:
    pair = Pair(backbone, buckets=(4,), first_expert_block=1)
    pair.check(4, [Ask(pair.load(1))])
    pair.captured()
    chance = torch.Generator().manual_seed(3)
    deep = random_selector({"block3:mean": 64}, random=chance)
    pair.check(4, mixed(pair.load(2, selector=deep)))

    assert pair.captured() == ["trunk", "selection", "encoding", "encoding"]


class Operations(TorchDispatchMode):
    """Keeps the names of the operations that run."""

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


@pytest.mark.parametrize("precision", ["exact", "fp32"])
def test_a_batch_of_zero_shot_images_runs_no_expert_operation(
    backbone: Backbone, precision: Precision
) -> None:
    pair = Pair(backbone, precision=precision, buckets=(4,), first_expert_block=1)
    assert not operations(pair, [Ask(ZERO_SHOT), Ask()])
    path = pair.load(1)
    assert not operations(pair, [Ask(ZERO_SHOT)])
    assert operations(pair, [Ask(ZERO_SHOT), Ask(path)])
    assert operations(pair, [Ask()])


@pytest.mark.parametrize("precision", ["exact", "fp32"])
def test_nor_does_an_eager_one_on_a_cpu_whoever_decided(
    backbone: Backbone, precision: Precision
) -> None:
    pair = Pair(backbone, precision=precision, first_expert_block=1)
    path = pair.load(1)
    for ask, some in ((Ask(eligible=frozenset()), False), (Ask(path), True)):
        with Operations() as operations:
            pair.eager.route(pixels(1), [ask])
        assert bool(operations.experts) is some


def operations(pair: Pair, asks: Sequence[Ask]) -> set[str]:
    """The expert operations of a batch, whose graphs have been captured before."""
    pair.replayed.prepare()
    with Operations() as operations:
        pair.check_alone(4, asks)
    return operations.experts


@pytest.mark.parametrize("seed", range(6))
def test_batches_in_flight_keep_to_themselves(backbone: Backbone, seed: int) -> None:
    """Whatever order the events leave open, each batch gets its own answers."""
    pair = Pair(backbone, streams=LateStreams(seed), first_expert_block=1)
    asks = mixed(pair.load(1), pair.load(2))
    batches = [
        (pixels(count, seed=n), list(islice(cycle(asks), n, n + count)))
        for n, count in enumerate((4, 8, 1, 3, 8, 20, 7))
    ]
    flights = [pair.replayed.launch(*batch) for batch in batches]
    order = random.Random(seed).sample(range(len(batches)), len(batches))

    for n in order:
        assert_equal(flights[n].wait(), pair.eager.route(*batches[n]))
        assert_equal(flights[n].wait(), pair.eager.route(*batches[n]))


@pytest.mark.parametrize("count", [2, 9])
def test_a_batch_is_ready_when_its_answers_have_come(backbone: Backbone, count: int) -> None:
    streams = LateStreams(0)
    replayed = Pair(backbone, streams=streams).replayed
    replayed.prepare()
    launched = replayed.launch(pixels(count), [Ask()] * count)
    assert not launched.ready
    while streams.step():
        pass
    assert launched.ready


def test_two_batches_are_in_flight_and_a_third_waits_for_the_first(backbone: Backbone) -> None:
    replayed = Pair(backbone, streams=LateStreams(1)).replayed
    replayed.prepare()
    flights: list[Launched] = []
    for expected in ([False], [False, False], [True, False, False], [True, True, False, False]):
        flights.append(replayed.launch(pixels(1), [Ask()]))
        assert [flight.ready for flight in flights] == expected


@pytest.mark.parametrize("seed", range(4))
def test_a_capture_waits_for_the_batches_in_flight(backbone: Backbone, seed: int) -> None:
    """The answers are computed but not yet fetched when a task comes that wants the image."""
    streams = LateStreams(seed)
    pair = Pair(backbone, streams=streams, first_expert_block=1)
    asks = [Ask(pair.load(1)), Ask()]
    expected = pair.eager.route(pixels(2), asks)
    flight = pair.replayed.launch(pixels(2), asks)
    while streams.main.waiting:
        streams.step()
    level = random_selector(STEM, random=torch.Generator().manual_seed(2)).levels[0]
    greedy = TaskSelector((replace(level, center=1e6),), threshold=math.inf, alpha=None)
    path = pair.load(2, selector=greedy)
    later = pair.replayed.launch(pixels(2, seed=1), asks)

    assert_equal(flight.wait(), expected)
    assert later.wait().paths[1] == path != expected.paths[1]


def test_a_path_that_is_not_loaded_never_reaches_a_device(backbone: Backbone) -> None:
    pair = Pair(backbone)
    path = pair.load(1)
    for wrong in (path + 1, SMALL.paths, -2, -7):
        with pytest.raises(ValueError, match=f"path {wrong} is not loaded"):
            pair.replayed.launch(pixels(2), [Ask(path), Ask(wrong)])
    assert pair.captures.replayed == []
