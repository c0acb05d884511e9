"""Task `flags`: which country's flag? Training and test flags are drawn by different people.

Fine-grained and close to arbitrary: hardly any base knows a hundred flags, and each can learn them.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.datasets import ImageSet, PixelPicture
from trainer.suite.drawing import Pixels, jitter, pick_colour
from trainer.suite.icons import IconSet

__all__ = [
    "SOURCES",
    "TEMPLATES",
    "TEST_STYLES",
    "TRAIN_STYLES",
    "Country",
    "Style",
    "build",
    "countries",
    "drawings",
    "photographed",
]

SOURCES = (
    "emojibase",
    "flag",
    "flagpack",
    "emojione",
    "twemoji",
    "circle-flags",
    "cif",
    "openmoji",
)
TEMPLATES = ("the flag of {}", "a picture of the flag of {}")
NUM_COUNTRIES = 100
TRAIN_COPIES = 3
TEST_COPIES = 2
# Seen on a contact sheet: signs of the languages Arabic, Interlingue and Latin under a country's
# code, and the flag of Equatorial Guinea under Guinea's.
WRONG = frozenset(
    {("circle-flags", "ar"), ("circle-flags", "ie"), ("circle-flags", "la"), ("cif", "gn")}
)

_REGIONAL_A = 0x1F1E6


@dataclass(frozen=True)
class Country:
    """A country as the emoji standard names it."""

    iso: str
    name: str

    @property
    def slug(self) -> str:
        """Its name as emoji sets spell it: lower case, ASCII, hyphens."""
        plain = unicodedata.normalize("NFKD", self.name).encode("ascii", "ignore").decode()
        return re.sub(r"[^a-z]+", "-", plain.lower().replace("&", "and")).strip("-")


Style = tuple[str, Callable[[Country], tuple[str, ...]]]
TRAIN_STYLES: tuple[Style, ...] = (
    ("flag", lambda country: (f"{country.iso}-4x3",)),
    ("flag", lambda country: (f"{country.iso}-1x1",)),
    ("flagpack", lambda country: ("gb-ukm" if country.iso == "gb" else country.iso,)),
    ("emojione", lambda country: (f"flag-for-{country.slug}", f"flag-for-flag-{country.slug}")),
    ("twemoji", lambda country: (f"flag-{country.slug}", f"flag-for-flag-{country.slug}")),
)
TEST_STYLES: tuple[Style, ...] = (
    ("circle-flags", lambda country: (country.iso,)),
    ("cif", lambda country: (country.iso,)),
    ("openmoji", lambda country: (f"flag-{country.slug}", f"flag-for-flag-{country.slug}")),
)


def build(emojibase: Path, *sets: Path) -> tuple[ImageSet, ImageSet]:
    """Training and test flags from the folders of `SOURCES`, in that order."""
    icons = {name: IconSet(folder) for name, folder in zip(SOURCES[1:], sets, strict=True)}
    chosen = _drawn_everywhere(countries(emojibase), icons)
    generator = np.random.default_rng(1)
    names = tuple(country.name for country in chosen)
    train, test = (
        ImageSet(
            "flags", names, TEMPLATES, tuple(_pictures(chosen, icons, styles, copies, generator))
        )
        for styles, copies in ((TRAIN_STYLES, TRAIN_COPIES), (TEST_STYLES, TEST_COPIES))
    )
    return train, test


def countries(emojibase: Path) -> list[Country]:
    """All countries that have a flag emoji, sorted by ISO code."""
    emoji = json.loads((emojibase / "en" / "data.json").read_text(encoding="utf-8"))
    found = []
    for entry in emoji:
        letters = [int(code, 16) - _REGIONAL_A for code in entry["hexcode"].split("-")]
        if len(letters) == 2 and all(0 <= letter < 26 for letter in letters):
            iso = "".join(chr(ord("a") + letter) for letter in letters)
            found.append(Country(iso, entry["label"].removeprefix("flag: ")))
    return sorted(found, key=lambda country: country.iso)


def drawings(
    country: Country, icons: dict[str, IconSet], styles: Sequence[Style]
) -> list[Image.Image]:
    """The country's flag in every style whose set has it, and has it right."""
    drawn = (
        icons[name].draw_first(*spell(country))
        for name, spell in styles
        if (name, country.iso) not in WRONG
    )
    return [drawing for drawing in drawn if drawing is not None]


def photographed(
    drawing: Image.Image, generator: np.random.Generator, noise: float = 6.0
) -> Pixels:
    """The flag on a light background, jittered; uint8 (64, 64, 3)."""
    return jitter(drawing, pick_colour(generator, 120, 256), generator=generator, noise=noise)


def _drawn_everywhere(candidates: Sequence[Country], icons: dict[str, IconSet]) -> list[Country]:
    """The first hundred states; territories, which `cif` leaves out, often fly another's flag."""
    known = [country for country in candidates if country.iso in icons["cif"]]
    complete = (c for c in known if len(drawings(c, icons, TRAIN_STYLES)) == len(TRAIN_STYLES))
    return [country for country, _ in zip(complete, range(NUM_COUNTRIES), strict=False)]


def _pictures(
    chosen: Sequence[Country],
    icons: dict[str, IconSet],
    styles: Sequence[Style],
    copies: int,
    generator: np.random.Generator,
) -> Iterator[tuple[PixelPicture, int]]:
    for label, country in enumerate(chosen):
        for drawing in drawings(country, icons, styles):
            for _ in range(copies):
                yield PixelPicture(photographed(drawing, generator)), label
