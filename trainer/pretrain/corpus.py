"""Which pictures with which names are learnt from, and which are kept for the examination.

Three things are never learnt from: the held-out vendors (share-alike licences), the held-out
concepts (a hundred everyday nouns, in every set), and what the small suite asks for (flags, chess
men, playing cards, mahjong tiles).
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from trainer.pretrain.files import load_json
from trainer.pretrain.render import IconSet

HELD_OUT_CONCEPTS = 100
_HELD_OUT_SEED = 1
_OBJECT_GROUPS = {3, 4, 5, 6, 7}  # emojibase: animals and nature, food, travel, activities, objects
_EMOJI_VENDORS = ("noto", "twemoji", "fluent-emoji-flat", "fluent-emoji", "emojione", "noto-v1")
_FLAGS_BY_CATEGORY = (*_EMOJI_VENDORS, "streamline-emojis")  # the last names them "canada"
_VENDORS_A_CONCEPT = 5  # a concept is held out only if at least so many of them draw it

_SUITE = re.compile(
    r"\b(flag for|flags?|chess|playing card|joker|spade suit|heart suit|diamond suit|club suit"
    r"|mahjong|regional indicator)\b"
)
_GAME_ICONS_CARD = re.compile(r"^(card .*|chess .*)$")
_NO_CONCEPT = re.compile(
    r"oclock|thirty|moon|button|japanese|symbol|left|right|small|large|heart|face|square|circle"
)
_INTERFACE = frozenset(
    """
    align alignment arrow arrows add remove off slash plus minus edit file folder text document app
    chevron caret sort filter layout alt square circle line up down left right top bottom check
    cancel close box border color list view page data cloud user account multiple one two three four
    five six seven eight nine ten x y z rectangle table chat mail select delete search
    """.split()  # noqa: SIM905 (a word list is easier to read and to extend than 70 literals)
)


@dataclass(frozen=True)
class Emoji:
    """What emojibase says about emoji, by normalised label.

    Attributes:
        keywords: label to search words.
        groups: label to group number.
    """

    keywords: dict[str, list[str]]
    groups: dict[str, int | None]

    @classmethod
    def read(cls, package: Path) -> Emoji:
        """Read an unpacked emojibase-data package."""
        entries = load_json(package / "en" / "data.json")
        return cls(
            keywords={normalised(e["label"]): e.get("tags", []) for e in entries},
            groups={normalised(e["label"]): e.get("group") for e in entries},
        )

    @cached_property
    def _squeezed(self) -> dict[str, str]:
        return {name.replace(" ", ""): name for name in self.keywords}

    def respaced(self, name: str) -> str:
        """The label that reads like ``name`` without spaces ("" if none): fxemoji glues words."""
        return self._squeezed.get(name.replace(" ", ""), "")


@dataclass(frozen=True)
class Item:
    """One picture of the corpus: row ``row`` of set ``set_name`` shows ``name``."""

    set_name: str
    row: int
    name: str
    kind: str  # "colour", "noun" or "other", see `Corpus`


@dataclass(frozen=True)
class Corpus:
    """What is learnt from.

    Attributes:
        items: every picture; single-colour ones are "noun" if their name is made of at most two
            WordNet nouns and no word of interfaces, else "other".
        names: the distinct names, sorted; an item's class is its name's index here.
        held_out: the held-out concepts, sorted.
        held_out_items: their colour pictures in the sets that are learnt from.
    """

    items: list[Item]
    names: list[str]
    held_out: list[str]
    held_out_items: list[Item]

    @cached_property
    def label(self) -> dict[str, int]:
        """Name to class."""
        return {name: index for index, name in enumerate(self.names)}


def normalised(name: str) -> str:
    """Lower case, letters, digits and single spaces."""
    plain = name.lower().replace("-", " ").replace("\u2019", "")
    return re.sub(r"[^a-z0-9 ]+", "", plain).strip()


def build_corpus(
    sets: Iterable[IconSet], held_out_vendor: IconSet, emoji: Emoji, nouns: frozenset[str]
) -> Corpus:
    """Sort the pictures of ``sets`` into learnt from, held out, and left out.

    Args:
        sets: rendered sets, without the held-out vendors.
        held_out_vendor: only its names are looked at, to choose concepts that it draws too.
        emoji: labels and groups.
        nouns: WordNet's, lower case, with underscores.
    """
    named = {icons.name: (icons, _names(icons, emoji)) for icons in sets}
    drawn = Counter(
        name for vendor in _EMOJI_VENDORS if vendor in named for name in set(named[vendor][1])
    )
    held_out = choose_held_out(drawn, set(_names(held_out_vendor, emoji)), emoji)
    forbidden = HeldOut(held_out)
    items, held_out_items = [], []
    for icons, names in named.values():
        for row, name in enumerate(names):
            if not name or _is_examined_elsewhere(icons, row, name):
                continue
            item = Item(icons.name, row, name, _kind(icons, name, nouns))
            if name not in forbidden:
                items.append(item)
            elif name in held_out and not icons.mono:
                held_out_items.append(item)
    return Corpus(items, sorted({item.name for item in items}), held_out, held_out_items)


def choose_held_out(drawn: Counter[str], vendor_names: set[str], emoji: Emoji) -> list[str]:
    """A hundred short names of things that most vendors and the held-out vendor draw."""
    candidates = sorted(
        name
        for name, group in emoji.groups.items()
        if drawn[name] >= _VENDORS_A_CONCEPT
        and name in vendor_names
        and group in _OBJECT_GROUPS
        and len(name.split()) <= 2
        and not _SUITE.search(name)
        and not _NO_CONCEPT.search(name)
    )
    random.Random(_HELD_OUT_SEED).shuffle(candidates)
    return sorted(candidates[:HELD_OUT_CONCEPTS])


class HeldOut:
    """``name in HeldOut(concepts)``: does the name contain a held-out concept, plural or not?"""

    def __init__(self, concepts: Iterable[str]) -> None:
        self._concepts = [self._singular(concept) for concept in concepts]

    def __contains__(self, name: str) -> bool:
        words = self._singular(name)
        return any(concept in words for concept in self._concepts)

    @staticmethod
    def _singular(name: str) -> str:
        words = (w[:-1] if w.endswith("s") and len(w) > 3 else w for w in name.split())
        return f" {' '.join(words)} "


def read_nouns(wordnet: Path) -> frozenset[str]:
    """Every noun of WordNet, lower case, words joined by underscores."""
    index = wordnet / "usr" / "share" / "wordnet" / "index.noun"
    lines = index.read_text(encoding="latin-1").splitlines()
    return frozenset(line.split()[0] for line in lines if not line.startswith(" "))


def _names(icons: IconSet, emoji: Emoji) -> list[str]:
    names = [normalised(name) for name in icons.names]
    return [emoji.respaced(name) for name in names] if icons.name == "fxemoji" else names


def _is_examined_elsewhere(icons: IconSet, row: int, name: str) -> bool:
    """Flags, chess men, cards and tiles: the small suite asks for them as new tasks."""
    return bool(
        _SUITE.search(name)
        or (icons.name in _FLAGS_BY_CATEGORY and icons.categories[row] == "Flags")
        or (icons.name == "game-icons" and _GAME_ICONS_CARD.match(name))
    )


def _kind(icons: IconSet, name: str, nouns: frozenset[str]) -> str:
    if not icons.mono:
        return "colour"
    words = name.split()
    is_thing = (
        len(words) <= 2
        and len(name) > 2
        and not _INTERFACE.intersection(words)
        and ("_".join(words) in nouns or nouns.issuperset(words))
    )
    return "noun" if is_thing else "other"
