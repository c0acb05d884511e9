"""`problems` finds nothing in a whole data set, and says exactly what a damaged one lacks."""

from pathlib import Path

import pytest

from medley.errors import DataError
from tests.trainer.mtil.copies import COPIES, save_jpeg
from trainer.mtil import load_task, problems
from trainer.mtil.words import class_entries


@pytest.fixture(scope="module")
def all_textures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The class folders of all of DTD, in files that no check opens."""
    root = tmp_path_factory.mktemp("dtd")
    for entry in class_entries("dtd"):
        (root / entry.key).mkdir()
        for number in range(80):
            (root / entry.key / f"{entry.key}_{number:04d}.jpg").touch()
    return root


@pytest.fixture
def textures(tmp_path: Path, all_textures: Path) -> Path:
    """DTD: lists of its own, class folders that are links to the shared ones."""
    home = tmp_path / "dtd/dtd"
    (home / "labels").mkdir(parents=True)
    (home / "images").mkdir()
    for folder in all_textures.iterdir():
        (home / "images" / folder.name).symlink_to(folder)
    for split, numbers in (("train", range(40)), ("test", range(40, 80))):
        keys = [entry.key for entry in class_entries("dtd")]
        lines = [f"{key}/{key}_{number:04d}.jpg\n" for key in keys for number in numbers]
        (home / f"labels/{split}1.txt").write_text("".join(lines))
    return tmp_path


def rename_in_list(listed: Path, *names: str) -> None:
    """Let a list name files that are not there."""
    text = listed.read_text()
    for name in names:
        text = text.replace(f"{name}.jpg", f"{name}.gone.jpg")
    listed.write_text(text)


def test_a_whole_data_set_has_no_problems(textures: Path) -> None:
    assert problems("dtd", textures) == []
    assert len(load_task("dtd", "train", root=textures)) == 1880


def test_missing_files_are_named_with_their_classes(textures: Path) -> None:
    home = textures / "dtd/dtd"
    rename_in_list(home / "labels/train1.txt", "banded_0000", "banded_0003")
    rename_in_list(home / "labels/test1.txt", "lined_0079")
    gone = [
        f"{home}/images/{name}.gone.jpg" for name in ("banded/banded_0000", "banded/banded_0003")
    ]
    assert problems("dtd", textures) == [
        f"dtd train: 1,880 images expected, 1,878 found; missing: {gone[0]}, {gone[1]}; "
        f"by class: banded (2)",
        f"dtd test: 1,880 images expected, 1,879 found; "
        f"missing: {home}/images/lined/lined_0079.gone.jpg; by class: lined (1)",
    ]
    with pytest.raises(DataError, match=r"1,878 found; missing: .*medley data check") as caught:
        load_task("dtd", "train", root=textures)
    assert "\n" not in str(caught.value)


def test_many_missing_files_are_counted_after_the_first_five(textures: Path) -> None:
    (textures / "dtd/dtd/images/woven").unlink()
    train, _ = problems("dtd", textures)
    assert train.endswith("woven_0004.jpg and 35 more; by class: woven (40)")


def test_a_missing_folder_of_images_is_not_the_end(textures: Path) -> None:
    (textures / "dtd/dtd/images").rename(textures / "dtd/dtd/pictures")
    train, test = problems("dtd", textures)
    assert "dtd train: 1,880 images expected, 0 found" in train
    assert "banded (40), blotchy (40)" in test
    assert test.endswith("and 42 more")


def test_a_missing_list_does_not_hide_the_other_part(textures: Path) -> None:
    listed = textures / "dtd/dtd/labels/train1.txt"
    listed.unlink()
    rename_in_list(textures / "dtd/dtd/labels/test1.txt", "banded_0041")
    train, test = problems("dtd", textures)
    assert train == f"dtd train: {listed}: no such file"
    assert test.startswith("dtd test: 1,880 images expected, 1,879 found")


def test_a_list_cut_short_tells_counts_and_empty_classes(textures: Path) -> None:
    listed = textures / "dtd/dtd/labels/test1.txt"
    lines = listed.read_text().splitlines(keepends=True)
    listed.write_text("".join(lines[:-41]))
    assert problems("dtd", textures) == [
        "dtd test: 1,880 images expected, 1,839 found",
        "dtd test: classes without an image: zigzagged",
    ]


def test_a_missing_data_set_is_one_line(tmp_path: Path) -> None:
    assert problems("flowers", tmp_path) == [
        f"flowers: {tmp_path / 'flowers-102'}: no such folder; "
        f"1,020 train + 6,149 test images expected, 0 found"
    ]


def test_without_official_lists_the_class_that_lacks_images_is_named(tmp_path: Path) -> None:
    COPIES["caltech101"](tmp_path)
    home = tmp_path / "caltech101/101_ObjectCategories"
    found = problems("caltech101", tmp_path)
    assert len(found) == 101 + 2  # no class is whole
    assert found[4] == (
        f"caltech101: class 'accordion': 55 images expected, 5 found ({home / 'accordion'})"
    )
    assert found[99] == (
        f"caltech101: class 'wrench': 39 images expected, 0 found "
        f"({home / 'wrench'}, no such folder)"
    )
    assert found[101:] == [
        "caltech101 train: 6,941 images expected, 8 found",
        "caltech101 test: 1,736 images expected, 2 found",
    ]


@pytest.mark.slow
def test_a_whole_data_set_that_we_split_has_no_problems(tmp_path: Path) -> None:
    home = tmp_path / "caltech101/101_ObjectCategories"
    for entry in class_entries("caltech101"):
        (home / entry.key).mkdir(parents=True)
        for number in range(1, (entry.images or 0) + 1):
            (home / entry.key / f"image_{number:04d}.jpg").touch()
    (home / "BACKGROUND_Google").mkdir()
    (home / "BACKGROUND_Google/image_0001.jpg").touch()
    (home / "accordion/._image_0001.jpg").touch()  # what macOS leaves behind
    assert problems("caltech101", tmp_path) == []


def test_pictures_are_opened_only_when_asked(tmp_path: Path) -> None:
    COPIES["pets"](tmp_path)
    file = tmp_path / "oxford-iiit-pet/images/Abyssinian_7.jpg"
    save_jpeg(file, 1)
    file.write_bytes(file.read_bytes()[:-200])
    opened: list[None] = []
    found = problems("pets", tmp_path, decode=True, on_image=lambda: opened.append(None))
    assert len(opened) == 4
    (broken,) = set(found) - set(problems("pets", tmp_path))
    assert broken.startswith(f"pets test: {file}: ")
