"""Replayed batches answer as eager ones, whatever comes and goes, and capture no more than needed.

On a CPU what is replayed is a function that is called again; the buffers, the padding, the order of
copies and the rules of what is captured anew are the real ones. On a device graphs are captured.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice, permutations
from typing import Any

import pytest
import torch

from medley.backbone import Backbone
from medley.classifier import Ask, Launched
from medley.levels import Level
from medley.precision import PRECISIONS, Precision
from medley.routed import ZERO_SHOT
from medley.selector import TaskSelector
from tests.devices import DEVICES
from tests.fakes import LEVEL_KINDS, random_level, random_selector
from tests.medley.replayed import (
    BUCKETS,
    ROUNDING,
    SMALL,
    Operations,
    Pair,
    assert_same,
    mixed,
    tiny_on,
    unclaimed,
)
from tests.models import random_experts, random_low_rank, random_weights, tiny_backbone
from tests.streams import LateStreams


@pytest.fixture(scope="module", params=DEVICES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return tiny_on(request.param)


@pytest.fixture(scope="module")
def on_cpu() -> Backbone:
    """For what is about the order of events, which a test cannot choose on a device."""
    return tiny_backbone()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_replayed_answers_are_the_eager_ones(backbone: Backbone, precision: Precision) -> None:
    """On a CPU bit for bit."""
    pair = Pair(backbone, precision=precision)
    pair.check(3, [Ask(), Ask(ZERO_SHOT)])
    asks = mixed(pair.load(1), pair.load(2, first=2))
    taken = set()
    for count in (1, 2, 4, 5, 8, 11, 20, 0):
        taken |= set(pair.check(count, asks or [Ask()], seed=count).paths)

    assert taken == {ZERO_SHOT, 0, 1}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_replayed_neighbours_are_the_eager_ones(backbone: Backbone, precision: Precision) -> None:
    """On a CPU bit for bit, but the fast forms: an eager batch runs fewer rows, in other places."""
    pair = Pair(backbone, precision=precision)
    asks = unclaimed(pair.load(1), pair.load(2, first=2), pair.load(3))
    if precision != "exact":
        pair.rounding = ROUNDING[precision]
    found = [
        len(others)
        for count in (1, 2, 5, 8, 11, 20)
        for others in pair.check(count, asks, seed=count).others
    ]

    assert set(found) == {0, 1, 2, 3}


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


def test_neighbours_are_captured_when_first_asked_for(backbone: Backbone) -> None:
    pair = Pair(backbone, buckets=(1, 4))
    path = pair.load(1)
    pair.replayed.prepare()
    pair.captured()
    asks = unclaimed(path)
    pair.check(4, asks)
    assert pair.captured() == ["nearest", "along"]
    pair.replayed.prepare()
    assert pair.captured() == ["nearest", "along"]
    another = pair.load(2)
    pair.check(4, asks)
    assert pair.captured() == ["selection", "nearest"]
    pair.unload(path)
    assert pair.check(4, [Ask(eligible=frozenset(), nearest=2)]).others[0][0].path == another
    assert pair.captured() == ["selection", "nearest"]


def test_what_follows_paths_is_captured_again_when_what_it_reads_is_elsewhere(
    backbone: Backbone,
) -> None:
    """The first low-rank task takes memory, and each that has weights of its own brings them."""
    pair = Pair(backbone, buckets=(4,), first_expert_block=1)
    asks = unclaimed(pair.load(1))
    pair.check(4, asks)
    pair.captured()
    low_rank = [random_low_rank(backbone, seed, first_block=1) for seed in (2, 3)]
    whole = random_weights(backbone, 4, first_block=2)
    paths: list[int] = []
    for task, expected in (
        (low_rank[0], ["selection", "encoding", "nearest", "along"]),
        (low_rank[1], ["selection", "nearest"]),
        (whole, ["selection", "encoding", "nearest", "along"]),
    ):
        paths.append(pair.enter(task, seed=len(paths)))
        pair.check(8, [*unclaimed(*paths), *mixed(*paths)])
        assert pair.captured() == expected
    pair.unload(paths.pop())
    pair.check(8, [*unclaimed(*paths), *mixed(*paths)])
    assert pair.captured() == ["selection", "encoding", "nearest", "along"]


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


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_batch_of_zero_shot_images_runs_no_expert_operation(
    backbone: Backbone, precision: Precision
) -> None:
    pair = Pair(backbone, precision=precision, buckets=(4,), first_expert_block=1)
    assert not pair.operations([Ask(ZERO_SHOT), Ask()])
    accepting = random_selector({"stem:mean_std": 128}, random=torch.Generator().manual_seed(1))
    path = pair.load(1, selector=replace(accepting, threshold=math.inf))
    assert not pair.operations([Ask(ZERO_SHOT)])
    assert pair.operations([Ask(ZERO_SHOT), Ask(path)])
    assert pair.operations([Ask()])


@pytest.mark.parametrize("precision", ["exact", "fp32"])
def test_nor_does_an_eager_one_on_a_cpu_whoever_decided(
    on_cpu: Backbone, precision: Precision
) -> None:
    pair = Pair(on_cpu, precision=precision, first_expert_block=1)
    path = pair.load(1)
    for ask, some in ((Ask(eligible=frozenset()), False), (Ask(path), True)):
        with Operations() as operations:
            pair.eager.route(pair.pixels(1), [ask])
        assert bool(operations.experts) is some


@pytest.mark.parametrize("seed", range(6))
def test_batches_in_flight_keep_to_themselves(backbone: Backbone, seed: int) -> None:
    """Whatever order the events leave open, each batch gets its own answers."""
    late = LateStreams(seed) if backbone.device.type == "cpu" else None
    pair = Pair(backbone, streams=late, first_expert_block=1)
    paths = pair.load(1), pair.load(2)
    asks = [ask for both in zip(mixed(*paths), unclaimed(*paths), strict=False) for ask in both]
    batches = [
        (pair.pixels(count, seed=n), list(islice(cycle(asks), n, n + count)))
        for n, count in enumerate((4, 8, 1, 3, 8, 20, 7))
    ]
    flights = [pair.replayed.launch(*batch) for batch in batches]
    order = random.Random(seed).sample(range(len(batches)), len(batches))

    for n in order:
        for _ in range(2):
            answers = flights[n].wait()
            assert_same(answers, pair.eager.route(*batches[n]), rounding=pair.rounding)


@pytest.mark.parametrize("order", list(permutations(("main", "up", "down"))))
def test_no_stream_runs_ahead_of_what_it_needs(on_cpu: Backbone, order: tuple[str, ...]) -> None:
    """Each goes on as long as its events let it; two batches are in flight at a time."""
    streams = LateStreams(0)
    pair = Pair(on_cpu, streams=streams, first_expert_block=1)
    asks = unclaimed(pair.load(1), pair.load(2))
    pair.replayed.route(pair.pixels(8), asks[:8])
    for turn in range(4):
        batches = [
            (
                pair.pixels(count, seed=turn),
                list(islice(cycle(asks), turn + count, turn + 2 * count)),
            )
            for count in (8 - turn, 3 + turn)
        ]
        flights = [pair.replayed.launch(*batch) for batch in batches]
        drain([getattr(streams, name) for name in order])
        for flight, batch in zip(flights, batches, strict=True):
            assert flight.ready
            assert_same(flight.wait(), pair.eager.route(*batch))


@torch.inference_mode()
def drain(streams: Sequence[Any]) -> None:
    """Do all there is, always the next thing of the first stream that is able to."""
    while able := [stream for stream in streams if stream.able]:
        able[0].step()


@pytest.mark.parametrize("count", [2, 9])
def test_a_batch_is_ready_when_its_answers_have_come(on_cpu: Backbone, count: int) -> None:
    streams = LateStreams(0)
    pair = Pair(on_cpu, streams=streams)
    pair.replayed.prepare()
    launched = pair.replayed.launch(pair.pixels(count), [Ask()] * count)
    assert not launched.ready
    while streams.step():
        pass
    assert launched.ready


def test_two_batches_are_in_flight_and_a_third_waits_for_the_first(on_cpu: Backbone) -> None:
    pair = Pair(on_cpu, streams=LateStreams(1))
    pair.replayed.prepare()
    flights: list[Launched] = []
    for expected in ([False], [False, False], [True, False, False], [True, True, False, False]):
        flights.append(pair.replayed.launch(pair.pixels(1), [Ask()]))
        assert [flight.ready for flight in flights] == expected


@pytest.mark.parametrize("seed", range(4))
def test_a_capture_waits_for_the_batches_in_flight(on_cpu: Backbone, seed: int) -> None:
    """The answers are computed but not yet fetched when a task comes that wants the image."""
    streams = LateStreams(seed)
    pair = Pair(on_cpu, streams=streams, first_expert_block=1)
    asks = [Ask(pair.load(1)), Ask()]
    expected = pair.eager.route(pair.pixels(2), asks)
    flight = pair.replayed.launch(pair.pixels(2), asks)
    while streams.main.waiting:
        streams.step()
    level = random_selector({"stem:mean_std": 128}, random=torch.Generator().manual_seed(2)).levels[
        0
    ]
    greedy = TaskSelector((replace(level, center=1e6),), threshold=math.inf, alpha=None)
    path = pair.load(2, selector=greedy)
    later = pair.replayed.launch(pair.pixels(2, seed=1), asks)

    assert_same(flight.wait(), expected)
    assert later.wait().paths[1] == path != expected.paths[1]


def test_a_path_that_is_not_loaded_never_reaches_a_device(backbone: Backbone) -> None:
    pair = Pair(backbone)
    path = pair.load(1)
    for wrong in (path + 1, SMALL.paths, -2, -7):
        with pytest.raises(ValueError, match=f"path {wrong} is not loaded"):
            pair.replayed.launch(pair.pixels(2), [Ask(path), Ask(wrong)])
    assert pair.captures.replayed == []
