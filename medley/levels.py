"""Levels, what a selector is made of: one frozen feature, and how strange an image is in it.

A closed family of three kinds. Each has a raw error of its own, smaller where an image is more
familiar; what makes it a score is the same for all. Nothing is fitted here, that is
`trainer/ddas.py`, and nothing decided, that is `medley/selector.py`.

Legend: B images, G levels of a group, F feature width, C code width, K classes or prototypes,
W width of what is whitened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kernels.autoencoder_errors import Output, autoencoder_errors

__all__ = ["AutoencoderLevel", "GaussianLevel", "Level", "PrototypeLevel", "Scale", "Scored"]

Scale = Literal["log", "linear"]
Scored = Callable[[Tensor], Tensor]  # features (B, F) to float32: (B, G), or (B,) of one level

_MOST_STACKED = 2**20  # numbers of an encoder: a stack is a copy of all the autoencoders in it
_SMALLEST_ERROR = torch.finfo(torch.float32).tiny  # keeps the logarithm finite


@dataclass(frozen=True, eq=False, kw_only=True)
class _Level:
    """A raw error of a feature, and what makes it a score: (log error - center) / spread."""

    TENSORS: ClassVar[tuple[str, ...]]

    feature: str  # name of a tap, such as "stem:mean_std"
    center: float
    spread: float

    def __post_init__(self) -> None:
        for name, tensor, shape in zip(self.TENSORS, self.tensors, self._shapes(), strict=True):
            if tensor.shape != shape:
                raise ValueError(
                    f"{self.feature}: {name} has shape {tuple(tensor.shape)}, expected {shape}"
                )
        if not (math.isfinite(self.center) and math.isfinite(self.spread) and self.spread > 0):
            raise ValueError(
                f"{self.feature}: center {self.center} and spread {self.spread} must be finite, "
                "spread positive"
            )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What was fitted, in the order of `TENSORS`."""
        return tuple(getattr(self, name) for name in self.TENSORS)

    @property
    def group(self) -> tuple[str | int, ...]:
        """Levels of one group are scored together; sortable."""
        shape = [size for tensor in self.tensors for size in tensor.shape]
        return (self.feature, type(self).__name__, *shape)

    @classmethod
    def scorer(cls, levels: Sequence[Self], device: torch.device) -> Scored:
        """Return what scores levels of one group; its columns are the levels.

        A level's scores do not depend by a bit on the other levels, nor an image's on the other
        images of a batch of the same size. It raises ValueError for a feature of another width.
        """
        errors = cls._errors(levels, device)
        center_G = torch.tensor([level.center for level in levels], device=device)
        spread_G = torch.tensor([level.spread for level in levels], device=device)
        scaled = levels[0]._scaled
        return lambda x_BF: (scaled(errors(x_BF)) - center_G) / spread_G

    def _scaled(self, errors_BG: Tensor) -> Tensor:
        return errors_BG.clamp_min(_SMALLEST_ERROR).log()

    def same(self, other: _Level) -> bool:
        """Whether the other scores every image the same, because it has the same bits."""
        return (
            self.group == other.group
            and (self.center, self.spread) == (other.center, other.spread)
            and all(
                a.dtype == b.dtype and torch.equal(a, b)
                for a, b in zip(self.tensors, other.tensors, strict=True)
            )
        )

    @classmethod
    def _errors(cls, levels: Sequence[Self], device: torch.device) -> Scored:
        alone = [level._error(device) for level in levels]
        return lambda x_BF: torch.stack([error(x_BF) for error in alone], 1)

    def _error(self, device: torch.device) -> Scored:
        raise NotImplementedError

    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes that the tensors must have."""
        raise NotImplementedError

    def _matrix(self, name: str) -> tuple[int, int]:
        """Shape of a tensor that decides those of others."""
        tensor: Tensor = getattr(self, name)
        if tensor.ndim != 2 or not tensor.numel():
            raise ValueError(
                f"{self.feature}: {name} has shape {tuple(tensor.shape)}, must be a matrix"
            )
        return tensor.shape[0], tensor.shape[1]

    def _checked(self, x_BF: Tensor, width: int) -> Tensor:
        if x_BF.shape != (len(x_BF), width):
            shape = tuple(x_BF.shape)
            raise ValueError(f"{self.feature}: features have shape {shape}, expected (B, {width})")
        return x_BF.float()


@dataclass(frozen=True, eq=False, kw_only=True)
class AutoencoderLevel(_Level):
    """DDAS: the error is the mean squared one of an autoencoder, see `autoencoder_errors`.

    Raises:
        ValueError: the tensors do not fit each other, or center and spread are not finite numbers,
            or spread is not positive.
    """

    TENSORS: ClassVar[tuple[str, ...]] = (
        "mean_F",
        "std_F",
        "encoder_FC",
        "encoder_bias_C",
        "decoder_CF",
        "decoder_bias_F",
    )

    mean_F: Tensor
    std_F: Tensor
    encoder_FC: Tensor
    encoder_bias_C: Tensor
    decoder_CF: Tensor
    decoder_bias_F: Tensor
    output: Output = "linear"

    @property
    def code_size(self) -> int:
        """Width of the bottleneck, C."""
        return self.encoder_FC.shape[1]

    @property
    def group(self) -> tuple[str | int, ...]:
        """Levels of one group are scored together; sortable."""
        return (*super().group, self.output)

    @classmethod
    def _errors(cls, levels: Sequence[Self], device: torch.device) -> Scored:
        if levels[0].encoder_FC.numel() > _MOST_STACKED:
            return super()._errors(levels, device)
        tensors = zip(*(level.tensors for level in levels), strict=True)
        weights = [torch.stack(t).to(device, torch.float32) for t in tensors]
        output = levels[0].output
        return lambda x_BF: autoencoder_errors(x_BF, *weights, output=output)

    def _error(self, device: torch.device) -> Scored:
        weights = [t.to(device, torch.float32)[None] for t in self.tensors]
        return lambda x_BF: autoencoder_errors(x_BF, *weights, output=self.output)[:, 0]

    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        F, C = self._matrix("encoder_FC")
        return (F,), (F,), (F, C), (C,), (C, F), (F,)


@dataclass(frozen=True, eq=False, kw_only=True)
class GaussianLevel(_Level):
    """Classes as Gaussians that share a covariance S; ``whitening @ whitening.T`` is its inverse.

    The error is the squared Mahalanobis distance from the nearest class, by dimension: the minimum
    over k of ``||(x - mean_k) @ whitening|| ** 2 / W``. W < F leaves directions out. With a linear
    scale the score has no logarithm, (error - center) / spread: with one class, the center
    ``-logdet(S) / W`` and spread 1 it is minus twice the log density by dimension, up to a constant
    that all levels share, and the difference of two scores a log likelihood ratio.

    Raises:
        ValueError: as for `AutoencoderLevel`.

    Source: arXiv:1807.03888.
    """

    TENSORS: ClassVar[tuple[str, ...]] = ("means_KF", "whitening_FW")

    means_KF: Tensor
    whitening_FW: Tensor
    scale: Scale = "log"

    @property
    def group(self) -> tuple[str | int, ...]:
        """Levels of one group are scored together; sortable."""
        return (*super().group, self.scale)

    def _scaled(self, errors_BG: Tensor) -> Tensor:
        return errors_BG if self.scale == "linear" else super()._scaled(errors_BG)

    def _error(self, device: torch.device) -> Scored:
        means_KF, whitening_FW = (t.to(device, torch.float32) for t in self.tensors)
        F, W = whitening_FW.shape
        # Around the middle of the classes: far from the origin, distances would lose their digits.
        middle_F = means_KF.mean(0)
        means_KW = (means_KF - middle_F) @ whitening_FW

        def error(x_BF: Tensor) -> Tensor:
            x_BW = (self._checked(x_BF, F) - middle_F) @ whitening_FW
            return _distances(x_BW, means_KW).amin(1).square() / W

        return error

    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        K, F = self._matrix("means_KF")
        _, W = self._matrix("whitening_FW")
        return (K, F), (F, W)


@dataclass(frozen=True, eq=False, kw_only=True)
class PrototypeLevel(_Level):
    """Typical features, of unit length: the error is 1 - the greatest cosine with one of them.

    Raises:
        ValueError: as for `AutoencoderLevel`.
    """

    TENSORS: ClassVar[tuple[str, ...]] = ("prototypes_KF",)

    prototypes_KF: Tensor

    def _error(self, device: torch.device) -> Scored:
        # Again, since half precision does not keep a unit length.
        prototypes_KF = normalize(self.prototypes_KF.to(device, torch.float32), dim=1)
        F = prototypes_KF.shape[1]

        def error(x_BF: Tensor) -> Tensor:
            x_BF = normalize(self._checked(x_BF, F), dim=1)
            return 1 - (x_BF @ prototypes_KF.T).amax(1)

        return error

    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self._matrix("prototypes_KF"),)


Level = AutoencoderLevel | GaussianLevel | PrototypeLevel


def _distances(x_BW: Tensor, y_KW: Tensor) -> Tensor:
    """Euclidean distances (B, K), each from its own differences and not from norms and products."""
    return torch.cdist(x_BW, y_KW, compute_mode="donot_use_mm_for_euclid_dist")
