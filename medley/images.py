"""Bytes to pixels: one untrusted file in, one upright RGB image out, or an ImageError.

Used by trainer and service alike, so that a picture is the same picture in both. Not a place for
resizing or normalising: that is the backbone's preprocessing.

Accepted are JPEG, PNG, WebP, GIF and BMP, told by their first bytes. TIFF is left out on purpose:
dozens of codecs, several pages, and samples without a range that could be shown as 8 bit.
Of an animation the first frame is the image; the others are never decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from medley.errors import ImageError
from medley.image_parts import check_parts

__all__ = ["DEFAULT_LIMITS", "ImageLimits", "decode"]


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What one image may cost.

    `max_aspect` bounds long side / short side: the backbone scales the short side up to its input
    size, so that a strip of 1 x 50,000,000 pixels would grow a thousandfold after decoding.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_aspect: int = 200


DEFAULT_LIMITS = ImageLimits()


def decode(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Decode one image file completely.

    Returns:
        An RGB image, upright by its EXIF orientation, transparency put on white, 16-bit grey scaled
        to 8 bit. For an ordinary RGB file exactly what Pillow's ``convert("RGB")`` gives.

    Raises:
        ImageError: with code `empty`, `too_large` (bytes), `too_many_pixels` (told from the header,
            before anything is decoded), `not_an_image` (none of the accepted formats) or
            `undecodable` (damaged, truncated, or made to take a decoder hours).
    """
    if not data:
        raise ImageError("the image is empty (0 bytes)", code="empty")
    if len(data) > limits.max_bytes:
        raise ImageError(
            f"the image has {len(data)} bytes, the limit is {limits.max_bytes}", code="too_large"
        )
    open_file = _opener(data)
    check_parts(data)
    try:
        image = _load(open_file, data, limits)
        return _upright(_to_rgb(image), image.info.get("exif", b""))
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # A GIF frame larger than its screen: Pillow enlarges the screen and does its own check.
        raise ImageError("the image has too many pixels", code="too_many_pixels") from error
    except Exception as error:
        # Decoders of damaged files raise whatever they stumble on (OSError, SyntaxError,
        # struct.error, IndexError, ...): here is the border where all of it becomes one error.
        raise ImageError("the image is damaged or truncated", code="undecodable") from error


class _JpegFile(JpegImageFile):
    """Pillow reads EXIF while opening a JPEG, only for its dpi, and warns when EXIF is damaged."""

    def getexif(self) -> Image.Exif:
        return Image.Exif()


# The classes themselves and not Image.open: it warns or raises by its own global pixel limit, and
# it tries every format it knows.
_OPENERS: list[tuple[Callable[[bytes], bool], Callable[[BytesIO], Image.Image]]] = [
    (lambda head: head.startswith(b"\xff\xd8\xff"), _JpegFile),
    (lambda head: head.startswith(b"\x89PNG\r\n\x1a\n"), PngImageFile),
    (lambda head: head.startswith(b"RIFF") and head[8:12] == b"WEBP", WebPImageFile),
    (lambda head: head.startswith((b"GIF87a", b"GIF89a")), GifImageFile),
    (lambda head: head.startswith(b"BM"), BmpImageFile),
]


def _opener(data: bytes) -> Callable[[BytesIO], Image.Image]:
    for matches, open_file in _OPENERS:
        if matches(data[:16]):
            return open_file
    raise ImageError(
        "not an image of a known format (JPEG, PNG, WebP, GIF, BMP)", code="not_an_image"
    )


def _load(
    open_file: Callable[[BytesIO], Image.Image], data: bytes, limits: ImageLimits
) -> Image.Image:
    if open_file is WebPImageFile:
        _check_size(_webp_size(data), limits)  # opening a WebP already allocates its canvas
    image = open_file(BytesIO(data))
    _check_size(image.size, limits)
    image.load()
    return image


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise ImageError(
            f"the image is {width} x {height} = {width * height} pixels, "
            f"the limit is {limits.max_pixels}",
            code="too_many_pixels",
        )
    if max(size) > limits.max_aspect * min(size):
        raise ImageError(
            f"the image is {width} x {height}: more than {limits.max_aspect} times as long as wide",
            code="too_many_pixels",
        )


def _webp_size(data: bytes) -> tuple[int, int]:
    """Read width and height of a WebP's first chunk. Source: RFC 9649, sections 2.5 to 2.7."""
    kind = data[12:16]
    if kind == b"VP8X":
        width = int.from_bytes(data[24:27], "little") + 1
        return width, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _grey16_to_rgb(image)
    if "A" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    """Scale 0..65535 to 0..255, rounded; Pillow's own conversion clips everything above 255."""
    grey_HW = np.asarray(image).astype(np.uint32)
    byte_HW = ((grey_HW + 128) // 257).astype(np.uint8)
    if "transparency" in image.info:
        byte_HW[grey_HW == image.info["transparency"]] = 255
    return Image.fromarray(byte_HW).convert("RGB")


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image, exif: bytes) -> Image.Image:
    turn = _TURNS.get(_orientation(exif))
    return image if turn is None else image.transpose(turn)


def _orientation(exif: bytes) -> int:
    """Read tag 0x0112 of the first directory, 1 (upright) when EXIF is absent or damaged.

    Pillow's reader is not used: it warns about damage through the process-wide warnings filter,
    and a bad EXIF block is no reason to refuse a good picture. Source: TIFF 6.0, section 2.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2], "")
    if not order:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, start)
        for index in range(entries):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, start + 2 + 12 * index)
            if tag == 0x0112:
                return int(value)
    except struct.error:
        return 1
    return 1
