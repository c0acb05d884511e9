from pathlib import Path

from trainer.pretrain.words import Form, distillation_texts, forms, wordnet_nouns


def test_every_name_is_read_alone_and_in_a_caption() -> None:
    texts = distillation_texts(["cat", "dog"], ["pet"], ["axe", "bow"], num_nouns=2, seed=0)
    assert {"cat", "dog", "pet", "axe", "bow", "an icon of a pet"} <= set(texts)
    assert sum("cat" in text for text in texts) == 2
    assert len(set(texts)) == len(texts)


def test_names_come_first() -> None:
    assert distillation_texts(["b", "a"], ["c"], [], num_nouns=0, seed=0)[:3] == ["b", "a", "c"]


def test_wordnet_is_read_without_persons_and_places(tmp_path: Path) -> None:
    folder = tmp_path / "usr" / "share" / "wordnet"
    folder.mkdir(parents=True)
    (folder / "data.noun").write_text(
        "  1 licence text\n"
        "00001 06 n 02 Claw_hammer 0 hammer 0 001 @ 1 | a tool\n"
        "00002 18 n 01 Einstein 0 000 | a person\n"
        "00003 06 n 01 a_very_long_name 0 000 | too long\n"
    )
    assert wordnet_nouns(tmp_path) == ["claw hammer", "hammer"]


def test_captions_are_read_with_and_without_a_full_stop() -> None:
    assert forms(["cat", "axe", "a photo of a cat", "a button"], {"cat", "a button"}) == [
        Form("cat", 0, 3.0),
        Form("axe", 1, 1.0),
        Form("a photo of a cat", 2, 0.5),
        Form("a photo of a cat.", 2, 0.5),
        Form("a button", 3, 3.0),
    ]
