"""The few images that ship with the repository, made anew from the pinned packages.

``python -m trainer.suite.demo_slice demo`` writes ``demo/fashion`` and ``demo/flags``: a slice of
two tasks of the suite, small enough to commit. Only what may be redistributed is used.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.sources import fetch, source
from trainer.suite import flags, grey
from trainer.suite.icons import IconSet

__all__ = ["COUNTRIES", "write_demo"]

_CODES = """
    at au be br ca ch cl cn co cu cz de dk eg es fi fr gb ge gr hr il in
    it jm jp ke kr lk ma mx ng nl no np pk pl pt sa se th tr ua us uy vn
    za zw
"""
COUNTRIES = tuple(_CODES.split())
TRAIN_STYLES = tuple(style for style in flags.TRAIN_STYLES if style[0] != "emojione")
TEST_STYLES = tuple(
    style for style in flags.TEST_STYLES if style[0] != "openmoji"
)  # CC-BY-SA: not shipped
TRAIN_COPIES = 4
TEST_COPIES = 3
TRAIN_GARMENTS = 100
TEST_GARMENTS = 20
PALETTE = 64
SEED = 0


def write_demo(folder: Path) -> None:
    """Write both tasks under `folder`, replacing what is there."""
    write_fashion(folder / "fashion")
    write_flags(folder / "flags")


def write_fashion(folder: Path) -> None:
    """Fashion-MNIST as it is, 28 x 28 grey: the first images of each class in a seeded order."""
    shutil.rmtree(folder, ignore_errors=True)
    generator = np.random.default_rng(SEED)
    package = fetch(source("fashion-mnist"))
    for split, part, count in (("train", "train", TRAIN_GARMENTS), ("test", "t10k", TEST_GARMENTS)):
        grey_NHW, labels_N = grey.read_fashion(package, part)
        for label, name in enumerate(grey.FASHION):
            for index in generator.permutation(np.flatnonzero(labels_N == label))[:count]:
                _save(
                    Image.fromarray(grey_NHW[index]), folder / split / _slug(name), f"{index:05d}"
                )
    _write_classes(folder, {_slug(name): name for name in grey.FASHION}, grey.FASHION_TEMPLATES)


def write_flags(folder: Path) -> None:
    """Flags of `COUNTRIES`; jittered without noise and in few colours, which PNG packs tightly."""
    shutil.rmtree(folder, ignore_errors=True)
    generator = np.random.default_rng(SEED)
    by_iso = {country.iso: country for country in flags.countries(fetch(source("emojibase")))}
    chosen = [by_iso[iso] for iso in COUNTRIES]
    icons = {name: IconSet(fetch(source(name))) for name, _ in (*TRAIN_STYLES, *TEST_STYLES)}
    for split, styles, copies in (
        ("train", TRAIN_STYLES, TRAIN_COPIES),
        ("test", TEST_STYLES, TEST_COPIES),
    ):
        for country in chosen:
            _save_flags(country, icons, styles, copies, folder / split / country.iso, generator)
    _write_classes(folder, {country.iso: country.name for country in chosen}, flags.TEMPLATES)


def _save_flags(
    country: flags.Country,
    icons: dict[str, IconSet],
    styles: Sequence[flags.Style],
    copies: int,
    folder: Path,
    generator: np.random.Generator,
) -> None:
    for number, style in enumerate(styles):
        for drawing in flags.drawings(country, icons, [style]):
            for copy in range(copies):
                pixels_HWC = flags.photographed(drawing, generator, noise=0)
                few = Image.fromarray(pixels_HWC).quantize(PALETTE, dither=Image.Dither.NONE)
                _save(few, folder, f"{style[0]}-{number}-{copy}")


def _save(image: Image.Image, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / f"{name}.png", optimize=True)


def _write_classes(folder: Path, names: dict[str, str], templates: Sequence[str]) -> None:
    text = json.dumps({"names": names, "templates": list(templates)}, indent=2, ensure_ascii=False)
    (folder / "classes.json").write_text(text + "\n", encoding="utf-8")


def _slug(name: str) -> str:
    return name.replace(" ", "_")


if __name__ == "__main__":
    write_demo(Path(sys.argv[1]))
