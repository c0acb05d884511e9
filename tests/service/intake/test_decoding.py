"""The decode threads: sources, time limits, cancellation."""

import asyncio
import base64
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from PIL import Image

from medley.backbone import Backbone
from medley.errors import ImageError
from medley.images import ImageLimits
from service.intake.decoding import Decoding
from service.intake.forms import Base64, DataUri
from service.signals.metrics import Metrics

LONG_S = 3600.0


class Gate:
    """A preprocessing that waits to be let through; remembers the width of what came."""

    def __init__(self, crop: Callable[[Image.Image], Image.Image]) -> None:
        self.widths: list[int] = []
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self._crop = crop

    def __call__(self, image: Image.Image) -> Image.Image:
        self.widths.append(image.width)
        self.entered.release()
        self.open.wait()
        return self._crop(image)


@contextmanager
def decoding(backbone: Backbone, *, timeout_s: float = LONG_S) -> Iterator[Decoding]:
    pool = Decoding(
        backbone, threads=1, timeout_s=timeout_s, limits=ImageLimits(), metrics=Metrics()
    )
    try:
        yield pool
    finally:
        pool.close()


@contextmanager
def gated(backbone: Backbone, *, timeout_s: float = LONG_S) -> Iterator[tuple[Decoding, Gate]]:
    gate = Gate(backbone.crop)
    with decoding(replace(backbone, crop=gate), timeout_s=timeout_s) as pool:
        try:
            yield pool, gate
        finally:
            gate.open.set()


def picture(width: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, 20), "red").save(file, "PNG")
    return file.getvalue()


def test_a_file_its_base64_and_its_data_uri_give_the_backbone_s_pixels(
    backbone: Backbone, image: bytes
) -> None:
    text = base64.b64encode(image).decode()
    sources: list[bytes | Base64 | DataUri] = [
        *(image, Base64(text), DataUri(f"data:image/png;base64,{text}")),
        *(DataUri(f"DATA:;BASE64,{text}"), DataUri(f"data:image/png;charset=x;base64,{text}")),
    ]

    async def run() -> list[torch.Tensor]:
        return [await pool.pixels(source) for source in sources]

    with decoding(backbone) as pool:
        found = asyncio.run(run())

    expected = backbone.pixels(Image.open(io.BytesIO(image)).convert("RGB"))
    assert all(torch.equal(pixels, expected) for pixels in found)


@pytest.mark.parametrize(
    ("source", "code"),
    [
        (b"no image", "not_an_image"),
        (Base64("?"), "bad_base64"),
        (Base64("\u00e9"), "bad_base64"),
        (Base64(""), "empty"),
        (DataUri("data:image/png;base64,?"), "bad_base64"),
        (DataUri("data:image/png,%89PNG"), "bad_data_uri"),
        (DataUri("data:image/png;base64"), "bad_data_uri"),
        (DataUri("http://example.org/;base64,AAAA"), "bad_data_uri"),
        (DataUri(f"data:{'x' * 1000};base64,AAAA"), "bad_data_uri"),
        (DataUri(""), "bad_data_uri"),
    ],
)
def test_what_is_no_image_is_an_image_s_error(
    backbone: Backbone, source: bytes | Base64 | DataUri, code: str
) -> None:
    with decoding(backbone) as pool, pytest.raises(ImageError) as caught:
        asyncio.run(pool.pixels(source))

    assert caught.value.code == code
    assert pool.waiting == 0


def test_an_image_that_takes_too_long_is_given_up_while_its_thread_goes_on(
    backbone: Backbone,
) -> None:
    """The time of the one behind it begins when the thread takes it, so it is not given up too."""

    async def run() -> torch.Tensor:
        with pytest.raises(ImageError) as caught:
            await pool.pixels(picture(21))
        assert caught.value.code == "decode_timeout"
        second = asyncio.ensure_future(pool.pixels(picture(22)))
        await asyncio.sleep(0)  # it is in line now
        gate.open.set()
        return await second

    with gated(backbone, timeout_s=0.05) as (pool, gate):
        assert asyncio.run(run()).dtype == torch.uint8
    assert gate.widths == [21, 22]


def test_an_image_that_nobody_wants_any_more_is_not_begun(backbone: Backbone) -> None:
    async def run() -> None:
        first, second = (asyncio.ensure_future(pool.pixels(picture(w))) for w in (21, 22))
        await asyncio.to_thread(gate.entered.acquire)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        gate.open.set()
        await first
        await pool.pixels(picture(23))

    with gated(backbone) as (pool, gate):
        asyncio.run(run())
    assert gate.widths == [21, 23]
    assert pool.waiting == 0
