"""The queue's laws, for any order of coming, taking, leaving and waiting too long."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.answers.queue import FairQueue

LIMIT = 16  # and the last 2 places are for lanes that have nothing waiting
LANES = "abc"


@dataclass(frozen=True, eq=False)
class Item:
    lane: str = ""
    submitted_s: float = 0.0
    deadline_s: float = float("inf")
    future: Future[None] = field(default_factory=Future)


class History:
    """A queue and all that ever happened to it; a second is a step of `now_s`."""

    def __init__(self) -> None:
        self.queue: FairQueue[Item] = FairQueue(LIMIT)
        self.now_s = 0
        self.came: list[Item] = []
        self.taken: list[Item] = []
        self.gone: list[Item] = []
        self.late: list[Item] = []

    @property
    def waiting(self) -> list[Item]:
        """What must wait now, by what happened; oldest first."""
        out = {*self.taken, *self.gone, *self.late}
        return [item for item in self.came if item not in out]

    def waiting_in(self, lane: str) -> list[Item]:
        return [item for item in self.waiting if item.lane == lane]

    def put(self, lane: str, count: int, patience_s: float) -> bool:
        self.expire()
        end_s = self.now_s + patience_s
        items = [Item(lane, self.now_s, end_s) for _ in range(count)]
        if not self.queue.put(items):
            return False
        self.came += items
        return True

    def take(self) -> Item | None:
        self.expire()
        item = self.queue.pop()
        self.taken += [item] if item else []
        return item

    def leave(self, place: int) -> None:
        if waiting := self.waiting:
            item = waiting[place % len(waiting)]
            assert self.queue.remove(item.future) is item
            self.gone.append(item)

    def tick(self, seconds: int) -> None:
        self.now_s += seconds

    def expire(self) -> None:
        self.late += self.queue.expire(self.now_s)


Step = Callable[[History], object]


def steps() -> st.SearchStrategy[list[Step]]:
    puts = st.builds(
        lambda lane, count, patience_s: lambda h: h.put(lane, count, patience_s),
        st.sampled_from(LANES),
        st.integers(0, 7),
        st.sampled_from([0, 2, 5, float("inf"), float("inf")]),
    )
    takes = st.just(History.take)
    leaves = st.integers(0, LIMIT).map(lambda place: lambda h: h.leave(place))
    ticks = st.integers(1, 3).map(lambda seconds: lambda h: h.tick(seconds))
    return st.lists(st.one_of(puts, puts, takes, takes, leaves, ticks), max_size=60)


def histories(played: Sequence[Step]) -> Iterator[History]:
    """The history after each step, in which all deadlines that have passed are known."""
    history = History()
    for step in played:
        step(history)
        history.expire()
        yield history


@settings(deadline=None)
@given(steps())
def test_what_waits_is_what_came_and_has_not_gone(played: list[Step]) -> None:
    for history in histories(played):
        waiting = history.waiting
        assert len(history.queue) == len(waiting)
        assert history.queue.oldest_s == min(
            (item.submitted_s for item in waiting), default=float("inf")
        )


@settings(deadline=None)
@given(steps())
def test_everything_leaves_once_and_by_one_door(played: list[Step]) -> None:
    *_, history = [History(), *histories(played)]
    while history.take():
        pass

    out = history.taken + history.gone + history.late
    assert len(set(out)) == len(out)
    assert set(out) == set(history.came)
    assert not history.queue


@settings(deadline=None)
@given(steps())
def test_the_bound_is_never_exceeded(played: list[Step]) -> None:
    assert all(len(history.queue) <= LIMIT for history in histories(played))


@settings(deadline=None)
@given(steps())
def test_nothing_waits_beyond_its_deadline_and_nothing_leaves_before_it(played: list[Step]) -> None:
    for history in histories(played):
        assert all(item.deadline_s > history.now_s for item in history.waiting)
        assert all(item.deadline_s <= history.now_s for item in history.late)
        assert all(item.deadline_s >= history.queue.expiry_s for item in history.waiting)


@settings(deadline=None)
@given(steps())
def test_within_a_lane_the_oldest_is_taken_first(played: list[Step]) -> None:
    *_, history = [History(), *histories(played)]

    place = {item: n for n, item in enumerate(history.came)}
    for lane in LANES:
        taken = [place[item] for item in history.taken if item.lane == lane]
        assert taken == sorted(taken)


@settings(deadline=None)
@given(steps(), st.permutations(LANES))
def test_lanes_that_both_wait_are_served_alike(played: list[Step], crowd: Sequence[str]) -> None:
    """Over any window in which both wait all the time, their numbers differ by at most one."""
    ends = [lambda h, lane=lane: h.put(lane, 4, float("inf")) for lane in crowd]
    lead = {pair: [0] for pair in combinations(LANES, 2)}  # of its first lane, since both wait
    taken = 0
    for history in histories([*played, *ends, *[History.take] * LIMIT]):
        lanes = {item.lane for item in history.waiting}
        turns = [item.lane for item in history.taken[taken:]]
        taken = len(history.taken)
        for (one, other), leads in lead.items():
            leads += [leads[-1] + (lane == one) - (lane == other) for lane in turns]
            assert max(leads) - min(leads) <= 1
            if not {one, other} <= lanes:
                leads[:] = [0]


@settings(deadline=None)
@given(steps(), st.sampled_from(LANES), st.integers(1, LIMIT))
def test_there_is_room_up_to_the_limit_but_its_last_eighth_is_for_newcomers(
    played: list[Step], lane: str, count: int
) -> None:
    *_, history = [History(), *histories(played)]
    room = LIMIT - len(history.queue) - (2 if history.waiting_in(lane) else 0)

    before = len(history.queue)
    assert history.put(lane, count, float("inf")) == (count <= room)
    assert len(history.queue) == before + (count if count <= room else 0)


def test_one_busy_lane_leaves_room_for_another() -> None:
    history = History()
    while history.put("busy", 1, float("inf")):
        pass

    assert len(history.queue) == 14
    assert history.put("other", 2, float("inf"))


def test_a_lane_that_was_away_takes_its_turn_after_those_that_wait() -> None:
    history = History()
    history.put("a", 1, float("inf"))
    history.put("b", 2, float("inf"))
    history.take()
    history.put("c", 1, float("inf"))
    history.put("a", 1, float("inf"))
    while history.take():
        pass

    assert [item.lane for item in history.taken] == ["a", "b", "c", "a", "b"]


@pytest.mark.parametrize("limit", [1, 7])
def test_a_small_queue_keeps_nothing_back(limit: int) -> None:
    queue: FairQueue[Item] = FairQueue(limit)

    assert all(queue.put([Item()]) for _ in range(limit))
    assert not queue.put([Item()])


def test_a_stranger_is_not_removed_and_an_empty_queue_gives_nothing() -> None:
    queue: FairQueue[Item] = FairQueue(LIMIT)

    assert queue.remove(Future()) is None
    assert queue.pop() is None
    assert queue.put([])


def test_deadlines_are_looked_at_only_when_one_has_passed() -> None:
    queue: FairQueue[Item] = FairQueue(LIMIT)
    assert queue.expiry_s == float("inf")
    queue.put([Item(deadline_s=3.0), Item(deadline_s=2.0)])
    assert queue.expiry_s == 2.0
    assert queue.expire(1.9) == []
    (late,) = queue.expire(2.0)
    assert late.deadline_s == 2.0
    assert queue.expiry_s == 3.0
