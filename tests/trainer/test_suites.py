"""Suites: orders by name or list, and one line for every mistake."""

import pytest

from medley.errors import DataError
from trainer.datasets import ImageSet, PixelPicture, Split
from trainer.mtil.words import class_entries
from trainer.suites import Suite, open_suite, shared_names

NAMES = {
    "pets": ("Cat", "dog"),
    "farm": ("cow", "cat"),
    "stars": ("sun",),
}


def load(task: str, split: Split) -> ImageSet:
    return ImageSet(f"{task} {split}", NAMES[task], ("a {}",), list[tuple[PixelPicture, int]]())


def suite(*, tasks: tuple[str, ...] = tuple(NAMES), **orders: tuple[str, ...]) -> Suite:
    return Suite(name="made", tasks=tasks, orders={"I": tasks, **orders}, loader=load)


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("I", ("pets", "farm", "stars")),
        ("short", ("stars", "pets")),
        ("farm,pets", ("farm", "pets")),
        (" stars , farm", ("stars", "farm")),
        ("stars", ("stars",)),
    ],
)
def test_an_order_is_named_or_listed(text: str, order: tuple[str, ...]) -> None:
    assert suite(short=("stars", "pets")).order(text) == order


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("III", "no order and no task 'III'; orders: I; tasks: pets, farm, stars"),
        ("pets,wolves,farm", "no task 'wolves'"),
        ("", "no task ''"),
        ("pets,", "no task ''"),
        ("pets,farm,pets", "pets twice in one order"),
    ],
)
def test_a_bad_order_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        suite().order(text)
    assert "\n" not in str(caught.value)


def test_two_tasks_with_one_name_are_refused() -> None:
    with pytest.raises(DataError, match="two tasks are called pets"):
        suite(tasks=("pets", "farm", "pets"))


def test_a_named_order_may_not_repeat_a_task() -> None:
    with pytest.raises(DataError, match="farm twice"):
        suite(wrong=("farm", "farm"))


def test_an_unknown_task_is_not_loaded() -> None:
    assert suite().load("farm", "test").class_names == ("cow", "cat")
    with pytest.raises(DataError, match="no task 'wolves'"):
        suite().load("wolves", "test")


def test_names_that_tasks_share_are_listed_whatever_their_case() -> None:
    assert suite().shared_names() == {"cat": ("pets", "farm")}


def test_the_small_suite_shares_no_name_and_goes_both_ways() -> None:
    small = open_suite("small")
    assert small.order("II") == small.order("I")[::-1]
    assert small.order("smoke") == ("animals", "flags", "letters")


def test_mtil_data_sets_share_names() -> None:
    tasks = open_suite("mtil").tasks
    shared = shared_names({task: [e.name for e in class_entries(task)] for task in tasks})
    assert shared["beaver"] == ("caltech101", "cifar100")
    assert shared["lotus"] == ("caltech101", "flowers")
    assert shared["forest"] == ("cifar100", "eurosat")


def test_mtil_without_a_root_can_be_named_but_not_loaded() -> None:
    mtil = open_suite("mtil")
    assert mtil.order("X-TAIL") == tuple(task for task in mtil.tasks if task != "cifar100")
    with pytest.raises(DataError, match="give their folder with --root"):
        mtil.load("dtd", "test")


def test_an_unknown_suite_is_refused() -> None:
    with pytest.raises(DataError, match="no suite 'imagenet'; there are small, mtil"):
        open_suite("imagenet")
