"""Image files that have brought servers down, and good ones to compare with. No I/O."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

__all__ = ["Poison", "good_image", "poisons"]

BOMB_SIDE = 13_000  # 20 kB as a file, 500 MB as RGB


@dataclass(frozen=True)
class Poison:
    """A file, and whether it is an image that could be answered."""

    data: bytes
    readable: bool


def good_image(shade: int = 0, *, format: str = "PNG") -> bytes:
    """A small picture, another one for each shade."""
    return _saved(_picture(shade), format)


def poisons() -> Mapping[str, Poison]:
    """By what is wrong with them."""
    jpeg, grey16 = good_image(format="JPEG"), Image.new("I;16", (40, 40), 65535)
    frames = [_picture(shade) for shade in range(0, 160, 40)]
    gif = io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    return {
        "empty": Poison(b"", readable=False),
        "not an image": Poison(b"%PDF-1.7 this is no image", readable=False),
        "truncated JPEG": Poison(jpeg[: len(jpeg) // 2], readable=False),
        "truncated PNG": Poison(good_image()[:-40], readable=False),
        "PNG bomb": Poison(_png_bomb(BOMB_SIDE), readable=False),
        "1x1": Poison(_saved(Image.new("RGB", (1, 1)), "PNG"), readable=True),
        "1x5000": Poison(_saved(Image.new("RGB", (1, 5000)), "PNG"), readable=True),
        "16 bit": Poison(_saved(grey16, "PNG"), readable=True),
        "CMYK": Poison(_saved(_picture().convert("CMYK"), "JPEG"), readable=True),
        "palette": Poison(_saved(_picture().convert("P"), "PNG"), readable=True),
        "animated GIF": Poison(gif.getvalue(), readable=True),
    }


def _picture(shade: int = 0) -> Image.Image:
    ramp = Image.linear_gradient("L").resize((48, 48))
    return Image.merge("RGB", (ramp, ramp.rotate(90), Image.new("L", ramp.size, shade)))


def _saved(image: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def _png_bomb(side: int) -> bytes:
    """A square of one bit per pixel, all of it the same."""
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((side + 7) // 8 + 1) * side, 9)
    chunks = (_chunk(b"IHDR", head), _chunk(b"IDAT", pixels), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)
