"""Snapshots and leases: who sees what, and when a path may leave."""

from contextlib import suppress

import pytest
import torch

from service.errors import NotFoundError, UnavailableError
from service.registry.desired import Desired, VersionRecord
from service.versions.live import LabelSet, Live, Resident, Snapshot


def resident(task: str, version: str, path: int, names: tuple[str, ...] = ("x",)) -> Resident:
    label_set = LabelSet("task", names, torch.full((len(names), 2), float(path)))
    record = VersionRecord(task, version, f"sha256:{path}", "2026")
    return Resident(record, path, ("a {}",), label_set, label_set, threshold=0.0)


def snapshot(*residents: Resident, live: dict[str, str]) -> Snapshot:
    aliases = {task: {"live": version} for task, version in live.items()}
    desired = Desired(1, "", tuple(r.record for r in residents), aliases)
    return Snapshot(desired, {(r.record.task, r.record.version): r for r in residents})


def test_a_path_leaves_only_when_the_last_lease_on_it_ends() -> None:
    gone: list[int] = []
    live = Live(unload=gone.append)
    live.publish(snapshot(resident("a", "1", 0), live={"a": "1"}))

    with live.lease() as first:
        with live.lease() as second:
            live.publish(snapshot(live={}))
            assert first.live["a"].path == second.live["a"].path == 0
        assert gone == []
    assert gone == [0]


def test_a_lease_taken_after_the_flip_does_not_hold_what_left_before() -> None:
    gone: list[int] = []
    live = Live(unload=gone.append)
    live.publish(snapshot(resident("a", "1", 0), live={"a": "1"}))
    before = live.lease()
    before.__enter__()
    live.publish(snapshot(resident("a", "2", 1), live={"a": "2"}))
    after = live.lease()
    after.__enter__()
    live.publish(snapshot(live={}))

    before.__exit__(None, None, None)
    assert gone == [0]
    after.__exit__(None, None, None)
    assert gone == [0, 1]


def test_a_lease_ends_when_its_request_fails() -> None:
    gone: list[int] = []
    live = Live(unload=gone.append)
    live.publish(snapshot(resident("a", "1", 0), live={"a": "1"}))

    with suppress(RuntimeError), live.lease():
        live.publish(snapshot(live={}))
        raise RuntimeError

    assert gone == [0]


def test_a_path_without_leases_leaves_at_once() -> None:
    gone: list[int] = []
    live = Live(unload=gone.append)
    live.publish(snapshot(resident("a", "1", 3), live={"a": "1"}))
    live.publish(snapshot(live={}))

    assert gone == [3]


def test_the_union_has_each_name_once_from_the_first_task() -> None:
    shot = snapshot(
        resident("b", "1", 1, ("Cat", "dog")),
        resident("a", "1", 2, ("cat", "owl")),
        resident("c", "1", 3, ("hidden",)),
        live={"a": "1", "b": "1"},
    )

    assert shot.union is not None
    assert shot.union.names == ("cat", "owl", "dog")
    assert shot.union.features_CE[:, 0].tolist() == [2, 2, 1]
    assert shot.eligible == {1, 2}


def test_without_live_tasks_there_is_no_union() -> None:
    assert snapshot(resident("a", "1", 0), live={}).union is None


def test_who_keeps_a_path_from_leaving_is_known_by_name() -> None:
    live = Live(unload=lambda path: None)
    live.publish(snapshot(resident("a", "1", 0), live={"a": "1"}))

    with live.lease("first"), live.lease("second"):
        (leaving,) = live.publish(snapshot(live={}))
        with live.lease("third"):
            assert live.holders(leaving) == ["first", "second"]
    assert live.leaving == ()


def test_a_model_means_a_version_by_its_number_an_alias_or_being_live() -> None:
    one, two = resident("a", "1", 0), resident("a", "2", 1)
    aliases = {"a": {"live": "1", "canary": "2"}}
    shot = Snapshot(Desired(1, "", (one.record, two.record), aliases), {("a", "1"): one})

    assert [shot.key_of(model) for model in ("auto", "base")] == [None, None]
    assert shot.key_of("a") == shot.key_of("a@live") == shot.key_of("a@1") == ("a", "1")
    assert shot.key_of("a@canary") == shot.key_of("a@2") == ("a", "2")
    for model in ("a@", "a@3", "a@1@2", "b", "b@live", "", "@"):
        with pytest.raises(NotFoundError):
            shot.key_of(model)


def test_a_version_is_on_the_device_in_memory_or_on_the_disk() -> None:
    one, two, three = (resident("a", v, int(v)) for v in "123")
    desired = Desired(1, "", (one.record, two.record, three.record))
    shot = Snapshot(desired, {("a", "1"): one}, hosted=frozenset({one.record.digest, "sha256:2"}))

    assert [shot.tier(("a", v)) for v in "123"] == ["device", "host", "disk"]


def test_find_tells_what_is_missing() -> None:
    shot = snapshot(resident("a", "1", 0), live={})
    broken = Snapshot(shot.desired, {}, {("a", "1"): "damaged"})

    assert shot.find("a", "1").path == 0
    for task, version, code in (
        ("b", None, "unknown_task"),
        ("a", None, "no_live_version"),
        ("a", "2", "unknown_version"),
    ):
        with pytest.raises(NotFoundError) as caught:
            shot.find(task, version)
        assert caught.value.code == code
    with pytest.raises(UnavailableError) as failed:
        broken.find("a", "1")
    with pytest.raises(UnavailableError) as evicted:
        Snapshot(shot.desired).find("a", "1")
    assert (failed.value.code, evicted.value.code) == ("version_failed", "version_unloaded")
