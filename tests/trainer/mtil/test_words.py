"""Class names, prompts, counts and orders of MTIL are those of the reference code."""

import pytest

from trainer.datasets import ImageSet, PixelPicture, normalised
from trainer.mtil import CARDS, ORDERS, TASKS
from trainer.mtil.cards import FOLDERS
from trainer.mtil.layouts import LAYOUTS, SPLIT_BY_US, TRAIN_SHARE
from trainer.mtil.orders import CIFAR100, TINY_IMAGENET
from trainer.mtil.words import TEMPLATES, class_entries

NUM_TEMPLATES = {
    "aircraft": 2,
    "caltech101": 34,
    "cifar100": 18,
    "dtd": 8,
    "eurosat": 3,
    "flowers": 1,
    "food": 1,
    "mnist": 1,
    "pets": 1,
    "cars": 9,
    "sun397": 2,
}


def test_there_are_1201_classes() -> None:
    assert sum(card.classes for card in CARDS.values()) == 1201


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_its_classes_and_prompts(task: str) -> None:
    entries = class_entries(task)
    assert len(entries) == len({entry.key for entry in entries}) == CARDS[task].classes
    assert len({normalised(entry.name) for entry in entries}) == len(entries)
    assert len(set(TEMPLATES[task])) == len(TEMPLATES[task]) == NUM_TEMPLATES[task]
    assert all(entry.name == entry.name.strip() and "  " not in entry.name for entry in entries)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_accepted_by_an_image_set(task: str) -> None:
    names = tuple(entry.name for entry in class_entries(task))
    assert not len(ImageSet(task, names, TEMPLATES[task], list[tuple[PixelPicture, int]]()))


@pytest.mark.parametrize("task", sorted(SPLIT_BY_US))
def test_images_of_the_classes_add_up_to_both_parts(task: str) -> None:
    images = CARDS[task].images
    total = sum(entry.images or 0 for entry in class_entries(task))
    assert total == images["train"] + images["test"]
    assert int(TRAIN_SHARE * total) == images["train"]
    assert min(entry.images or 0 for entry in class_entries(task)) > 0


def test_every_task_has_a_folder_and_a_layout() -> None:
    assert set(FOLDERS) == set(LAYOUTS) == set(TEMPLATES) == set(TASKS)


def test_the_orders_are_the_published_ones() -> None:
    assert [TASKS.index(task) for task in ORDERS["II"]] == [9, 6, 7, 8, 5, 10, 0, 1, 3, 4, 2]
    assert ORDERS["I"] == TASKS
    assert len(ORDERS["X-TAIL"]) == 10


def test_class_orders_are_permutations() -> None:
    assert sorted(CIFAR100) == list(range(100))
    assert sorted(TINY_IMAGENET) == list(range(200))
