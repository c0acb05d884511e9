"""The texts that the small text tower learns to read as its teacher does.

Names of pictures, search words, dictionary nouns, each alone and in a caption; no picture is used.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

CAPTIONS = (
    "an icon of a {}",
    "a picture of a {}",
    "a photo of a {}",
    "a drawing of a {}",
    "a clip art of a {}",
    "a silhouette of a {}",
    "an image of the {}",
    "a small {}",
    "the {}",
    "a picture of {}",
    "an icon of {}",
    "a sign with a {}",
)
_OFTEN = 3.0  # names of colour icons and emoji, against other words: most pictures have them
_PERSONS_AND_PLACES = {"18", "15"}  # WordNet's lexicographer files: mostly proper names
_SHORT_WORDS = re.compile(r"[a-z' -]+")


@dataclass(frozen=True)
class Form:
    """One way to write a text.

    Attributes:
        text: as written.
        row: of the text in the teacher's list.
        weight: how often it is read, against other forms.
    """

    text: str
    row: int
    weight: float


def forms(texts: Sequence[str], often: Collection[str]) -> list[Form]:
    """Words as they are; captions half of the time with a full stop, as many templates end."""
    chosen = []
    for row, text in enumerate(texts):
        if text in often or not text.startswith(("a ", "an ", "the ")):
            chosen.append(Form(text, row, _OFTEN if text in often else 1.0))
        else:
            chosen += [Form(text, row, 0.5), Form(f"{text}.", row, 0.5)]
    return chosen


def wordnet_nouns(wordnet: Path) -> list[str]:
    """Nouns of one or two words, without persons and places, sorted."""
    data = wordnet / "usr" / "share" / "wordnet" / "data.noun"
    nouns: set[str] = set()
    for line in data.read_text(encoding="latin-1").splitlines():
        if line.startswith(" "):  # the licence
            continue
        fields = line.split("|")[0].split()
        if fields[1] in _PERSONS_AND_PLACES:
            continue
        lemmas = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        nouns.update(lemma.replace("_", " ").lower() for lemma in lemmas)
    return sorted(n for n in nouns if _SHORT_WORDS.fullmatch(n) and len(n.split()) <= 2)


def distillation_texts(
    names: Sequence[str], spoken: Sequence[str], nouns: Sequence[str], *, num_nouns: int, seed: int
) -> list[str]:
    """Every text once: names, search words, some nouns; and a caption of each but the rarest.

    Args:
        names: of the corpus.
        spoken: emoji labels, search words and the held-out concepts.
        nouns: to draw ``num_nouns`` from.
        num_nouns: how many.
        seed: of the draw and of the captions.
    """
    chance = random.Random(seed)
    drawn = chance.sample(list(nouns), min(num_nouns, len(nouns)))
    plain = list(dict.fromkeys([*names, *spoken, *drawn]))
    captioned = [*names, *spoken, *drawn[: num_nouns // 4]]
    captions = [chance.choice(CAPTIONS).format(text) for text in captioned]
    frequent = [CAPTIONS[0].format(text) for text in spoken]
    return list(dict.fromkeys([*plain, *captions, *frequent]))
