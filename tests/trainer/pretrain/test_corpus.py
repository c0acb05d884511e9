from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.pretrain.corpus import Emoji, HeldOut, build_corpus, choose_held_out, normalised
from trainer.pretrain.render import IconSet

NOUNS = frozenset({"cat", "hammer", "guitar", "steam", "engine"})


def icon_set(name: str, *names: str, mono: bool = False, category: str = "") -> IconSet:
    shape = (len(names), 4, 4) if mono else (len(names), 4, 4, 4)
    return IconSet(name, mono, np.zeros(shape, np.uint8), list(names), [category] * len(names))


def emoji(**groups: int) -> Emoji:
    return Emoji(keywords={name: [] for name in groups}, groups=dict(groups))


def test_names_are_normalised() -> None:
    assert normalised("Jack-o\u2019-Lantern!") == "jack o lantern"


@given(st.sampled_from(["{}", "{}s", "big {}", "{} face", "two {}s running"]))
def test_a_held_out_concept_is_found_inside_any_name(pattern: str) -> None:
    assert pattern.format("cat") in HeldOut(["cat"])


def test_a_held_out_concept_is_a_word_not_a_string() -> None:
    held_out = HeldOut(["cat", "fire engine"])
    assert "category" not in held_out
    assert "fire" not in held_out
    assert "red fire engines" in held_out


def test_held_out_names_never_reach_the_corpus() -> None:
    vendors = [
        icon_set(name, "cat", "cats", "hammer", "cat with hammer")
        for name in ("noto", "twemoji", "fluent-emoji", "fluent-emoji-flat", "emojione")
    ]
    mono = icon_set("mdi", "cat", "guitar", "cat outline", mono=True)
    corpus = build_corpus(
        [*vendors, mono], icon_set("openmoji", "cat", "dog"), emoji(cat=3, dog=3), NOUNS
    )
    assert corpus.held_out == ["cat"]
    assert corpus.names == ["guitar", "hammer"]
    assert {item.name for item in corpus.held_out_items} == {"cat"}
    assert len(corpus.held_out_items) == len(vendors)  # exact name, colour sets only


def test_what_the_suite_asks_for_is_left_out() -> None:
    sets = [
        icon_set("noto", "flag for france", "chess pawn", "joker", "hammer"),
        icon_set("streamline-emojis", "canada", category="Flags"),
        icon_set("game-icons", "card ace", "guitar", mono=True),
    ]
    corpus = build_corpus(sets, icon_set("openmoji"), emoji(), NOUNS)
    assert corpus.names == ["guitar", "hammer"]


def test_glued_names_are_taken_apart_or_dropped() -> None:
    names = Emoji(keywords={"steam engine": []}, groups={"steam engine": 5})
    corpus = build_corpus(
        [icon_set("fxemoji", "steamengine", "u1f600thing")], icon_set("openmoji"), names, NOUNS
    )
    assert corpus.names == ["steam engine"]


def test_kinds_tell_things_from_interface_symbols() -> None:
    mono = icon_set("mdi", "guitar", "steam engine", "arrow left", "hammer add", mono=True)
    corpus = build_corpus([mono, icon_set("noto", "zzz")], icon_set("openmoji"), emoji(), NOUNS)
    assert {item.name: item.kind for item in corpus.items} == {
        "guitar": "noun",
        "steam engine": "noun",
        "arrow left": "other",
        "hammer add": "other",
        "zzz": "colour",
    }


def test_concepts_are_held_out_only_if_many_vendors_draw_them() -> None:
    names = emoji(cat=3, dog=3, grin=0)
    drawn = Counter(cat=5, dog=4, grin=6)
    assert choose_held_out(drawn, {"cat", "dog", "grin"}, names) == ["cat"]
    assert choose_held_out(drawn, {"dog"}, names) == []
