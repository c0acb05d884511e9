"""Image sets: reading, refusing, splitting."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medley.errors import DataError
from trainer.datasets import (
    ImageSet,
    PixelPicture,
    align,
    few_shot,
    open_dataset,
    read_csv,
    read_folder,
    require_trainable,
    split,
)

DEMO = Path(__file__).parents[2] / "demo"


def save_image(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade, 0, 255 - shade)).save(path)


def make_folder(root: Path, counts: dict[str, int]) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        for index in range(count):
            save_image(root / name / f"{index:03d}.png", number * 40 + index)
    return root


def make_set(counts: list[int]) -> ImageSet:
    items = [
        (PixelPicture(np.full((4, 4, 3), 10 * label + index, np.uint8)), label)
        for label, count in enumerate(counts)
        for index in range(count)
    ]
    names = tuple(f"class {label}" for label in range(len(counts)))
    return ImageSet("made", names, ("a {}",), items)


def test_a_folder_is_read_in_sorted_order(tmp_path: Path) -> None:
    make_folder(tmp_path, {"dog": 2, "big_cat": 3})
    images = read_folder(tmp_path)
    assert images.class_names == ("big cat", "dog")
    assert images.labels.tolist() == [0, 0, 0, 1, 1]
    assert images.image(0).getpixel((0, 0)) == (40, 0, 215)
    assert images.bytes_of(3) == (tmp_path / "dog/000.png").read_bytes()


def test_labels_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        make_set([2, 2]).labels[0] = 1


def test_files_that_are_not_images_by_name_are_passed_over(tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 2, "dog": 2})
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / "cat" / ".hidden.png").write_text("no picture")
    (tmp_path / ".cache").mkdir()
    assert len(read_folder(tmp_path)) == 4


def test_classes_json_gives_names_and_templates(tmp_path: Path) -> None:
    make_folder(tmp_path, {"n01": 2, "n02": 2})
    words = {"names": {"n01": "tench"}, "templates": ["a photo of a {}, a fish"]}
    (tmp_path / "classes.json").write_text(json.dumps(words))
    images = read_folder(tmp_path)
    assert images.class_names == ("tench", "n02")
    assert images.templates == ("a photo of a {}, a fish",)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"names": []}',
        '{"names": {"cat": 3}}',
        '{"templates": "a {}"}',
        '{"colour": 1}',
        '{"templates": ["a photo"]}',
        '{"templates": ["{} {}"]}',
        '{"templates": ["a {0.__class__} {}"]}',
        '{"templates": []}',
    ],
)
def test_a_bad_classes_json_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    make_folder(tmp_path, {"cat": 2, "dog": 2})
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(DataError) as caught:
        read_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        open_dataset(tmp_path / "nowhere", "train")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no class folders"):
        open_dataset(tmp_path, "train")


def test_an_empty_class_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 2})
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataError, match="dog: no images"):
        open_dataset(tmp_path, "train")


def test_one_class_is_not_enough_to_learn_but_enough_to_measure(tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 3})
    with pytest.raises(DataError, match="only one class, 'cat'"):
        open_dataset(tmp_path, "train")
    assert len(open_dataset(tmp_path, "test")) == 3


def test_a_class_with_one_image_cannot_be_learnt(tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 2, "dog": 1})
    with pytest.raises(DataError, match=r"at least 2 images a class.*'dog' \(1\)"):
        open_dataset(tmp_path, "train")
    assert len(open_dataset(tmp_path, "test")) == 3


def test_unreadable_files_are_all_named_up_to_a_limit(tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 9, "dog": 2})
    for index in range(7):
        (tmp_path / "cat" / f"{index:03d}.png").write_bytes(b"not a picture")
    with pytest.raises(
        DataError, match=r"7 of 11 images unreadable.*000\.png.*and 2 more"
    ) as caught:
        open_dataset(tmp_path, "train")
    assert "\n" not in str(caught.value)


def test_a_truncated_image_is_unreadable(tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 2, "dog": 2})
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "dog/000.png")
    data = (tmp_path / "dog/000.png").read_bytes()
    (tmp_path / "dog/000.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="1 of 4 images unreadable"):
        open_dataset(tmp_path, "train")


def test_unreadable_files_can_be_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_folder(tmp_path, {"cat": 3, "dog": 2})
    (tmp_path / "cat/001.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        images = open_dataset(tmp_path, "train", skip_unreadable=True)
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert "001.png" in caplog.text


def test_a_set_without_one_readable_image_is_refused_even_when_skipping(tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 1})
    (tmp_path / "cat/000.png").write_bytes(b"")
    with pytest.raises(DataError, match="1 of 1 images unreadable"):
        open_dataset(tmp_path, "test", skip_unreadable=True)


def test_class_names_that_differ_only_in_case_or_punctuation_are_refused(tmp_path: Path) -> None:
    make_folder(tmp_path, {"T-Shirt": 2, "t_shirt": 2})
    with pytest.raises(DataError, match="'T-Shirt' and 't shirt' are the same name"):
        open_dataset(tmp_path, "train")


def test_both_parts_of_a_folder_share_the_labels_of_training(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"ant": 2, "bee": 2, "cow": 2})
    make_folder(tmp_path / "test", {"bee": 1, "cow": 1})
    (tmp_path / "classes.json").write_text('{"names": {"bee": "honey bee"}}')
    test = open_dataset(tmp_path, "test")
    assert test.class_names == ("ant", "honey bee", "cow")
    assert test.labels.tolist() == [1, 2]
    assert test.name == tmp_path.name


def test_a_class_that_only_the_test_part_has_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"ant": 2, "bee": 2})
    make_folder(tmp_path / "test", {"wasp": 1})
    with pytest.raises(DataError, match="training images lack: wasp"):
        open_dataset(tmp_path, "test")


def test_a_table_names_images_relative_to_itself(tmp_path: Path) -> None:
    make_folder(tmp_path / "pictures", {"x": 4})
    rows = ["label,image,more"] + [
        f"{'dog' if index < 2 else 'cat'},pictures/x/{index:03d}.png,7" for index in range(4)
    ]
    (tmp_path / "pets.csv").write_text("\n".join(rows), encoding="utf-8-sig")
    images = open_dataset(tmp_path / "pets.csv", "train")
    assert images.name == "pets"
    assert images.class_names == ("cat", "dog")
    assert images.labels.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column image and no column label"),
        ("image,class\na.png,b\n", "no column label"),
        ("image,label\n", "no images"),
        ("image,label\na.png,b\n,b\nc.png\n", "empty in row 2; row 3"),
        ("image,label\na.png,b\n", "1 of 1 images unreadable: .*a.png: No such file"),
        ("image,label\na.png," + "b" * 200_000, "not a CSV table: field larger"),
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_csv(tmp_path / "table.csv")


def test_a_table_that_is_not_text_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match="not a CSV table"):
        read_csv(tmp_path / "binary.csv")
    with pytest.raises(DataError, match="no such file"):
        read_csv(tmp_path / "none.csv")


def test_an_unknown_suite_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no task 'birds'; there are clipart"):
        open_dataset("suite:birds", "train", cache=tmp_path)


def test_the_digest_follows_contents_labels_and_names_but_not_the_place(tmp_path: Path) -> None:
    one = read_folder(make_folder(tmp_path / "one", {"cat": 2, "dog": 2})).digest
    same = read_folder(make_folder(tmp_path / "two", {"cat": 2, "dog": 2})).digest
    renamed = read_folder(make_folder(tmp_path / "three", {"cat": 2, "fox": 2})).digest
    save_image(tmp_path / "one/cat/000.png", 200)
    changed = read_folder(tmp_path / "one").digest
    assert one == same
    assert len({one, renamed, changed}) == 3
    assert make_set([2, 3]).digest != make_set([3, 2]).digest


def test_a_label_without_a_class_is_refused() -> None:
    picture = PixelPicture(np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(DataError, match="label 2 of only 2 classes"):
        ImageSet("made", ("a", "b"), ("{}",), [(picture, 2)])


def test_pixels_survive_their_own_encoding() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    images = ImageSet("made", ("a",), ("{}",), [(PixelPicture(pixels), 0)])
    assert images.bytes_of(0).startswith(b"\x89PNG")
    np.testing.assert_array_equal(np.asarray(images.image(0)), pixels)


def test_a_split_takes_its_share_of_every_class_and_loses_nothing() -> None:
    images = make_set([10, 20, 2, 1])
    rest, part = split(images, 0.3, seed=1)
    assert part.counts.tolist() == [3, 6, 1, 0]
    assert rest.counts.tolist() == [7, 14, 1, 1]
    contents = {picture.content() for picture, _ in (*rest.items, *part.items)}
    assert contents == {picture.content() for picture, _ in images.items}


def test_a_split_is_decided_by_its_seed_alone() -> None:
    images = make_set([10, 10])
    assert split(images, 0.5, seed=1)[1].digest == split(images, 0.5, seed=1)[1].digest
    assert split(images, 0.5, seed=1)[1].digest != split(images, 0.5, seed=2)[1].digest


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_a_split_needs_a_true_fraction(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        split(make_set([2, 2]), fraction, seed=0)


def test_few_shot_takes_the_same_number_of_each_class() -> None:
    images = make_set([10, 4])
    assert few_shot(images, 4, seed=0).counts.tolist() == [4, 4]
    assert few_shot(images, 4, seed=0).digest == few_shot(images, 4, seed=0).digest
    with pytest.raises(DataError, match="'class 1' has 4 images"):
        few_shot(images, 5, seed=0)


def test_align_relabels_by_name() -> None:
    images = make_set([1, 2])
    aligned = align(images, ["Class-1", "class 2", "CLASS 0"])
    assert aligned.labels.tolist() == [2, 0, 0]
    with pytest.raises(DataError, match="unknown classes: class 1"):
        align(images, ["class 0"])


def test_the_demo_slice_can_be_learnt_from_and_is_small() -> None:
    for task, classes in (("fashion", 10), ("flags", 48)):
        train, test = (
            read_folder(DEMO / task / "train"),
            open_dataset(DEMO / task, "test"),
        )
        require_trainable(train)
        assert train.class_names == test.class_names
        assert len(train.class_names) == classes
        assert not {p.content() for p, _ in train.items} & {p.content() for p, _ in test.items}
    assert sum(file.stat().st_size for file in DEMO.rglob("*.png")) <= 3_000_000
