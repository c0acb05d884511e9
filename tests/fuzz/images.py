"""Damaged pictures, and what decoding may do: give an image or an ImageError, in little time."""

from __future__ import annotations

import io
import struct
import time
import zlib
from random import Random

import numpy as np
from PIL import Image

from medley.errors import ImageError
from medley.images import decode
from tests.fuzz.mutation import mutated

__all__ = ["MAX_CPU_S", "Images", "corpus"]

MAX_CPU_S = 10.0  # of 50 megapixels, the most that a header may claim


class Images:
    """Decoding as a target."""

    def __init__(self) -> None:
        self._corpus = corpus()

    def make(self, random: Random) -> bytes:
        """One mutant; half of the PNGs get checksums that are right, or nothing deep is reached."""
        mutant = mutated(random.choice(self._corpus), self._corpus, random)
        return with_checksums(mutant) if random.random() < 0.5 else mutant

    def check(self, data: bytes) -> str:
        """Decode; returns what became of it."""
        start_s = time.thread_time()
        try:
            image = decode(data)
        except ImageError as error:
            outcome = error.code
        else:
            assert image.mode == "RGB"
            assert image.width * image.height <= 50_000_000
            outcome = "image"
        took_s = time.thread_time() - start_s
        assert took_s < MAX_CPU_S, f"decoding took {took_s:.1f} s"
        return outcome


def corpus() -> list[bytes]:
    """Small pictures in every format and most of their variants."""
    noise_HWC = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)
    rgba = Image.fromarray(noise_HWC)
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    deep = Image.fromarray(noise_HWC[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    several = {"save_all": True, "append_images": [rgb.rotate(180), rgb]}
    variants: list[tuple[Image.Image, str, dict[str, object]]] = [
        (rgb, "JPEG", {}),
        (rgb, "JPEG", {"progressive": True, "quality": 40}),
        (rgb, "JPEG", {"exif": exif, "subsampling": 2, "optimize": True}),
        (grey, "JPEG", {"restart_marker_blocks": 1}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (rgb, "PNG", {}),
        (rgba, "PNG", {"exif": exif}),
        (rgb.quantize(16), "PNG", {"transparency": 3}),
        (grey, "PNG", {"transparency": 7}),
        (grey.convert("1"), "PNG", {}),
        (deep, "PNG", {}),
        (rgb, "PNG", several),
        (rgb, "WEBP", {"quality": 50}),
        (rgba, "WEBP", {"lossless": True, "exif": exif}),
        (rgb, "WEBP", several),
        (rgb, "GIF", {}),
        (rgb, "GIF", several | {"transparency": 0, "disposal": 2}),
        (rgb, "BMP", {}),
        (rgb.quantize(16), "BMP", {}),
        (grey.convert("1"), "BMP", {}),
        (rgba, "BMP", {}),
    ]
    return [_saved(image, kind, options) for image, kind, options in variants]


def with_checksums(data: bytes) -> bytes:
    """The same file with right checksums, if it is a PNG whose chunks can be walked."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    parts, place = [data[:8]], 8
    while place + 12 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        body = data[place + 4 : place + 8 + size]
        parts += [data[place : place + 4], body, struct.pack(">I", zlib.crc32(body))]
        place += 12 + size
    return b"".join([*parts, data[place:]])


def _saved(image: Image.Image, kind: str, options: dict[str, object]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
