"""The images that are sent: made, not photographed, but as heavy to decode as photographs.

Noise whose amplitude falls with frequency, as that of photographs does, a little steeper than 1/f:
at quality 90 a picture of 500 x 375 takes 70 kB. White noise would be several times as slow.

Legend: H height, W width.
"""

from __future__ import annotations

import io
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Form", "write_images"]

PHOTO_SIZE = (500, 375)  # width, height: the usual photograph of ImageNet
QUALITY = 90
STEEPNESS = 1.4


class Form(StrEnum):
    """How an image travels: a photograph as JPEG, or pixels of the input size as BMP, undecoded."""

    JPEG = "jpeg"
    PIXELS = "pixels"

    @property
    def content_type(self) -> str:
        """Of the request's body."""
        return "image/jpeg" if self is Form.JPEG else "image/bmp"


def write_images(
    folder: Path, form: Form, count: int, *, input_size: tuple[int, int]
) -> list[Path]:
    """Write images into a new folder.

    Args:
        folder: where to.
        form: what they are.
        count: how many different ones.
        input_size: height and width that the backbone takes, for `Form.PIXELS`.
    """
    folder.mkdir(parents=True)
    height, width = input_size
    size = PHOTO_SIZE if form is Form.JPEG else (width, height)
    paths = []
    for seed in range(count):
        path = folder / f"{seed}.{form.content_type.removeprefix('image/')}"
        path.write_bytes(_file(_picture(size, seed), form))
        paths.append(path)
    return paths


def _picture(size: tuple[int, int], seed: int) -> NDArray[np.uint8]:
    """Draw a picture (H, W, 3)."""
    width, height = size
    chance = np.random.default_rng(seed)
    frequency_HW = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency_HW[0, 0] = 1.0
    white_3HW = np.fft.fft2(chance.normal(size=(3, height, width)))
    pink_3HW = np.fft.ifft2(white_3HW / frequency_HW**STEEPNESS).real
    grey_HW, colour_3HW = pink_3HW.mean(0), pink_3HW - pink_3HW.mean(0)
    mixed_3HW = grey_HW + 0.3 * colour_3HW  # photographs are mostly grey
    scaled_3HW = 128 + 50 * (mixed_3HW - mixed_3HW.mean()) / mixed_3HW.std()
    return scaled_3HW.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def _file(picture_HW3: NDArray[np.uint8], form: Form) -> bytes:
    buffer, image = io.BytesIO(), Image.fromarray(picture_HW3)
    if form is Form.JPEG:
        image.save(buffer, "JPEG", quality=QUALITY)
    else:
        image.save(buffer, "BMP")
    return buffer.getvalue()
