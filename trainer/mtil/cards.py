"""The eleven data sets of MTIL (ZSCL, arXiv:2303.06628): where each lies and what it must hold."""

from __future__ import annotations

from trainer.cards import Card

__all__ = ["CARDS", "FOLDERS", "ORDERS", "TASKS"]

_OFFICIAL = "official"
_SEEDED = "random 80/20, seed 42"


def _card(
    task: str,
    classes: int,
    train: int,
    test: int,
    *,
    source: str,
    licence: str,
    split: str = _OFFICIAL,
) -> Card:
    return Card(
        task=task,
        classes=classes,
        images={"train": train, "test": test},
        licence=licence,
        source=source,
        split=split,
    )


CARDS = {
    card.task: card
    for card in (
        _card(
            *("aircraft", 100, 3_334, 3_333),
            source="FGVC-Aircraft 2013b, Visual Geometry Group, Oxford",
            licence="non-commercial research",
            split="official train and test, val unused",
        ),
        _card(
            *("caltech101", 101, 6_941, 1_736),
            source="Caltech 101, CaltechDATA",
            licence="CC-BY-4.0",
            split=_SEEDED,
        ),
        _card(
            *("cifar100", 100, 50_000, 10_000),
            source="CIFAR-100 (python version), University of Toronto",
            licence="none stated",
        ),
        _card(
            *("dtd", 47, 1_880, 1_880),
            source="Describable Textures r1.0.1, Visual Geometry Group, Oxford",
            licence="research",
            split="official train1 and test1, val1 unused",
        ),
        _card(
            *("eurosat", 10, 21_600, 5_400),
            source="EuroSAT (RGB), DFKI",
            licence="MIT",
            split=_SEEDED,
        ),
        _card(
            *("flowers", 102, 1_020, 6_149),
            source="102 Category Flowers, Visual Geometry Group, Oxford",
            licence="none stated",
            split="official trnid and tstid, valid unused",
        ),
        _card(
            *("food", 101, 75_750, 25_250),
            source="Food-101, ETH Zurich",
            licence="research; pictures by users of Foodspotting",
        ),
        _card(
            *("mnist", 10, 60_000, 10_000),
            source="MNIST, LeCun, Cortes and Burges",
            licence="CC-BY-SA-3.0",
        ),
        _card(
            *("pets", 37, 3_680, 3_669),
            source="Oxford-IIIT Pet, Visual Geometry Group, Oxford",
            licence="CC-BY-SA-4.0",
            split="official trainval and test",
        ),
        _card(
            *("cars", 196, 8_144, 8_041),
            source="Stanford Cars; the first home is gone, mirrors carry it",
            licence="non-commercial research",
        ),
        _card(
            *("sun397", 397, 87_003, 21_751),
            source="SUN397, Princeton Vision",
            licence="none stated",
            split=_SEEDED,
        ),
    )
}
TASKS = tuple(CARDS)
ORDERS = {
    "I": TASKS,
    "II": (
        *("cars", "food", "mnist", "pets", "flowers", "sun397"),
        *("aircraft", "caltech101", "dtd", "eurosat", "cifar100"),
    ),
    "X-TAIL": tuple(task for task in TASKS if task != "cifar100"),  # RAIL, arXiv:2406.18868
}
FOLDERS = {
    "aircraft": "fgvc-aircraft-2013b/data",
    "caltech101": "caltech101/101_ObjectCategories",
    "cifar100": "cifar-100-python",
    "dtd": "dtd/dtd",
    "eurosat": "eurosat/2750",
    "flowers": "flowers-102",
    "food": "food-101",
    "mnist": "MNIST/raw",
    "pets": "oxford-iiit-pet",
    "cars": "stanford_cars",
    "sun397": "SUN397",
}
