"""The document: what changes make of it against a plain model, and how it is written down."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings

from medley.errors import MedleyError
from service.errors import RegistryError
from service.registry.document import State
from tests.service.stories import STORIES, Memory, Model, Told, apply, record


@settings(max_examples=150, deadline=None)
@given(story=STORIES)
def test_any_story_leaves_what_a_plain_model_says(story: list[Told]) -> None:
    memory, model = Memory(), Model()
    for change in story:
        before = memory.state
        if model.allows(*change):
            so_already = model.is_so_already(*change)
            apply(memory, change)
            model.apply(*change)
            assert (memory.state is before) == so_already
        else:
            with pytest.raises(MedleyError):
                apply(memory, change)
            assert memory.state is before
    here = memory.read()

    assert here.generation == model.generation
    assert {task: [r.version for r in of] for task, of in here.tasks.items()} == model.versions
    assert here.aliases == model.aliases()
    assert here.previous == {t: stack[-2] for t, stack in model.stacks.items() if len(stack) > 1}
    assert here.pinned == frozenset(model.pinned)
    assert here.rollouts == model.rollouts
    assert here.changed == model.changed


@settings(max_examples=50, deadline=None)
@given(story=STORIES)
def test_a_state_is_the_same_after_it_was_written_and_read(story: list[Told]) -> None:
    memory = Memory()
    memory.state = State(store="a store", backbone="sha256:ab")
    for change in story:
        try:
            apply(memory, change)
        except MedleyError:
            continue

    again = State.from_json(memory.state.to_json())

    assert again == memory.state
    assert again.desired() == memory.read()


def test_every_state_has_an_id_of_its_own_and_knows_those_before_it() -> None:
    memory = Memory()
    ids = [apply(memory, (name, "a", "1")).id for name in ("register", "pin", "unpin")]

    assert len(set(ids)) == 3
    assert memory.state.ids == tuple(reversed(ids))
    for _ in range(100):
        apply(memory, ("rollout", "a", "1"))
    assert len(memory.state.ids) == 32


def test_a_state_of_a_newer_medley_is_refused_in_one_line() -> None:
    document = json.loads(State().to_json()) | {"format": 3, "what": "else"}

    with pytest.raises(RegistryError, match="newer Medley: its format is 3") as caught:
        State.from_json(json.dumps(document))
    assert caught.value.code == "registry_foreign"
    assert "\n" not in str(caught.value)


def test_a_state_of_before_unified_models_is_read_and_is_written_so_that_it_can_still_be() -> None:
    memory = Memory()
    apply(memory, ("register", "a", "1"))
    document = json.loads(memory.state.to_json())
    (written,) = document["state"]["tasks"]["a"]["versions"]
    assert document["format"] == 1  # an older replica beside this one goes on
    del written["method"], written["unified"]

    (read,) = State.from_json(json.dumps(document)).desired().versions

    assert read == record("a", "1")
    assert (read.method, read.files) == ("moe_adapter", (read.digest,))


def test_a_state_with_a_unified_model_is_one_that_an_older_medley_refuses() -> None:
    memory = Memory()
    fused = replace(record("a", "1"), method="lora", unified="sha256:u")
    memory.register(fused, activate=True)
    apply(memory, ("register", "b", "1"))

    text = memory.state.to_json()

    assert json.loads(text)["format"] == 2
    assert State.from_json(text).desired().files == {fused.digest, "sha256:u", "sha256:b1"}
    memory.delete_task("a")
    assert json.loads(memory.state.to_json())["format"] == 1


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "null", "[]", "7", "{}", '{"format": 1}', '{"format": "x", "state": {}}'),
        *('{"format": 1, "state": {"generation": "many"}}', '{"state": {"tasks": {}}}'),
        *('{"format": 1, "state": {"tasks": [1]}}', b"\xff\xfe", "\udcff", "9" * 5000, "[" * 5000),
    ],
)
def test_what_is_no_state_is_refused_in_one_line(text: str | bytes) -> None:
    with pytest.raises(RegistryError, match="no state of one") as caught:
        State.from_json(text)
    assert caught.value.code == "registry_damaged"
    assert "\n" not in str(caught.value)
