"""Task `letters`: which letter, capital or small? Test fonts are of other families than training's.

Fonts are listed by file and not found by looking: packages also hold fonts that draw pictures for
letters (URW's D050000L, Linux Biolinum Keyboard) and decorated initials. Families that descend from
one another, such as Hack from DejaVu, Carlito from Lato, and Nimbus Sans from the same Helvetica as
Liberation Sans, are on the same side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_lowercase

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medley.errors import DataError
from trainer.datasets import ImageSet, PixelPicture
from trainer.suite.drawing import jitter, pick_colour

__all__ = ["TEST_FONTS", "TRAIN_FONTS", "build"]

TEMPLATES = ("the letter {}", "a picture of the letter {}")
FONT_SIZE = 44
PAGE = 96
SEED = 4

TRAIN_FONTS = (
    "C059-BdIta.otf",
    "C059-Roman.otf",
    "Cantarell-ExtraBold.otf",
    "Cantarell-Regular.otf",
    "Carlito-Italic.ttf",
    "DejaVuSans-BoldOblique.ttf",
    "DejaVuSansCondensed.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "EBGaramond08-Italic.otf",
    "EBGaramond12-Bold.otf",
    "EBGaramond12-Regular.otf",
    "FreeMonoBold.ttf",
    "FreeSansOblique.ttf",
    "FreeSerif.ttf",
    "Hack-BoldItalic.ttf",
    "Hack-Regular.ttf",
    "Lato-Black.ttf",
    "Lato-Light.ttf",
    "Lato-MediumItalic.ttf",
    "LiberationMono-Italic.ttf",
    "LiberationSans-Bold.ttf",
    "LiberationSansNarrow-Regular.ttf",
    "LiberationSerif-BoldItalic.ttf",
    "LinBiolinum_R.otf",
    "LinBiolinum_RI.otf",
    "LinLibertine_R.otf",
    "LinLibertine_RZI.otf",
    "NimbusRoman-Italic.otf",
    "NimbusSansNarrow-Bold.otf",
    "NotoSans-Italic.ttf",
    "OpenSans-CondBold.ttf",
    "OpenSans-Light.ttf",
    "OpenSans-SemiboldItalic.ttf",
    "P052-Bold.otf",
    "P052-Italic.otf",
    "Quicksand-Bold.ttf",
    "Quicksand-Light.ttf",
    "URWBookman-DemiItalic.otf",
    "URWBookman-Light.otf",
)
TEST_FONTS = (
    "Caladea-Italic.ttf",
    "Caladea-Regular.ttf",
    "Comfortaa-Bold.ttf",
    "Comfortaa-Regular.ttf",
    "FiraCode-Bold.ttf",
    "FiraCode-Light.ttf",
    "Inter-Black.otf",
    "Inter-Italic.otf",
    "Inter-Regular.otf",
    "NotoSerif-Bold.ttf",
    "NotoSerifDisplay-Italic.ttf",
    "Roboto-Black.ttf",
    "Roboto-LightItalic.ttf",
    "RobotoCondensed-Regular.ttf",
    "URWGothic-Book.otf",
    "URWGothic-DemiOblique.otf",
    "Vollkorn-BoldItalic.ttf",
    "Vollkorn-Regular.ttf",
    "Z003-MediumItalic.otf",
)


def build(*packages: Path) -> tuple[ImageSet, ImageSet]:
    """Letters of `TRAIN_FONTS` and of `TEST_FONTS`, found anywhere in the font packages."""
    files = {file.name: file for package in packages for file in sorted(package.rglob("*.[ot]tf"))}
    generator = np.random.default_rng(SEED)
    train, test = (
        ImageSet(
            "letters", tuple(ascii_lowercase), TEMPLATES, list(_pictures(files, fonts, generator))
        )
        for fonts in (TRAIN_FONTS, TEST_FONTS)
    )
    return train, test


def _pictures(
    files: Mapping[str, Path], fonts: Sequence[str], generator: np.random.Generator
) -> Iterator[tuple[PixelPicture, int]]:
    if missing := sorted(set(fonts) - set(files)):
        raise DataError(f"letters: fonts not in their packages: {', '.join(missing)}")
    for name in fonts:
        font = ImageFont.truetype(
            files[name], FONT_SIZE, layout_engine=ImageFont.Layout.BASIC
        )  # the engine that every Pillow has: the same pixels everywhere
        for label, letter in enumerate(ascii_lowercase):
            for glyph in (letter.upper(), letter):
                drawing = _written(glyph, font, generator)
                paper = pick_colour(generator, 170, 256)
                yield PixelPicture(jitter(drawing, paper, generator=generator)), label


def _written(
    glyph: str, font: ImageFont.FreeTypeFont, generator: np.random.Generator
) -> Image.Image:
    """The glyph in a dark colour on a transparent page, cut so that case shows in the size."""
    page = Image.new("RGBA", (PAGE, PAGE))
    ink = pick_colour(generator, 0, 110)
    middle = PAGE // 2
    ImageDraw.Draw(page).text((middle, middle), glyph, font=font, fill=ink, anchor="mm")
    return page.crop((14, 14, PAGE - 14, PAGE - 14))
