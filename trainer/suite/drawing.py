"""From drawings and small grey pictures to the suite's 64 x 64 RGB pixels.

Every random choice comes from the generator that is handed in. Nothing here knows a task.
"""

from __future__ import annotations

import io

import numpy as np
import resvg_py
from numpy.typing import NDArray
from PIL import Image

__all__ = ["SIDE", "Colour", "Pixels", "from_grey", "jitter", "pick_colour", "render_svg"]

SIDE = 64
Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]


def render_svg(svg: str, width: int, height: int) -> Image.Image:
    """Rasterise an SVG text to RGBA; texts in it are not drawn: fonts differ between machines.

    Raises:
        ValueError: the text is not an SVG that the renderer understands.
    """
    png = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=width,
        height=height,
        skip_system_fonts=True,
        dpi=96,  # without it a drawing measured in millimetres has no size
    )
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def from_grey(grey_HW: Pixels) -> Pixels:
    """A small grey picture, enlarged to (64, 64, 3)."""
    image = Image.fromarray(grey_HW).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(image.convert("RGB"))


def pick_colour(generator: np.random.Generator, low: int, high: int) -> Colour:
    """A random colour with every channel in ``[low, high)``."""
    red, green, blue = (int(value) for value in generator.integers(low, high, 3))
    return red, green, blue


def jitter(
    drawing: Image.Image, background: Colour, *, generator: np.random.Generator, noise: float = 6.0
) -> Pixels:
    """Put an RGBA drawing on a background as a careless photographer would.

    Scaled to 60-100 % of the canvas, stretched by up to 15 %, turned by up to 12 degrees, shifted,
    lightened or darkened, with Gaussian noise of standard deviation `noise`; never mirrored, since
    left and right matter in flags and letters. Returns uint8 (64, 64, 3).
    """
    turned = _turned(_scaled(drawing, generator), generator)
    canvas = Image.new("RGB", (SIDE, SIDE), background)
    left, top = (int(generator.integers(0, SIDE + 1 - length)) for length in turned.size)
    canvas.paste(turned, (left, top), turned)
    light = np.asarray(canvas).astype(np.float64) * generator.uniform(0.75, 1.1)
    noisy = light + generator.normal(0, noise, light.shape) if noise else light
    return np.asarray(noisy.clip(0, 255).astype(np.uint8))


def _scaled(drawing: Image.Image, generator: np.random.Generator) -> Image.Image:
    width, height = drawing.size
    scale = generator.uniform(0.6, 1.0) * SIDE / max(width, height)
    stretch = generator.uniform(0.85, 1.15)
    size = max(8, int(width * scale)), max(8, int(height * scale * stretch))
    return drawing.resize(size, Image.Resampling.BICUBIC)


def _turned(drawing: Image.Image, generator: np.random.Generator) -> Image.Image:
    turned = drawing.rotate(
        generator.uniform(-12, 12), expand=True, resample=Image.Resampling.BICUBIC
    )
    turned.thumbnail((SIDE, SIDE))
    return turned
