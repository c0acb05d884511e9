"""The reference of a base: what pictures of no task look like to its frozen backbone.

Index 0 of the paper's autoencoders stands for "none of the tasks" and is learnt on TinyImageNet.
Ours are Gaussians (and for comparison autoencoders) of the pictures that the base itself was made
from. The one of medley-mini ships with it; ``python -m trainer.reference`` makes it, or that of
another backbone from a folder of pictures. What a selector does with it is `trainer/selectors.py`.

Legend: N images, F feature width.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from medley.backbone import MINI, Backbone, load_backbone
from medley.levels import AutoencoderLevel
from medley.mini import ASSETS
from medley.routed import RoutedModel
from trainer.checkpoint import make_folder, write_whole
from trainer.datasets import ImageSet, PixelPicture, open_dataset
from trainer.ddas import DEFAULT_CODE_SIZE, DEFAULT_FEATURES, Taps, fit_level, fit_plain_level
from trainer.gaussians import Gaussian
from trainer.pixels import pixels_of
from trainer.pretrain.augment import Chance, augment
from trainer.pretrain.config import PretrainConfig
from trainer.pretrain.workplace import Workplace
from trainer.sources import DEFAULT_CACHE

__all__ = ["FEATURES", "PAPER", "Reference", "load_reference", "make_reference", "save_reference"]

FEATURES = ("stem:mean", "block1:mean")
SHIPPED = ASSETS / "medley-mini-reference.safetensors"
IMAGES = 6000
BATCH = 32
CHUNK = 480  # pictures held in memory
AUTOENCODER_ITERATIONS = 3000


@dataclass(frozen=True)
class _Paper:
    """How the paper trains an autoencoder, arXiv:2403.11549: on features of our base instead."""

    feature: str = "block1:mean"
    code_size: int = 100
    learning_rate: float = 0.01
    iterations: int = 300
    reference_iterations: int = 1000


PAPER = _Paper()


@dataclass(frozen=True, eq=False)
class Reference:
    """What the frozen features of pictures of no task are like.

    Attributes:
        fingerprint: of the backbone that saw them.
        gaussians: by feature, with a ridge already.
        ddas: an autoencoder as a task's, for the comparison.
        paper: an autoencoder as the paper's, in units of the Gaussian of its feature.
    """

    fingerprint: str
    gaussians: Mapping[str, Gaussian]
    ddas: AutoencoderLevel
    paper: AutoencoderLevel

    def units(self, feature: str) -> tuple[Tensor, Tensor]:
        """Mean and deviation (F,) that errors of all tasks may be measured in."""
        return _units(self.gaussians[feature])


def make_reference(fingerprint: str, taps: Taps) -> Reference:
    """Fit a reference to features of pictures of no task.

    Args:
        fingerprint: of the backbone.
        taps: features (N, F) by name; at least `FEATURES`.
    """
    gaussians = {name: Gaussian.of(taps[name]).with_ridge() for name in FEATURES}
    (feature,) = DEFAULT_FEATURES
    return Reference(
        fingerprint,
        gaussians,
        ddas=fit_level(
            taps[feature],
            feature,
            code_size=DEFAULT_CODE_SIZE,
            seed=0,
            iterations=AUTOENCODER_ITERATIONS,
        ),
        paper=fit_plain_level(
            taps[PAPER.feature],
            PAPER.feature,
            units=_units(gaussians[PAPER.feature]),
            code_size=PAPER.code_size,
            seed=0,
            iterations=PAPER.reference_iterations,
            learning_rate=PAPER.learning_rate,
        ),
    )


def load_reference(backbone: Backbone, cache: Path = DEFAULT_CACHE) -> Reference | None:
    """The reference of a backbone: shipped, or made on this machine; None if there is none."""
    for path in (SHIPPED, _made(backbone.fingerprint, cache)):
        if path.exists():
            reference = _read(path)
            if reference.fingerprint == backbone.fingerprint:
                return reference
    return None


def save_reference(reference: Reference, path: Path) -> None:
    """Write it whole or not at all; float32, less than 1 MB for features of 256."""
    tensors = {
        f"gaussian.{feature}.{name}": getattr(gaussian, field).float()
        for feature, gaussian in reference.gaussians.items()
        for name, field in (("mean", "mean_F"), ("covariance", "covariance_FF"))
    }
    about = {"fingerprint": reference.fingerprint}
    for name in ("ddas", "paper"):
        level: AutoencoderLevel = getattr(reference, name)
        tensors |= {f"{name}.{field}": getattr(level, field) for field in level.TENSORS}
        about |= {f"{name}.feature": level.feature, f"{name}.center": repr(level.center)}
    about["images"] = str(next(iter(reference.gaussians.values())).images)
    make_folder(path.parent)
    write_whole(path, save(tensors, metadata=about))


def _read(path: Path) -> Reference:
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    return Reference(
        about["fingerprint"],
        {
            name: Gaussian(
                tensors[f"gaussian.{name}.mean"].double(),
                tensors[f"gaussian.{name}.covariance"].double(),
                int(about["images"]),
            )
            for name in FEATURES
        },
        *(_read_level(name, about, tensors) for name in ("ddas", "paper")),
    )


def _read_level(
    name: str, about: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> AutoencoderLevel:
    fields: dict[str, Any] = {
        field: tensors[f"{name}.{field}"] for field in AutoencoderLevel.TENSORS
    }
    center = float(about[f"{name}.center"])
    return AutoencoderLevel(feature=about[f"{name}.feature"], center=center, spread=1.0, **fields)


def _units(gaussian: Gaussian) -> tuple[Tensor, Tensor]:
    return gaussian.mean_F.float(), gaussian.covariance_FF.diagonal().sqrt().float()


def _made(fingerprint: str, cache: Path) -> Path:
    digest = fingerprint.partition(":")[2][:16]
    return cache.expanduser() / "references" / f"{digest}.safetensors"


def _corpus(cache: Path) -> Iterator[ImageSet]:
    """Pictures as medley-mini was trained on, augmented anew; `medley pretrain` rendered them."""
    place = Workplace(PretrainConfig(), cache)
    chance = Chance(place.config.seed, IMAGES)
    items = [place.plan.items[row] for row in place.plan.order[:IMAGES]]
    sets = {item.set_name: place.icon_set(item.set_name) for item in items}
    for start in range(0, IMAGES, CHUNK):
        drawn = [sets[item.set_name].pixels[item.row] for item in items[start : start + CHUNK]]
        pixels_BHWC = (augment(drawn, chance) * 255).byte().permute(0, 2, 3, 1)
        pictures = [(PixelPicture(pixels.numpy()), 0) for pixels in pixels_BHWC]
        yield ImageSet("corpus", ("icon",), ("{}",), pictures)


def _taps(backbone: Backbone, parts: Iterator[ImageSet]) -> Taps:
    model = RoutedModel(backbone, first_expert_block=1)
    found: dict[str, list[Tensor]] = {name: [] for name in FEATURES}
    for images in parts:
        for start in track(range(0, len(images), BATCH), images.name):
            rows = range(start, min(start + BATCH, len(images)))
            pixels_BCHW = backbone.normalise(pixels_of(backbone, images, rows))
            with torch.inference_mode():
                taps = model.frozen(pixels_BCHW, taps=FEATURES).taps
            for name, x_BF in taps.items():
                found[name].append(x_BF.cpu())
    return {name: torch.cat(x) for name, x in found.items()}


def main() -> None:
    """Two minutes on one core."""
    parser = argparse.ArgumentParser(prog="python -m trainer.reference")
    parser.add_argument("--backbone", default=MINI, help="as `load_backbone` takes it")
    parser.add_argument("--weights", type=Path, help="a file, instead of the backbone's own")
    parser.add_argument("--images", help="DATA, as for train; else the corpus of medley-mini")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--out", type=Path, help="else the cache, where it is found again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    backbone = load_backbone(arguments.backbone, weights=arguments.weights)
    images = arguments.images
    parts = iter([open_dataset(images, "train")]) if images else _corpus(arguments.cache)
    reference = make_reference(backbone.fingerprint, _taps(backbone, parts))
    path = arguments.out or _made(backbone.fingerprint, arguments.cache)
    save_reference(reference, path)
    Console().print(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
