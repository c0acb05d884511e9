"""Who is on the device when there is room for two: who leaves, who stays, who comes back."""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medley.admission import pack
from medley.backbone import Backbone
from medley.bundle import Bundle
from medley.classifier import Ask, Classifier
from medley.errors import BundleError, CapacityError
from medley.routed import RoutedModel
from service.errors import ConflictError, NotFoundError, UnavailableError
from service.registry.desired import LIVE, Desired, VersionRecord
from service.versions.host_tier import HostTier, Prepared
from service.versions.live import Key, Snapshot
from service.wire.rollout_schemas import Rollout, RolloutRecord
from tests.service.conftest import MakeBundle
from tests.service.residence import PIXELS, Residence, residence, truth

Made = tuple[Bundle, bytes]
A, B, C = ("a", "1"), ("b", "1"), ("c", "1")


@pytest.fixture(scope="module")
def made(make: MakeBundle) -> dict[Key, Made]:
    """Three tasks of different experts, and one (`d`) with those of the first."""
    tasks = {("a", "1"): 0, ("b", "1"): 1, ("c", "1"): 2, ("d", "1"): 0}
    return {key: make(task=key[0], version=key[1], seed=seed) for key, seed in tasks.items()}


@pytest.fixture(scope="module")
def expected(made: dict[Key, Made], backbone: Backbone) -> dict[Key, Tensor]:
    """What each of them makes of PIXELS, by a model that has it alone."""
    return truth(backbone, [bundle for bundle, _ in made.values()])


Story = Callable[[Residence], Awaitable[None]]


@pytest.fixture
def play(tmp_path: Path, backbone: Backbone) -> Callable[..., None]:
    """Run a story on a device with room for two versions, or as it is told."""

    def played(story: Story, **fields: object) -> None:
        async def main() -> None:
            async with residence(tmp_path / "store", backbone, **fields) as here:  # type: ignore[arg-type]
                await story(here)

        asyncio.run(main())

    return played


async def registered(here: Residence, made: dict[Key, Made], *keys: Key) -> None:
    for key in keys:
        await here.register(made[key][1])


def test_the_least_recently_used_leaves_and_comes_back_as_it_was(
    play: Callable[..., None], made: dict[Key, Made], expected: dict[Key, Tensor]
) -> None:
    async def story(here: Residence) -> None:
        await registered(here, made, A, B)
        before = here.residency.live.snapshot.residents[B]
        await here.ask(A)
        await here.register(made[C][1])
        assert here.on_device == {"a@1", "c@1"}
        assert [here.tier(key) for key in (A, B, C)] == ["device", "host", "device"]

        for key in (A, B, C):
            here.store.remove(made[key][0].digest)  # none needs its file now
        for key in (B, A, C, B):
            assert torch.equal(await here.ask(key), expected[key])
        after = here.residency.live.snapshot.residents[B]
        assert torch.equal(after.zero_shot.features_CE, before.zero_shot.features_CE)
        assert after.own.names == before.own.names

    play(story)


def test_without_memory_for_it_a_version_comes_back_from_its_file(
    play: Callable[..., None], made: dict[Key, Made], expected: dict[Key, Tensor]
) -> None:
    async def story(here: Residence) -> None:
        await registered(here, made, A, B, C)
        assert here.tier(A) == "disk"
        for key in (A, B, C):
            assert torch.equal(await here.ask(key), expected[key])

    play(story, max_host_bytes=0)


@pytest.mark.parametrize("how", ["live", "alias", "pin", "rollout"])
def test_what_is_live_named_tried_or_pinned_never_leaves(
    play: Callable[..., None], made: dict[Key, Made], how: str
) -> None:
    async def story(here: Residence) -> None:
        await registered(here, made, A, B)
        here.alias(B)
        if how == "pin":
            here.pin(A)
        elif how == "rollout":
            text = RolloutRecord(id="1", rollout=Rollout(version="1")).model_dump_json()
            here.want(replace(here.desired, rollouts={"a": text}))
        else:
            here.alias(A, LIVE if how == "live" else "canary")
        before = here.residency.live.snapshot
        with pytest.raises(CapacityError, match="all 2 paths are taken"):
            await here.register(made[C][1])
        assert here.residency.live.snapshot is before
        await here.settled()
        assert len(here.model.paths) == 2

        here.pin()
        here.want(replace(here.desired, aliases={}, rollouts={}))
        await here.register(made[C][1])
        assert "c@1" in here.on_device

    play(story)


def test_a_version_that_is_no_more_live_is_as_if_just_used(
    play: Callable[..., None], made: dict[Key, Made]
) -> None:
    async def story(here: Residence) -> None:
        await here.register(made[A][1], live=True)
        await here.register(made[B][1])
        await here.ask(B)
        here.want(replace(here.desired, aliases={}))
        await here.register(made[C][1])
        assert here.on_device == {"a@1", "c@1"}

    play(story)


def test_many_who_want_a_version_at_once_share_one_load(
    play: Callable[..., None], made: dict[Key, Made]
) -> None:
    async def story(here: Residence) -> None:
        await registered(here, made, A, B, C)
        loads = here.metric("medley_bundle_loads_total", result="ok")
        answers = await asyncio.gather(*[here.ask(A) for _ in range(20)])
        assert all(torch.equal(answer, answers[0]) for answer in answers)
        assert here.metric("medley_bundle_loads_total", result="ok") == loads + 1
        assert here.metric("medley_bundle_evictions_total") == 2

    play(story)


def test_who_gives_up_waiting_does_not_stop_the_load_for_the_others(
    play: Callable[..., None], made: dict[Key, Made]
) -> None:
    async def story(here: Residence) -> None:
        await registered(here, made, A, B, C)
        held = threading.Event()
        here.engine.run(held.wait)
        first, second = (asyncio.create_task(here.ask(A)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        held.set()
        await second
        assert first.cancelled()
        assert "a@1" in here.on_device

    play(story)


def test_what_is_held_does_not_leave_though_it_is_the_least_recently_used(
    play: Callable[..., None], made: dict[Key, Made]
) -> None:
    async def story(here: Residence) -> None:
        await registered(here, made, A, B)
        async with here.residency.holding(A):
            await here.ask(B)
            await here.register(made[C][1])
        assert here.on_device == {"a@1", "c@1"}

    play(story)


def test_who_is_asked_for_while_it_is_chosen_to_leave_stays(
    play: Callable[..., None], made: dict[Key, Made]
) -> None:
    async def story(here: Residence) -> None:
        await registered(here, made, A, B, C)
        gate = threading.Event()
        here.engine.run(gate.wait)
        coming = asyncio.create_task(here.residency.bring(A))
        for _ in range(5):  # until it has asked the engine who has to go: B
            await asyncio.sleep(0)
        async with here.residency.holding(B):
            gate.set()
            await coming
            assert here.on_device == {"a@1", "b@1"}

    play(story)


def test_versions_that_push_each_other_out_answer_everybody(
    play: Callable[..., None], made: dict[Key, Made], expected: dict[Key, Tensor]
) -> None:
    async def story(here: Residence) -> None:
        await registered(here, made, A, B, C)
        asked = [A, B, C] * 5
        answers = await asyncio.gather(*[here.ask(key) for key in asked])
        for key, answer in zip(asked, answers, strict=True):
            assert torch.equal(answer, expected[key])

    play(story, paths=1)


def test_what_a_request_uses_is_not_freed_under_it(
    play: Callable[..., None], made: dict[Key, Made], expected: dict[Key, Tensor]
) -> None:
    async def story(here: Residence) -> None:
        await registered(here, made, A, B)
        async with here.residency.lease(A) as snapshot:
            await here.ask(B)
            with pytest.raises(UnavailableError):
                await here.register(made[C][1])
            assert here.on_device == {"b@1"}
            (late,) = here.engine.submit([PIXELS], Ask(snapshot.find(*A).path))
            assert torch.equal((await asyncio.wrap_future(late)).features_E, expected[A])

    play(story, unload_s=0.05)


def test_a_version_waits_for_the_room_that_requests_will_leave(
    play: Callable[..., None], made: dict[Key, Made]
) -> None:
    async def story(here: Residence) -> None:
        await registered(here, made, A, B)
        lease = here.residency.live.lease()
        lease.__enter__()
        asyncio.get_running_loop().call_later(0.05, lease.__exit__, None, None, None)
        await here.register(made[C][1])
        assert here.on_device == {"b@1", "c@1"}

    play(story)


def test_a_request_that_keeps_a_version_for_too_long_is_told_of_by_name(
    play: Callable[..., None], made: dict[Key, Made], caplog: pytest.LogCaptureFixture
) -> None:
    async def story(here: Residence) -> None:
        await registered(here, made, A, B)
        async with here.residency.lease(A, holder="request-7"):
            await here.ask(B)
            with pytest.raises(UnavailableError) as caught:
                await here.register(made[C][1])
            assert caught.value.code == "device_busy"
            assert here.metric("medley_unloads_late_total") == 1
            assert len(here.model.paths) == 2
        await here.register(made[C][1])
        assert here.metric("medley_unloads_late_total") == 1

    with caplog.at_level(logging.WARNING, "service.versions.residency"):
        play(story, unload_s=0.05)
    assert "request-7" in caplog.text


def test_a_damaged_file_fails_its_version_until_it_is_tried_again(
    play: Callable[..., None], made: dict[Key, Made]
) -> None:
    bundle, data = made[A]

    async def story(here: Residence) -> None:
        await registered(here, made, A, B, C)
        here.store.path(bundle.digest).write_bytes(data[:-1])
        for _ in range(2):
            with pytest.raises(UnavailableError) as caught:
                await here.ask(A)
            assert caught.value.code == "version_failed"
        assert "the file ends" in here.residency.live.snapshot.failed[A]
        assert here.on_device == {"b@1", "c@1"}

        here.keep(bundle, data)
        with pytest.raises(UnavailableError):
            await here.residency.bring(A)
        await here.residency.bring(A, again=True)
        assert not here.residency.live.snapshot.failed
        assert "a@1" in here.on_device

    play(story, max_host_bytes=0)


def test_another_bundle_in_a_versions_file_is_not_served(
    play: Callable[..., None], made: dict[Key, Made]
) -> None:
    async def story(here: Residence) -> None:
        await registered(here, made, A, B, C)
        here.store.path(made[A][0].digest).write_bytes(made[B][1])
        with pytest.raises(UnavailableError):
            await here.ask(A)

    play(story, max_host_bytes=0)


def test_who_asks_in_vain_for_room_costs_one_reading_of_the_file(
    play: Callable[..., None], made: dict[Key, Made]
) -> None:
    async def story(here: Residence) -> None:
        for key in (A, B):
            await here.register(made[key][1], live=True)
        here.keep(*made[C])
        here.want(replace(here.desired, versions=(*here.desired.versions, record_of(made[C]))))
        for _ in range(3):
            with pytest.raises(CapacityError):
                await here.residency.bring(C)
        assert here.metric("medley_bundle_load_seconds_count", phase="verify") == 1
        assert here.on_device == {"a@1", "b@1"}

    play(story)


def test_a_version_deleted_while_it_is_brought_leaves_nothing_behind(
    play: Callable[..., None], made: dict[Key, Made]
) -> None:
    async def story(here: Residence) -> None:
        await registered(here, made, A, B, C)
        held = threading.Event()
        here.engine.run(held.wait)
        asking = asyncio.create_task(here.ask(A))
        await asyncio.sleep(0)
        here.delete(A)
        held.set()
        with pytest.raises(NotFoundError) as caught:
            await asking
        assert caught.value.code == "unknown_version"
        await here.settled()
        assert len(here.model.paths) == len(here.on_device) <= 2

    play(story)


def test_a_load_that_nobody_waits_for_any_more_is_undone(
    play: Callable[..., None], made: dict[Key, Made]
) -> None:
    async def story(here: Residence) -> None:
        classifier = Classifier(here.model)
        prepared = await here.residency._loader.prepare(made[A][0])
        assert prepared.size_bytes > pack(made[A][0], classifier).size_bytes
        entered, held = threading.Event(), threading.Event()

        def job() -> None:
            entered.set()
            held.wait()

        here.engine.run(job)
        await asyncio.to_thread(entered.wait)
        loading = asyncio.create_task(here.residency._loader.load(prepared))
        await asyncio.sleep(0)
        loading.cancel()
        held.set()
        with pytest.raises(asyncio.CancelledError):
            await loading
        await here.settled()
        assert not here.model.paths

    play(story)


def test_a_bundle_that_fails_its_self_test_leaves_nothing_behind(
    play: Callable[..., None], made: dict[Key, Made], make: MakeBundle
) -> None:
    async def story(here: Residence) -> None:
        with pytest.raises(BundleError):
            await here.register(make(task="liar", self_test_error=0.01)[1])
        assert not here.model.paths
        assert here.metric("medley_bundle_loads_total", result="refused") == 1

    play(story)


def test_a_self_test_that_fails_in_a_later_batch_leaves_nothing_behind(
    play: Callable[..., None], made: dict[Key, Made]
) -> None:
    bundle = made[A][0]
    logits_NC = bundle.tensors["self_test.logits"].clone()
    logits_NC[1] += 1
    wrong = Bundle(bundle.manifest, {**bundle.tensors, "self_test.logits": logits_NC})

    async def story(here: Residence) -> None:
        with pytest.raises(BundleError, match="logits differ by 1"):
            await here.residency.admit(record_of(made[A]), wrong)
        await here.settled()
        assert not here.model.paths
        await here.register(made[A][1])

    play(story, batch=1)


def test_what_is_admitted_and_not_published_is_forgotten(
    play: Callable[..., None], made: dict[Key, Made]
) -> None:
    async def story(here: Residence) -> None:
        resident = await here.residency.admit(record_of(made[A]), made[A][0])
        here.residency.discard(resident)
        await here.settled()
        assert not here.model.paths
        here.metrics.registry.collect()
        assert here.metric("medley_bundle_bytes", tier="host") == 0

    play(story)


def record_of(made: Made) -> VersionRecord:
    bundle, data = made
    return VersionRecord(
        bundle.manifest.task, bundle.manifest.version, bundle.digest, "2026", len(data)
    )


def test_at_the_start_protected_versions_come_first_and_others_while_there_is_room(
    play: Callable[..., None], made: dict[Key, Made]
) -> None:
    async def story(here: Residence) -> None:
        for one in made.values():
            here.keep(*one)
        versions = tuple(record_of(one) for one in made.values())
        await here.restore(Desired(3, versions=versions, aliases={"c": {LIVE: "1"}}))
        assert here.on_device == {"a@1", "c@1"}
        assert not here.residency.live.snapshot.failed
        assert {here.tier(key) for key in (B, ("d", "1"))} == {"disk"}

    play(story)


def test_at_the_start_a_version_without_room_does_not_keep_a_smaller_one_out(
    play: Callable[..., None], made: dict[Key, Made]
) -> None:
    async def story(here: Residence) -> None:
        for one in made.values():
            here.keep(*one)
        versions = tuple(record_of(one) for one in made.values())
        await here.restore(Desired(1, versions=versions))
        assert here.on_device == {"a@1", "d@1"}  # of the same experts
        assert not here.residency.live.snapshot.failed

    play(story, paths=8, slots=3)


def test_a_protected_version_without_room_at_the_start_is_told_as_failed(
    play: Callable[..., None], made: dict[Key, Made]
) -> None:
    async def story(here: Residence) -> None:
        for key in (A, B, C):
            here.keep(*made[key])
        versions = tuple(record_of(made[key]) for key in (A, B, C))
        live = {key[0]: {LIVE: key[1]} for key in (A, B, C)}
        await here.restore(Desired(1, versions=versions, aliases=live))
        assert here.residency.live.snapshot.failed == {C: "all 2 paths are taken"}

    play(story)


def test_versions_that_share_experts_share_slots_and_who_does_not_help_stays(
    play: Callable[..., None], made: dict[Key, Made]
) -> None:
    d = ("d", "1")

    async def story(here: Residence) -> None:
        await registered(here, made, A, d)
        assert here.metric("medley_bundle_slots", state="free") == 3
        await here.register(made[B][1])
        assert here.on_device == {"a@1", "b@1", "d@1"}
        here.pin(A)
        await here.register(made[C][1])  # d is the oldest, and without it nothing is gained
        assert here.on_device == {"a@1", "c@1", "d@1"}
        assert here.metric("medley_bundle_slots", state="free") == 0

    play(story, paths=8, slots=6)


def test_a_version_is_taken_off_on_demand_unless_it_has_to_stay(
    play: Callable[..., None], made: dict[Key, Made], expected: dict[Key, Tensor]
) -> None:
    async def story(here: Residence) -> None:
        await registered(here, made, A, B)
        here.alias(A)
        with pytest.raises(ConflictError):
            here.residency.unload(A)
        here.residency.unload(B)
        here.residency.unload(B)
        await here.settled()
        assert (here.on_device, len(here.model.paths)) == ({"a@1"}, 1)
        with pytest.raises(NotFoundError):
            here.residency.unload(C)
        assert torch.equal(await here.ask(B), expected[B])

    play(story)


def test_metrics_say_what_is_where(play: Callable[..., None], made: dict[Key, Made]) -> None:
    async def story(here: Residence) -> None:
        await registered(here, made, A, B, C)
        here.pin(B)
        here.metrics.registry.collect()
        seen = {
            tuple(sample.labels[name] for name in ("task", "tier", "pinned"))
            for family in here.metrics.registry.collect()
            for sample in family.samples
            if sample.name == "medley_bundle_resident"
        }
        assert seen == {("a", "host", "false"), ("b", "device", "true"), ("c", "device", "false")}
        files = sum(len(made[key][1]) for key in (A, B, C))
        assert here.metric("medley_bundle_bytes", tier="disk") == files
        host, device = (here.metric("medley_bundle_bytes", tier=t) for t in ("host", "device"))
        assert host > device > 0
        for phase in ("verify", "pack", "encode", "admit"):
            assert here.metric("medley_bundle_load_seconds_count", phase=phase) == 3 * (
                phase != "verify"
            )
        assert here.metric("medley_bundle_age_at_eviction_seconds_count") == 1

    play(story)


def test_the_host_tier_lets_go_of_what_is_on_the_device_first(
    made: dict[Key, Made], backbone: Backbone
) -> None:
    classifier = Classifier(RoutedModel(backbone))
    ready = {
        name: Prepared(pack(made[name, "1"][0], classifier), torch.zeros(3, 24)) for name in "abc"
    }
    tier = HostTier(2 * ready["a"].size_bytes)
    tier.put("a", ready["a"], on_device=())
    tier.put("b", ready["b"], on_device={"b"})
    tier.put("c", ready["c"], on_device={"b"})

    assert tier.digests == {"a", "c"}
    assert tier.get("a") is ready["a"]
    tier.put("b", ready["b"], on_device=())
    assert tier.digests == {"a", "b"}
    tier.drop("a")
    assert tier.digests == {"b"}
    assert tier.size_bytes == ready["b"].size_bytes


KEYS = [(name, "1") for name in "abcd"]
VERBS = ("register", "ask", "ask", "pin", "unpin", "live", "delete", "hold", "free")
STEPS = st.lists(st.tuples(st.sampled_from(VERBS), st.sampled_from(KEYS)), max_size=14)


class Visit:
    """Somebody who does as told, one step after the other, and keeps leases."""

    def __init__(self, here: Residence, made: dict[Key, Made], expected: dict[Key, Tensor]) -> None:
        self.here = here
        self.made = made
        self.expected = expected
        self.held = ExitStack()
        self.leases: list[tuple[Key, Snapshot]] = []

    async def do(self, verb: str, key: Key) -> None:
        here, known = self.here, key in self.here.desired.records
        if verb == "register" and not known:
            await here.register(self.made[key][1])
        elif verb == "unpin":
            here.pin()
        elif verb == "free":
            self.held.close()
            self.leases.clear()
        elif verb == "delete" and known:
            here.delete(key)
        elif known:
            await self.use(verb, key)

    async def use(self, verb: str, key: Key) -> None:
        async with self.here.residency.holding(key):
            if verb == "pin":
                self.here.pin(key)
            elif verb == "live":
                self.here.alias(key)
            elif verb == "hold":
                snapshot = self.held.enter_context(self.here.residency.live.lease())
                self.leases.append((key, snapshot))
        if verb == "ask":
            assert torch.equal(await self.here.ask(key), self.expected[key])

    async def check(self) -> None:
        """Nobody is missing who must be there, and every lease still gets its answer."""
        here = self.here
        kept = here.desired.pinned | set(here.desired.live.items())
        assert kept <= here.residency.live.snapshot.residents.keys()
        assert len(here.model.paths) <= 2
        for key, snapshot in self.leases:
            (late,) = here.engine.submit([PIXELS], Ask(snapshot.residents[key].path))
            answer = await asyncio.wrap_future(late)
            assert torch.equal(answer.features_E, self.expected[key])


@settings(max_examples=40, deadline=None)
@given(steps=STEPS, slots=st.sampled_from([6, 64]), host=st.sampled_from([0, 2**30]))
def test_whatever_comes_and_goes_answers_are_right_and_no_slot_is_lost(
    made: dict[Key, Made],
    expected: dict[Key, Tensor],
    backbone: Backbone,
    steps: list[tuple[str, Key]],
    slots: int,
    host: int,
) -> None:
    async def story(folder: Path) -> None:
        async with residence(
            folder, backbone, slots=slots, max_host_bytes=host, unload_s=0.01
        ) as here:
            visit, refused = Visit(here, made, expected), set()
            for verb, key in steps:
                try:
                    await visit.do(verb, key)
                except (CapacityError, UnavailableError) as error:
                    refused.add(error.code)
                await visit.check()
            assert refused <= {"no_slot", "device_busy"}
            visit.held.close()
            for key in list(here.desired.records):
                here.delete(key)
            await here.settled()
            assert not here.model.paths
            assert here.model.free_slots == slots

    with TemporaryDirectory() as folder:
        asyncio.run(story(Path(folder) / "store"))
