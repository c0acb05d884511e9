"""medley/images.py: ordinary files as Pillow reads them, odd ones put right, bad ones refused."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform_v2
from PIL import Image, ImageOps

from medley.backbone import Backbone, load_backbone
from medley.errors import ImageError
from medley.images import DEFAULT_LIMITS, ImageLimits, decode
from medley.mini import MINI_PREPROCESS


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone()


def photo(size: tuple[int, int] = (40, 30)) -> Image.Image:
    width, height = size
    y_HW, x_HW = np.mgrid[0:height, 0:width]
    channels = [x_HW * 255 // width, y_HW * 255 // height, (x_HW * 7 + y_HW * 13) % 256]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def code_of(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, limits)
    return caught.value.code


def decode_or_code(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image | str:
    try:
        return decode(data, limits)
    except ImageError as error:
        return error.code


def png_chunk(kind: bytes, body: bytes) -> bytes:
    crc = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def zipped_rows(width: int, height: int) -> bytes:
    """Compress row by row, so that the test itself never holds the pixels."""
    squeeze = zlib.compressobj(9)
    row = bytes(1 + width)
    return b"".join(squeeze.compress(row) for _ in range(height)) + squeeze.flush()


def black_png(width: int, height: int, pixels: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def with_orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_an_ordinary_image_is_exactly_what_pillow_reads(kind: str) -> None:
    data = encode(photo(), kind)
    image = decode(data)
    assert image.mode == "RGB"
    assert image.tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (500, 375), (128, 128), (129, 127), (3, 90)])
def test_a_file_becomes_the_tensor_that_open_clip_s_preprocessing_makes_of_it(
    backbone: Backbone, size: tuple[int, int]
) -> None:
    transform = image_transform_v2(MINI_PREPROCESS, is_train=False)
    for kind in ("JPEG", "PNG"):
        data = encode(photo(size), kind)
        expected_CHW = transform(Image.open(io.BytesIO(data)))
        ours_BCHW = backbone.normalise(backbone.pixels(decode(data))[None])
        assert torch.equal(ours_BCHW[0], expected_CHW)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_1x1_image_is_fine(kind: str) -> None:
    assert decode(encode(photo((1, 1)), kind)).size == (1, 1)


def test_no_bytes_are_called_empty() -> None:
    assert code_of(b"") == "empty"


@pytest.mark.parametrize(
    "data",
    [b"hello", b"<svg/>", b"%PDF-1.7", b"PK\x03\x04", b"II*\0", b"\x80\x04pickle", bytes(1000)],
)
def test_what_is_not_an_accepted_format_is_called_so(data: bytes) -> None:
    assert code_of(data) == "not_an_image"


def test_more_bytes_than_the_limit_are_too_large() -> None:
    data = encode(photo(), "PNG")
    assert code_of(data, ImageLimits(max_bytes=len(data) - 1)) == "too_large"
    assert decode(data, ImageLimits(max_bytes=len(data))).size == (40, 30)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_more_pixels_than_the_limit_are_too_many(kind: str) -> None:
    data = encode(photo(), kind)
    assert code_of(data, ImageLimits(max_pixels=40 * 30 - 1)) == "too_many_pixels"
    assert decode(data, ImageLimits(max_pixels=40 * 30)).size == (40, 30)


@pytest.mark.parametrize(
    "options", [{"lossless": True}, {"lossless": False}, {"exif": b"Exif\0\0"}]
)
def test_every_kind_of_webp_tells_its_size_before_it_is_opened(options: dict[str, Any]) -> None:
    data = encode(photo(), "WEBP", **options)
    assert code_of(data, ImageLimits(max_pixels=40 * 30 - 1)) == "too_many_pixels"
    assert decode(data, ImageLimits(max_pixels=40 * 30)).size == (40, 30)


def test_a_20000_x_20000_png_of_one_colour_has_too_many_pixels() -> None:
    data = black_png(20_000, 20_000, zipped_rows(20_000, 20_000))
    assert len(data) < 1_000_000
    assert code_of(data) == "too_many_pixels"


def test_too_many_pixels_are_told_from_the_header_without_decoding_any() -> None:
    pixels = b"these are no compressed pixels"
    assert code_of(black_png(20_000, 20_000, pixels)) == "too_many_pixels"
    assert code_of(black_png(20, 20, pixels)) == "undecodable"


def test_a_strip_that_would_explode_when_its_short_side_is_scaled_up_is_refused() -> None:
    assert code_of(black_png(50_000, 1, zipped_rows(50_000, 1))) == "too_many_pixels"
    assert decode(black_png(200, 1, zipped_rows(200, 1))).size == (200, 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_truncated_file_is_refused_or_had_lost_no_pixel(kind: str) -> None:
    data = encode(photo(), kind)
    whole = decode(data).tobytes()
    for length in range(1, len(data)):
        result = decode_or_code(data[:length])
        if isinstance(result, str):
            assert result in {"undecodable", "not_an_image"}
        else:
            assert result.tobytes() == whole
            assert len(data) - length <= 20  # only checksums and the end mark were missing


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_half_a_file_is_undecodable(kind: str) -> None:
    data = encode(photo(), kind)
    assert code_of(data[: len(data) // 2]) == "undecodable"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_exif_orientation_is_applied_as_pillow_does(kind: str, orientation: int) -> None:
    data = encode(photo(), kind, exif=with_orientation(orientation))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert decode(data).size == expected.size
    assert decode(data).tobytes() == expected.tobytes()


def test_both_byte_orders_of_exif_are_read() -> None:
    body = struct.pack(">HHHIHH", 1, 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0MM\0*" + struct.pack(">I", 8) + body
    assert decode(encode(photo(), "JPEG", exif=exif)).size == (30, 40)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0"]
)
def test_damaged_exif_is_no_reason_to_refuse_a_picture(exif: bytes) -> None:
    assert decode(encode(photo(), "JPEG", exif=exif)).size == (40, 30)


def test_of_an_animated_gif_the_first_frame_is_the_image() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data).getcolors() == [(64, (255, 0, 0))]


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_of_an_animated_webp_or_png_the_first_frame_is_the_image(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode(data).getcolors() == [(64, (255, 0, 0))]


def test_a_gif_frame_larger_than_its_screen_is_held_to_the_limit_too() -> None:
    data = bytearray(encode(Image.new("P", (8, 8)), "GIF"))
    frame = data.index(b"\x2c")
    data[frame + 5 : frame + 9] = struct.pack("<HH", 65535, 65535)
    assert code_of(bytes(data)) == "too_many_pixels"
    data[frame + 5 : frame + 9] = struct.pack("<HH", 10_000, 9_000)
    assert code_of(bytes(data)) == "too_many_pixels"


def test_transparency_becomes_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    decoded = decode(encode(image, "PNG"))
    assert [decoded.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (255, 0, 0)]


def test_half_transparency_is_mixed_with_white() -> None:
    decoded = decode(encode(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "PNG"))
    assert decoded.getpixel((0, 0)) == (127, 127, 127)


def test_grey_with_alpha_becomes_white_where_transparent() -> None:
    decoded = decode(encode(Image.new("LA", (1, 1), (10, 0)), "PNG"))
    assert decoded.getpixel((0, 0)) == (255, 255, 255)


def test_a_palette_with_alpha_becomes_white_where_transparent() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    for x in range(3):
        image.putpixel((x, 0), x)
    decoded = decode(encode(image, "PNG", transparency=bytes([0, 255, 255])))
    colours = [decoded.getpixel((x, 0)) for x in range(3)]
    assert colours == [(255, 255, 255), (0, 255, 0), (0, 0, 255)]


def test_one_transparent_colour_of_a_png_becomes_white() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    decoded = decode(encode(image, "PNG", transparency=(1, 2, 3)))
    assert [decoded.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (9, 9, 9)]


def test_a_cmyk_jpeg_becomes_rgb() -> None:
    data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    red, green, blue = np.asarray(decode(data))[8, 8].tolist()
    assert red > 250
    assert green < 5
    assert blue < 5


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    grey_HW = np.array([[0, 127, 128, 257, 32_768, 65_280, 65_535]], dtype=np.uint16)
    decoded = np.asarray(decode(encode(Image.fromarray(grey_HW), "PNG")))
    assert decoded.shape == (1, 7, 3)
    assert decoded[0, :, 0].tolist() == [0, 0, 0, 1, 128, 254, 255]
    assert (decoded[..., 0] == decoded[..., 1]).all()
    assert (decoded[..., 0] == decoded[..., 2]).all()


def test_16_bit_grey_with_a_transparent_value_becomes_white_there() -> None:
    grey_HW = np.array([[0, 257]], dtype=np.uint16)
    data = encode(Image.fromarray(grey_HW), "PNG", transparency=0)
    assert np.asarray(decode(data))[0, :, 0].tolist() == [255, 1]


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA"])
def test_every_mode_of_png_becomes_rgb(mode: str) -> None:
    image = photo().convert(mode)
    decoded = decode(encode(image, "PNG"))
    assert decoded.mode == "RGB"
    assert decoded.tobytes() == image.convert("RGB").tobytes()


def after_the_head(data: bytes, head_bytes: int, insert: bytes) -> bytes:
    return data[:head_bytes] + insert + data[head_bytes:]


def gif_with(extension: bytes) -> bytes:
    data = encode(photo().convert("1"), "GIF")
    first_frame = data.index(b"," + struct.pack("<HHHH", 0, 0, 40, 30))
    return after_the_head(data, first_frame, extension)


def jpeg_with(segments: bytes, head_bytes: int = 2) -> bytes:
    return after_the_head(encode(photo(), "JPEG"), head_bytes, segments)


def png_with(chunks: bytes) -> bytes:
    return after_the_head(encode(photo(), "PNG"), 33, chunks)


def progressive_jpeg(extra_scans: int) -> bytes:
    data = encode(photo().convert("L"), "JPEG", progressive=True)
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last_scan * extra_scans + b"\xff\xd9"


def test_a_jpeg_with_endless_scans_is_refused_as_each_costs_a_pass_over_all_pixels() -> None:
    assert decode(progressive_jpeg(40)).size == (40, 30)
    assert code_of(progressive_jpeg(50)) == "undecodable"
    assert code_of(progressive_jpeg(50_000)) == "undecodable"


MISCHIEF: dict[str, tuple[Callable[[int], bytes], int]] = {
    "jpeg-segments": (lambda n: jpeg_with(b"\xff\xe5\0\2" * n), 2_000),
    "jpeg-fill": (lambda n: jpeg_with(b"\xff" * n), 65),
    "jpeg-restarts": (lambda n: jpeg_with(b"\xff\xd0" * n), 32),
    "jpeg-junk": (lambda n: jpeg_with(bytes(n), head_bytes=20), 64),
    "png-chunks": (lambda n: png_with(png_chunk(b"prIv", b"") * n), 20_000),
    "gif-comment": (lambda n: gif_with(b"!\xfe" + b"\1x" * n + b"\0"), 5_000),
    "gif-extensions": (lambda n: gif_with(b"!\1\1x\0" * n), 2_500),
    "gif-junk": (lambda n: gif_with(bytes(n)), 5_000),
}


@pytest.mark.parametrize(("build", "limit"), MISCHIEF.values(), ids=MISCHIEF.keys())
def test_a_file_with_parts_out_of_all_proportion_is_refused(
    build: Callable[[int], bytes], limit: int
) -> None:
    assert decode(build(limit // 2)).size == (40, 30)
    assert code_of(build(limit + 1)) == "undecodable"


def test_megabytes_of_ordinary_metadata_are_no_mischief() -> None:
    jpeg = jpeg_with((b"\xff\xe5\xff\xff" + bytes(65533)) * 100)
    png = png_with(png_chunk(b"prIv", bytes(1_000)) * 5_000)
    gif = gif_with(b"!\xfe" + (b"\xff" + bytes(255)) * 4_000 + b"\0")
    for data in (jpeg, png, gif):
        assert decode(data).size == (40, 30)


def test_a_run_length_compressed_bmp_is_refused_as_it_would_be_decoded_byte_by_byte() -> None:
    data = bytearray(encode(photo().convert("P"), "BMP"))
    data[30] = 1
    assert code_of(bytes(data)) == "undecodable"


SEEDS = [
    encode(photo((9, 7)), "JPEG", exif=with_orientation(6)),
    encode(photo((9, 7)), "JPEG", progressive=True),
    encode(photo((9, 7)), "PNG"),
    encode(photo((9, 7)).convert("P"), "PNG", transparency=3),
    encode(Image.fromarray(np.arange(63, dtype=np.uint16).reshape(7, 9) * 1000), "PNG"),
    encode(photo((9, 7)), "WEBP"),
    encode(photo((9, 7)).convert("RGBA"), "WEBP", lossless=True),
    encode(photo((9, 7)), "GIF"),
    encode(photo((9, 7)), "BMP"),
    encode(photo((9, 7)).convert("P"), "BMP"),
]
HEADS = [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBPVP8 ", b"GIF89a", b"BM"]


def check_image_or_image_error(data: bytes) -> None:
    result = decode_or_code(data, ImageLimits(max_pixels=1_000_000))
    if isinstance(result, str):
        assert result in {"empty", "too_large", "too_many_pixels", "not_an_image", "undecodable"}
    else:
        assert result.mode == "RGB"
        assert len(result.tobytes()) == 3 * result.width * result.height


@given(head=st.sampled_from(HEADS), rest=st.binary(max_size=300))
def test_any_bytes_give_an_rgb_image_or_an_image_error(head: bytes, rest: bytes) -> None:
    check_image_or_image_error(head + rest)


@settings(max_examples=500)
@given(
    data=st.sampled_from(SEEDS),
    flips=st.lists(st.tuples(st.integers(0, 2_000), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.integers(0, 40),
)
def test_a_mutated_image_gives_an_rgb_image_or_an_image_error(
    data: bytes, flips: list[tuple[int, int]], cut: int
) -> None:
    mutated = bytearray(data)
    for place, value in flips:
        mutated[place % len(mutated)] = value
    check_image_or_image_error(bytes(mutated[: len(mutated) - cut]))
