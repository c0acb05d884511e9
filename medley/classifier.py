"""A batch of (image, ask) to features and the path that each image took.

A forward runs at one of a few batch sizes, the buckets, padded where needed. The libraries under a
matrix product choose a kernel by its shape, so a result may depend on the number of rows; at a
fixed number it does not depend on what the other rows hold. With a single bucket no answer depends
by a bit on how many images came together; with several it may, by rounding.

What is decided is decided where the model is: between a batch's pixels and its answers nothing is
read back. On a CPU, where looking costs nothing, experts are left out if no image takes a path.

An image that DDAS gives to nobody may ask for its nearest tasks too. Each of them is one more row,
which sets out from the trunk that the image has run already; such rows run in forwards of the same
batch size as the images they belong to.

Legend: B images, C classes, E joint embedding width, T tasks, P paths that there may be, K
neighbours, R rows beside the images' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from medley.neighbours import NOBODY, Neighbours
from medley.routed import ZERO_SHOT, Frozen, RoutedModel
from medley.selector import DECIDE, SelectorBank

__all__ = [
    "MAX_NEAREST",
    "Ask",
    "Beside",
    "Classifier",
    "Launched",
    "Other",
    "Place",
    "Routed",
    "check_buckets",
    "logits",
    "padded_places",
]

MAX_NEAREST = 16  # neighbours that an image may ask for

Place = tuple[int, int]  # a row of a batch, and which of its neighbours: 0 is the nearest


@dataclass(frozen=True)
class Ask:
    """Which path an image is to take: a given one, or whatever DDAS decides among the eligible."""

    path: int | None = None  # None: DDAS decides; ZERO_SHOT or a path: that one
    eligible: frozenset[int] | None = None  # for DDAS: paths that may answer; None means all
    nearest: int = 0  # how many neighbours are to answer too, if DDAS gives the image to nobody
    among: frozenset[int] | None = None  # paths that may be neighbours; None means all


@dataclass(frozen=True)
class Other:
    """A neighbour of an image, and what its path makes of the image."""

    path: int
    similarity: float  # the greatest cosine with one of its prototypes
    features_E: Tensor  # unit length, float32


@dataclass(frozen=True)
class Routed:
    """What became of a batch, on the host; columns of the DDAS scores are in the order of `tasks`.

    A batch of no image has no features.
    """

    features_BE: Tensor  # unit length, float32
    paths: list[int]
    tasks: list[int]
    scores_BT: Tensor
    accepted_BT: Tensor
    others: list[tuple[Other, ...]]  # the nearest first; none unless asked for and unclaimed


class Launched(Protocol):
    """A batch on its way. `wait` may be called more than once; the engine's thread calls it."""

    @property
    def ready(self) -> bool:
        """Whether `wait` has nothing to wait for."""

    def wait(self) -> Routed:
        """Wait for the answers."""


class Classifier:
    """A routed model and the selectors of its tasks, run eagerly.

    Like the model it belongs to one thread.
    """

    def __init__(self, model: RoutedModel, *, buckets: Sequence[int] = (1,)) -> None:
        """Take a model.

        Args:
            model: the routed model.
            buckets: the batch sizes, ascending powers of two.

        Raises:
            ValueError: they are not.
        """
        check_buckets(buckets)
        self.model = model
        self.selectors = SelectorBank(model.backbone.device)
        self.neighbours = Neighbours(model.backbone.device, width=model.backbone.embed_dim)
        self.buckets = tuple(buckets)

    @property
    def max_batch(self) -> int:
        """Most images of one forward: the largest bucket."""
        return self.buckets[-1]

    def prepare(self) -> None:
        """Make ready for the tasks that are loaded now, so that no batch has to; here, nothing."""

    def route(self, pixels_BCHW: Tensor, asks: Sequence[Ask]) -> Routed:
        """Decide every image's path, encode it along that path, and wait for the answers.

        Args, Raises: as for `launch`.
        """
        return self.launch(pixels_BCHW, asks).wait()

    @torch.inference_mode()
    def launch(self, pixels_BCHW: Tensor, asks: Sequence[Ask]) -> Launched:
        """Start a batch; more images than the largest bucket holds are several forwards.

        Args:
            pixels_BCHW: uint8, as `Backbone.pixels` makes them, on the host.
            asks: one for each image.

        Raises:
            ValueError: there are more or fewer asks than images, or one names a path that is not
                loaded, or more neighbours than `MAX_NEAREST`. Nothing has started.
        """
        if len(asks) != len(pixels_BCHW):
            raise ValueError(f"{len(asks)} asks for {len(pixels_BCHW)} images")
        self._check(asks)
        size = self.max_batch
        parts = [
            self._start(pixels_BCHW[i : i + size], asks[i : i + size])
            for i in range(0, len(asks), size)
        ]
        return parts[0] if len(parts) == 1 else _Parts(parts, self.selectors.tasks)

    @torch.inference_mode()
    def frozen(
        self, pixels_BCHW: Tensor, *, taps: Sequence[str] = (), features: bool = False
    ) -> Frozen:
        """Run up to `max_batch` uint8 pixels through the frozen backbone; a bucket comes back."""
        images_BCHW = _padded(pixels_BCHW, self._bucket(len(pixels_BCHW)))
        normalised_BCHW = self.model.backbone.normalise(images_BCHW)
        return self.model.frozen(normalised_BCHW, taps=taps, features=features)

    @torch.inference_mode()
    def follow(self, frozen: Frozen, asks: Sequence[Ask]) -> Routed:
        """Go on from a bucket of `frozen`: decide the paths of its first images and encode them.

        Args:
            frozen: of a whole bucket, with at least the taps that the selectors look at.
            asks: one for each image that is more than padding.

        Raises:
            ValueError: as for `launch`.
        """
        self._check(asks)
        return self._follow(frozen, asks).wait()

    def _start(self, pixels_BCHW: Tensor, asks: Sequence[Ask]) -> Launched:
        """Start one forward."""
        return self._follow(self.frozen(pixels_BCHW, taps=self.selectors.taps), asks)

    def _follow(self, frozen: Frozen, asks: Sequence[Ask]) -> _Eager:
        rows, device = len(frozen.hidden_BLD), frozen.hidden_BLD.device
        paths_B, scores_BT, accepted_BT = self.selectors.route(
            frozen.taps, self._told(asks, rows).to(device), self._eligible(asks, rows).to(device)
        )
        looked = device.type == "cpu"
        idle = not (paths_B > ZERO_SHOT).any() if looked else self._all_zero_shot(asks)
        features_BE = frozen.features_BE
        if features_BE is None or not idle:
            features_BE = self.model.finish(frozen, None if idle else paths_B)
        unit_BE = F.normalize(features_BE.float(), dim=-1)
        beside = self._beside(frozen, asks, paths_B, unit_BE)
        answers = (tensor[: len(asks)] for tensor in (unit_BE, paths_B, scores_BT, accepted_BT))
        return _Eager(self.selectors.tasks, beside, *answers)

    def _beside(
        self, frozen: Frozen, asks: Sequence[Ask], paths_B: Tensor, unit_BE: Tensor
    ) -> Beside | None:
        """Run the rows of the neighbours; None where nobody asks for any."""
        rows, device = unit_BE.shape[0], unit_BE.device
        places = self._places(asks)
        if not places:
            return None
        most = 1 + max(rank for _, rank in places)
        near_BK, similarity_BK = self._near(
            unit_BE, paths_B, self._among(asks, rows).to(device), most
        )
        if device.type == "cpu":
            places = [place for place in places if near_BK[place] != NOBODY]
        index_R2 = padded_places(places, rows).to(device)
        parts = [
            self._along(frozen, near_BK, index_R2[start : start + rows])
            for start in range(0, len(index_R2), rows)
        ]
        return Beside(places, near_BK, similarity_BK, torch.cat([unit_BE[:0], *parts]))

    def _near(
        self, unit_BE: Tensor, paths_B: Tensor, among_BP: Tensor, most: int
    ) -> tuple[Tensor, Tensor]:
        """The neighbours of the rows that nobody claims: a zero-shot row is what they look at."""
        unclaimed_B = paths_B == ZERO_SHOT
        return self.neighbours.nearest(unit_BE, among_BP & unclaimed_B[:, None], most)

    def _along(self, frozen: Frozen, near_BK: Tensor, index_B2: Tensor) -> Tensor:
        """Features of unit length of as many rows as the batch has, each by a neighbour's path."""
        image_B, rank_B = index_B2.unbind(1)
        features_BE = self.model.finish(frozen.rows(image_B), near_BK[image_B, rank_B])
        return F.normalize(features_BE.float(), dim=-1)

    def _check(self, asks: Sequence[Ask]) -> None:
        """Refuse on the host what would read another path's tables, or beyond them, on a device."""
        for path in {ask.path for ask in asks} - {None, ZERO_SHOT}:
            if path not in self.model.paths:
                raise ValueError(f"path {path} is not loaded")
        for nearest in {ask.nearest for ask in asks}:
            if not 0 <= nearest <= MAX_NEAREST:
                raise ValueError(f"nearest is {nearest}, must lie between 0 and {MAX_NEAREST}")

    def _bucket(self, count: int) -> int:
        for bucket in self.buckets:
            if count <= bucket:
                return bucket
        raise ValueError(f"{count} images, the largest batch size is {self.max_batch}")

    def _told(self, asks: Sequence[Ask], rows: int) -> Tensor:
        """What each row is told, (B,) int64; padding is zero-shot."""
        told = [DECIDE if ask.path is None else ask.path for ask in asks]
        return torch.tensor([*told, *[ZERO_SHOT] * (rows - len(told))], dtype=torch.int64)

    def _eligible(self, asks: Sequence[Ask], rows: int) -> Tensor:
        """Which paths each row may be given, (B, P) bool."""
        eligible_BP = torch.ones(rows, self.model.capacity.paths, dtype=torch.bool)
        for row, ask in enumerate(asks):
            if ask.eligible is not None:
                eligible_BP[row] = False
                eligible_BP[
                    row, [path for path in self.selectors.tasks if path in ask.eligible]
                ] = True
        return eligible_BP

    def _places(self, asks: Sequence[Ask]) -> list[Place]:
        """The rows that there may be beside a batch's own, as far as the host knows."""
        return [
            (row, rank)
            for row, ask in enumerate(asks)
            for rank in range(min(ask.nearest, len(self._candidates(ask))))
        ]

    def _among(self, asks: Sequence[Ask], rows: int) -> Tensor:
        """Which paths may be neighbours of each row, (B, P) bool."""
        among_BP = torch.zeros(rows, self.model.capacity.paths, dtype=torch.bool)
        for row, ask in enumerate(asks):
            candidates = self._candidates(ask)
            if candidates:
                among_BP[row, sorted(candidates)] = True
        return among_BP

    def _candidates(self, ask: Ask) -> frozenset[int]:
        if ask.path is not None or not ask.nearest:
            return frozenset()
        paths = self.neighbours.paths
        return paths if ask.among is None else paths & ask.among

    def _all_zero_shot(self, asks: Sequence[Ask]) -> bool:
        """Whether no image can take a path, as far as the host knows."""
        told = ZERO_SHOT if self.selectors.tasks else None
        return all(ask.path in (ZERO_SHOT, told) for ask in asks)


def check_buckets(buckets: Sequence[int]) -> None:
    """Refuse what cannot be the batch sizes of a classifier.

    Raises:
        ValueError: there is none, one is not a power of two, or they do not ascend.
    """
    for bucket in buckets:
        if bucket < 1 or bucket & (bucket - 1):
            # Threads split another number of rows unevenly, and a row's place begins to matter.
            raise ValueError(f"the batch size {bucket} is not a power of two")
    if not buckets or list(buckets) != sorted(set(buckets)):
        raise ValueError(f"the batch sizes {list(buckets)} must be one or more, and ascend")


def padded_places(places: list[Place], rows: int) -> Tensor:
    """Return places as (R, 2) int64; the last is repeated until R is a multiple of `rows`."""
    padding = places[-1:] * (-len(places) % rows)
    return torch.tensor([*places, *padding], dtype=torch.int64).reshape(-1, 2)


def logits(features_E: Tensor, class_text_CE: Tensor, logit_scale: float) -> Tensor:
    """Scaled cosine of one image with each class, (C,); one row, so neighbours cannot matter."""
    return logit_scale * (class_text_CE @ features_E)


@dataclass(frozen=True)
class Beside:
    """Rows that a batch ran for the neighbours of its images, wherever they are."""

    places: list[Place]  # of each row, in order of rank for each image
    near_BK: Tensor
    similarity_BK: Tensor
    features_RE: Tensor  # rows after the last place are padding

    def others(self, count: int) -> list[tuple[Other, ...]]:
        """Bring them to the host, for each of so many images."""
        paths, similarities = self.near_BK.tolist(), self.similarity_BK.tolist()
        found: list[list[Other]] = [[] for _ in range(count)]
        for (row, rank), features_E in zip(self.places, self.features_RE.cpu(), strict=False):
            if paths[row][rank] != NOBODY:
                found[row].append(Other(paths[row][rank], similarities[row][rank], features_E))
        return [tuple(others) for others in found]


@dataclass(frozen=True)
class _Eager:
    """One forward whose answers are where the model is; on a CPU they are there at once."""

    tasks: tuple[int, ...]
    beside: Beside | None
    features_BE: Tensor
    paths_B: Tensor
    scores_BT: Tensor
    accepted_BT: Tensor

    @property
    def ready(self) -> bool:
        return self.paths_B.device.type == "cpu"

    def wait(self) -> Routed:
        count = len(self.paths_B)
        return Routed(
            self.features_BE.cpu(),
            self.paths_B.tolist(),
            list(self.tasks),
            self.scores_BT.cpu(),
            self.accepted_BT.cpu(),
            self.beside.others(count) if self.beside else [()] * count,
        )


@dataclass(frozen=True)
class _Parts:
    """A batch of several forwards, or of none."""

    parts: Sequence[Launched]
    tasks: tuple[int, ...]

    @property
    def ready(self) -> bool:
        return all(part.ready for part in self.parts)

    def wait(self) -> Routed:
        routed = [part.wait() for part in self.parts]
        none_BT = torch.empty(0, len(self.tasks))
        return Routed(
            torch.cat([r.features_BE for r in routed]) if routed else torch.empty(0),
            [path for r in routed for path in r.paths],
            list(self.tasks),
            torch.cat([none_BT, *(r.scores_BT for r in routed)]),
            torch.cat([none_BT.bool(), *(r.accepted_BT for r in routed)]),
            [others for r in routed for others in r.others],
        )


def _padded(pixels_BCHW: Tensor, size: int) -> Tensor:
    missing = size - len(pixels_BCHW)
    return pixels_BCHW if not missing else F.pad(pixels_BCHW, (0, 0) * 3 + (0, missing))
