"""The suite's tasks, from small stand-ins of their packages and, slowly, from the packages."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from medley.errors import DataError
from trainer.sources import source
from trainer.suite import TASKS, clipart, counting, flags, licences, load_task
from trainer.suite.icons import IconSet


def package(cache: Path, name: str) -> Path:
    """Where a fetched package lies: what is there already is not fetched again."""
    folder = cache / "sources" / f"{name}-{source(name).sha256[:12]}"
    folder.mkdir(parents=True)
    return folder


def weave(cache: Path) -> None:
    fabrics = package(cache, "conformal-clip-data")
    for shade, name in enumerate(("nominal", "local", "global")):
        folder = fabrics / "conformal_clip_data/data/textile_images/simulated" / name
        folder.mkdir(parents=True)
        for index in range(8):
            Image.new("L", (250, 250), 60 * shade + index).save(folder / f"{index}.jpg")


def test_a_task_is_built_once_and_then_read_from_the_cache(tmp_path: Path) -> None:
    weave(tmp_path)
    train, test = (
        load_task("textile", "train", cache=tmp_path),
        load_task("textile", "test", cache=tmp_path),
    )
    assert train.counts.tolist() == [6, 6, 6]
    assert test.counts.tolist() == [2, 2, 2]
    assert train.image(0).size == (64, 64)
    (file,) = (tmp_path / "suite").iterdir()
    written = file.stat().st_mtime_ns
    assert load_task("textile", "train", cache=tmp_path).digest == train.digest
    assert file.stat().st_mtime_ns == written


def test_an_unknown_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no task 'birds'"):
        load_task("birds", "train", cache=tmp_path)


def test_every_task_names_the_licence_of_every_package() -> None:
    assert len(TASKS) == 9
    assert licences("fashion") == {"fashion-mnist": "MIT"}
    assert all(all(licences(task).values()) for task in TASKS)


def gigantic_png(side: int) -> bytes:
    """A sound PNG of one colour, a few kilobytes for any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def draw(file: Path, seed: int, page: int = 200) -> None:
    """Some blots of their own on a transparent page."""
    generator = np.random.default_rng(seed)
    image = Image.new("RGBA", (page, page))
    for _ in range(4):
        left, top = (int(value) for value in generator.integers(20, 120, 2))
        colour = (*(int(value) for value in generator.integers(0, 200, 3)), 255)
        ImageDraw.Draw(image).rectangle((left, top, left + 40, top + 40), fill=colour)
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def library(root: Path) -> Path:
    """Nine animals, six of them one series, and three foods."""
    png = root / "usr/share/openclipart/png"
    for index in range(6):
        draw(png / f"animals/dog_{index:02d}.png", index)
    for index, name in enumerate(("cat", "owl", "ant")):
        draw(png / f"animals/{name}.png", 10 + index)
        draw(png / f"food/dish_{name}.png", 20 + index)
    return png


def test_a_series_of_drawings_stays_on_one_side(tmp_path: Path) -> None:
    library(tmp_path)
    train, test = clipart.build(tmp_path)
    assert train.counts[:2].tolist() == [6, 2]
    assert test.counts[:2].tolist() == [3, 1]


def test_clip_art_that_cannot_be_used_is_left_out(tmp_path: Path) -> None:
    png = library(tmp_path)
    before = [part.digest for part in clipart.build(tmp_path)]
    (png / "food/broken.png").write_bytes(b"no picture")
    (png / "food/gigantic.png").write_bytes(gigantic_png(8000))
    Image.new("RGBA", (50, 50)).save(png / "food/empty.png")
    draw(png / "food/both.png", 99)
    draw(png / "animals/again.png", 99)  # in two classes: it says nothing
    draw(png / "animals/smilies/laughing.png", 98)
    draw(png / "food/zz_copy.png", 20)  # looks like dish_cat
    assert [part.digest for part in clipart.build(tmp_path)] == before


def test_a_small_drawing_on_a_large_page_fills_the_picture(tmp_path: Path) -> None:
    draw(tmp_path / "usr/share/openclipart/png/food/speck.png", 1, page=1500)
    train, _ = clipart.build(tmp_path)
    ink_HW = np.asarray(train.image(0).convert("L")) < 235
    assert max(np.ptp(np.flatnonzero(ink_HW.any(axis))) for axis in (0, 1)) >= 60


def icon_set(folder: Path, names: list[str], category: str = "Objects") -> Path:
    """Icons that differ in colour; every one is a tall rectangle."""
    icons = {
        name: {"body": f'<path fill="#{40 * index % 256:02x}8020" d="M4 0h8v16H4z"/>'}
        for index, name in enumerate(names)
    }
    folder.mkdir(parents=True)
    aliases = {"another": {"parent": names[0]}}
    (folder / "icons.json").write_text(json.dumps({"icons": icons, "aliases": aliases}))
    categories: dict[str, list[str]] = {key: [] for key in counting.THINGS}
    categories[category] = names
    (folder / "metadata.json").write_text(json.dumps({"categories": categories}))
    return folder


def test_icons_are_found_by_name_and_alias(tmp_path: Path) -> None:
    icons = IconSet(icon_set(tmp_path / "set", ["lamp", "desk"]))
    assert icons.names_in("Objects") == ["desk", "lamp"]
    assert "lamp" in icons
    assert "chair" not in icons
    assert icons.draw("chair") is None
    lamp, another = icons.draw("lamp", side=32), icons.draw_first("chair", "another", side=32)
    assert lamp is not None
    assert another is not None
    assert lamp.size == (32, 32)
    assert lamp.tobytes() == another.tobytes()


def test_counting_pictures_hold_as_many_things_as_they_say(tmp_path: Path) -> None:
    names = [f"thing-{index:03d}" for index in range(counting.TRAIN_OBJECTS + 20)]
    train, test = counting.build(icon_set(tmp_path / "set", [*names, "cherries"]))
    assert train.counts.min() > 400
    background = (200, 200, 200)
    for images in (train, test):
        for index in range(30):
            pixels_HWC = np.asarray(images.image(index))
            drawn_HW = np.asarray((pixels_HWC < background).any(axis=2))
            assert number_of_blobs(drawn_HW) <= images.labels[index] + 1
            assert drawn_HW.sum() > 60 * (images.labels[index] + 1)


def number_of_blobs(drawn_HW: np.ndarray) -> int:
    """Connected areas; things in neighbouring cells may touch, so never more than things."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(drawn_HW), strict=True)}
    blobs = 0
    while left:
        blobs += 1
        edge = [left.pop()]
        while edge:
            y, x = edge.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            edge.extend(near)
    return blobs


def test_countries_are_spelt_as_emoji_sets_spell_them(tmp_path: Path) -> None:
    entries = [
        {"label": "flag: São Tomé & Príncipe", "hexcode": "1F1F8-1F1F9"},
        {"label": "flag: Andorra", "hexcode": "1F1E6-1F1E9"},
        {"label": "pirate flag", "hexcode": "1F3F4-200D-2620-FE0F"},
        {"label": "dog", "hexcode": "1F436"},
    ]
    (tmp_path / "en").mkdir()
    (tmp_path / "en/data.json").write_text(json.dumps(entries))
    andorra, sao_tome = flags.countries(tmp_path)
    assert (andorra.iso, andorra.slug) == ("ad", "andorra")
    assert (sao_tome.iso, sao_tome.slug) == ("st", "sao-tome-and-principe")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_each_task_can_be_learnt_and_no_test_image_is_a_training_image(task: str) -> None:
    train, test = load_task(task, "train"), load_task(task, "test")
    assert train.class_names == test.class_names
    assert train.counts.min() >= 15
    assert test.counts.min() >= 4
    assert all(train.image(index).size == (64, 64) for index in range(5))
    seen = {picture.content() for picture, _ in train.items}
    assert not any(picture.content() in seen for picture, _ in test.items)
