"""What decoding a JPEG costs by several decoders, and whether they give the same pixels.

    python -m service.experiments.decode [PICTURE]

Each way goes from a JPEG to the uint8 pixels that a backbone takes, on one thread, in turns; ratios
are medians over the turns of one run. Without a picture it is noise whose spectrum falls like 1/f,
as that of photographs does; quality 90, 4:2:0.
"""

from __future__ import annotations

import io
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import simplejpeg
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as tv

from medley.images import ImageLimits, decode

SIZES = ((500, 375), (1920, 1280), (4000, 3000))
INPUTS = (128, 224)  # medley-mini's, and the usual CLIP's
ROUNDS = 15
SECONDS = 0.2  # each way, each turn, at least once
LIMITS = ImageLimits()

Crop = Callable[[Image.Image], Image.Image]
Way = Callable[[bytes, Crop, int], Tensor]


@dataclass(frozen=True)
class Cost:
    """What one way takes, and how far its pixels are from those of the first way."""

    seconds: float
    ratio: float
    largest_difference: int
    mean_difference: float


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    picture = Image.open(sys.argv[1]).convert("RGB") if len(sys.argv) > 1 else noise(SIZES[-1])
    console = Console()
    for size in SIZES:
        data = jpeg(picture.resize(size, Image.Resampling.LANCZOS))
        for pixels in INPUTS:
            title = f"{size[0]} x {size[1]}, {len(data) / 1000:.0f} kB, to {pixels} x {pixels}"
            console.print(_table(title, measured(data, pixels)))


def measured(data: bytes, pixels: int) -> dict[str, Cost]:
    """What each way costs for one file."""
    crop = cropped(pixels)
    runs = {name: partial(way, data, crop, pixels) for name, way in WAYS.items()}
    results = {name: run().int() for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in track(range(ROUNDS), description=f"{len(data)} bytes", transient=True):
        for name, run in runs.items():
            seconds[name].append(_seconds(run))
    first = next(iter(WAYS))
    costs = {}
    for name, taken in seconds.items():
        ratios = [base / own for base, own in zip(seconds[first], taken, strict=True)]
        apart = (results[name] - results[first]).abs()
        costs[name] = Cost(
            statistics.median(taken),
            statistics.median(ratios),
            int(apart.max()),
            apart.float().mean().item(),
        )
    return costs


def pillow(data: bytes, crop: Crop, pixels: int) -> Tensor:
    """As the server does it."""
    return _tensor(crop(decode(data, LIMITS)))


def pillow_bare(data: bytes, crop: Crop, pixels: int) -> Tensor:
    """Without our checks of the file."""
    return _tensor(crop(Image.open(io.BytesIO(data)).convert("RGB")))


def pillow_draft(data: bytes, crop: Crop, pixels: int, *, gap: int) -> Tensor:
    """Scaled down while decoding, to no less than `gap` times the input."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (gap * pixels, gap * pixels))
    return _tensor(crop(image.convert("RGB")))


def simple_jpeg(data: bytes, crop: Crop, pixels: int) -> Tensor:
    """Libjpeg-turbo's own interface, resized by Pillow."""
    return _tensor(crop(Image.fromarray(simplejpeg.decode_jpeg(data))))


def simple_jpeg_scaled(data: bytes, crop: Crop, pixels: int, *, gap: int) -> Tensor:
    """The same, scaled down while decoding."""
    image_HWC = simplejpeg.decode_jpeg(data, min_height=gap * pixels, min_width=gap * pixels)
    return _tensor(crop(Image.fromarray(image_HWC)))


def torchvision_pillow(data: bytes, crop: Crop, pixels: int) -> Tensor:
    """The decoder of torchvision, resized by Pillow."""
    return _tensor(crop(tv.to_pil_image(_decode_tv(data))))


def torchvision(data: bytes, crop: Crop, pixels: int) -> Tensor:
    """All of it in torchvision."""
    image_CHW = tv.resize(
        _decode_tv(data), [pixels], interpolation=tv.InterpolationMode.BICUBIC, antialias=True
    )
    return tv.center_crop(image_CHW, [pixels])


WAYS: dict[str, Way] = {
    "Pillow, as served": pillow,
    "Pillow, unchecked": pillow_bare,
    "Pillow, draft to input": partial(pillow_draft, gap=1),
    "Pillow, draft to 2 x input": partial(pillow_draft, gap=2),
    "simplejpeg + Pillow": simple_jpeg,
    "simplejpeg, scaled to 2 x input": partial(simple_jpeg_scaled, gap=2),
    "torchvision + Pillow": torchvision_pillow,
    "torchvision": torchvision,
}


def noise(size: tuple[int, int]) -> Image.Image:
    """A picture whose amplitudes fall like 1/f, the same in each run."""
    width, height = size
    random = np.random.default_rng(0)
    frequency_HW = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency_HW[0, 0] = 1.0
    grey_HW, *colours = (_noise(random, frequency_HW, size) for _ in range(4))
    image_HWC = np.stack([128 + 45 * grey_HW + 12 * colour_HW for colour_HW in colours], axis=-1)
    return Image.fromarray(image_HWC.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    """The picture as a camera or a web page has it."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def cropped(pixels: int) -> Crop:
    """open_clip's own resize and crop, without its tensor and its normalisation."""
    resize, crop, *_ = image_transform_v2(PreprocessCfg(size=pixels), is_train=False).transforms
    return lambda image: crop(resize(image))


def _noise(
    random: np.random.Generator, frequency_HW: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    angle_HW = random.uniform(0, 2 * np.pi, frequency_HW.shape)
    field_HW = np.fft.irfft2(np.exp(1j * angle_HW) / frequency_HW, s=size[::-1])
    return (field_HW - field_HW.mean()) / field_HW.std()


def _decode_tv(data: bytes) -> Tensor:
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _seconds(run: Callable[[], Tensor]) -> float:
    """Mean time of one go."""
    count, start_s = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start_s < SECONDS:
        run()
        count += 1
    return (time.perf_counter() - start_s) / count


def _table(title: str, costs: dict[str, Cost]) -> Table:
    table = Table("way", "ms", "times as fast", "pixels differ by up to", "mean", title=title)
    for name, cost in costs.items():
        differs = (str(cost.largest_difference), f"{cost.mean_difference:.2f}")
        table.add_row(name, f"{1000 * cost.seconds:.2f}", f"{cost.ratio:.2f}", *differs)
    return table


if __name__ == "__main__":
    main()
