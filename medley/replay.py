"""The classifier for a device: what it computes is captured once and replayed for every batch.

Each bucket has graphs that run in a row: the trunk (normalise, stem, blocks up to the experts, the
features that selectors look at), the selection (DDAS of every task, the path of every row), and the
experts, of which there is a second one without expert operations for batches that are zero-shot
altogether. Once somebody has asked for neighbours there are two more: who is nearest, and a pass of
as many rows as the bucket has along the neighbours' paths, replayed as often as may be needed for
all who asked, since nobody looks at who was claimed.

Their shapes do not depend on which tasks there are: an expert that comes or goes is a write into
tensors that the graphs read. A graph is captured again only when what it depends on has changed:
the selection with the tasks, the nearest with the neighbours, what follows paths when the first
low-rank updates are loaded and when whole models come or go (`RoutedModel.layout`); all with the
depth of the trunk or the features.

Two lanes, each with pinned buffers and a staging area on the device, let a batch be copied in while
the one before computes. On a CPU the same code runs without a queue (`medley/streams.py`), which is
how the tests run it; on a CUDA device it has not run yet.

Legend: B images, E joint embedding width, P paths that there may be, T tasks, K neighbours, R rows
beside the images' own.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from medley.classifier import (
    MAX_NEAREST,
    Ask,
    Beside,
    Classifier,
    Launched,
    Place,
    Routed,
    padded_places,
)
from medley.routed import Frozen, RoutedModel
from medley.streams import Capture, Event, Stream, Streams, Work, streams_of

__all__ = ["ReplayedClassifier"]

LANES = 2


class ReplayedClassifier(Classifier):
    """As `Classifier`, by captured graphs; `frozen` and `follow` stay eager."""

    def __init__(
        self,
        model: RoutedModel,
        *,
        buckets: Sequence[int] = (1,),
        streams: Streams | None = None,
    ) -> None:
        """Set the buffers aside; nothing is captured before `prepare` or the first batch.

        Args:
            model: the routed model.
            buckets: as for `Classifier`.
            streams: where it runs; those of the model's device unless a test has others.
        """
        super().__init__(model, buckets=buckets)
        device = model.backbone.device
        self._streams = streams or streams_of(device)
        self._inputs = _Inputs(*(torch.zeros(s, dtype=t, device=device) for s, t in self._asked()))
        self._answers = _Answers(
            *(torch.zeros(s, dtype=t, device=device) for s, t in self._answered())
        )
        self._place_B2 = torch.zeros(self.max_batch, 2, dtype=torch.int64, device=device)
        self._along_BE, self._beside_RE = (
            torch.zeros(rows, model.backbone.embed_dim, device=device)
            for rows in (self.max_batch, self._most_beside)
        )
        self._lanes = [self._lane() for _ in range(LANES)]
        self._turn = 0
        self._graphs: dict[int, _Graphs] = {}
        self._neighbours_asked = False

    @torch.inference_mode()
    def prepare(self) -> None:
        """Capture what is not captured, or no longer true, so that no batch has to wait for it."""
        for bucket in self.buckets:
            self._graphs_of(bucket)

    def _start(self, pixels_BCHW: Tensor, asks: Sequence[Ask]) -> Launched:
        rows = self._bucket(len(asks))
        self._neighbours_asked |= any(ask.nearest for ask in asks)
        graphs = self._graphs_of(rows)
        lane = self._lanes[self._turn]
        self._turn = (self._turn + 1) % LANES
        lane.settle()
        places = self._places(asks)
        beside = lane.fill(self._filled(pixels_BCHW, asks, rows), padded_places(places, rows))
        up, main, down = self._streams.up, self._streams.main, self._streams.down
        _copy(up, lane.staged, lane.inputs, rows)
        up.copy(lane.staged_R2[:beside], lane.places_R2[:beside])
        main.wait_for(up.record())
        _copy(main, self._inputs, lane.staged, rows)
        main.run(graphs.trunk.replay)
        main.wait_for(self._lanes[self._turn].fetched)  # the answers before are overwritten now
        graphs.run("selection", main)
        graphs.run("zero_shot" if self._all_zero_shot(asks) else "experts", main)
        if places:
            graphs.run("nearest", main)
        for start in range(0, beside, rows):
            main.copy(self._place_B2[:rows], lane.staged_R2[start : start + rows])
            graphs.run("along", main)
            main.copy(self._beside_RE[start : start + rows], self._along_BE[:rows])
        down.wait_for(main.record())
        _copy(down, lane.answers, self._answers, rows)
        down.copy(lane.beside_RE[:beside], self._beside_RE[:beside])
        return lane.launched(down.record(), len(asks), self.selectors.tasks, places)

    def _filled(self, pixels_BCHW: Tensor, asks: Sequence[Ask], rows: int) -> _Inputs:
        """A batch as the buffers take it, on the host."""
        told_B, eligible_BP = self._told(asks, rows), self._eligible(asks, rows)
        return _Inputs(pixels_BCHW, told_B, eligible_BP, self._among(asks, rows))

    def _graphs_of(self, rows: int) -> _Graphs:
        """The graphs of a bucket, captured again as far as need be."""
        key = (self.model.first_expert_block, self.selectors.taps)
        if rows not in self._graphs or self._graphs[rows].key != key:
            self._settle()
            self._graphs.pop(rows, None)  # its memory is free for the new ones
            self._graphs[rows] = self._captured(rows, *key)
        graphs = self._graphs[rows]
        frozen, paths_B = graphs.frozen, self._answers.paths_B[:rows]
        self._keep(graphs, "selection", self._selection(frozen, rows), self.selectors.changes)
        self._keep(graphs, "experts", self._encoding(frozen, paths_B, rows), self.model.layout)
        self._keep(graphs, "zero_shot", self._encoding(frozen, None, rows))
        if self._neighbours_asked:
            self._keep(graphs, "nearest", self._nearest(rows), self.neighbours.changes)
            self._keep(graphs, "along", self._encoding_beside(frozen, rows), self.model.layout)
        return graphs

    def _captured(self, rows: int, depth: int, taps: tuple[str, ...]) -> _Graphs:
        trunk = self._streams.capture(self._trunk(rows, taps))
        hidden_BLD, *rest = trunk.outputs
        features_BE = rest[len(taps)] if len(rest) > len(taps) else None
        frozen = Frozen(hidden_BLD, dict(zip(taps, rest, strict=False)), features_BE, depth)
        return _Graphs((depth, taps), frozen, trunk)

    def _keep(self, graphs: _Graphs, name: str, work: Work, made_for: Hashable = None) -> None:
        """Capture work that is not captured yet, or was for something else."""
        if name not in graphs.others or graphs.others[name][0] != made_for:
            self._settle()
            graphs.others.pop(name, None)
            graphs.others[name] = (made_for, self._streams.capture(work))

    def _trunk(self, rows: int, taps: tuple[str, ...]) -> Work:
        def trunk() -> Sequence[Tensor]:
            images_BCHW = self.model.backbone.normalise(self._inputs.pixels_BCHW[:rows])
            frozen = self.model.frozen(images_BCHW, taps=taps)
            whole = () if frozen.features_BE is None else (frozen.features_BE,)
            return frozen.hidden_BLD, *(frozen.taps[tap] for tap in taps), *whole

        return trunk

    def _selection(self, frozen: Frozen, rows: int) -> Work:
        def selection() -> Sequence[Tensor]:
            inputs, answers = self._inputs, self._answers
            paths_B, scores_BT, accepted_BT = self.selectors.route(
                frozen.taps, inputs.told_B[:rows], inputs.eligible_BP[:rows]
            )
            answers.paths_B[:rows].copy_(paths_B)
            answers.scores_BP[:rows].index_copy_(1, self.selectors.paths_T, scores_BT)
            answers.accepted_BP[:rows].index_copy_(1, self.selectors.paths_T, accepted_BT)
            return ()

        return selection

    def _encoding(self, frozen: Frozen, paths_B: Tensor | None, rows: int) -> Work:
        def encoding() -> Sequence[Tensor]:
            features_BE = frozen.features_BE
            if features_BE is None or paths_B is not None:
                features_BE = self.model.finish(frozen, paths_B)
            self._answers.features_BE[:rows].copy_(F.normalize(features_BE.float(), dim=-1))
            return ()

        return encoding

    def _nearest(self, rows: int) -> Work:
        def nearest() -> Sequence[Tensor]:
            inputs, answers = self._inputs, self._answers
            near_BK, similarity_BK = self._near(
                answers.features_BE[:rows],
                answers.paths_B[:rows],
                inputs.among_BP[:rows],
                MAX_NEAREST,
            )
            answers.near_BK[:rows].copy_(near_BK)
            answers.similarity_BK[:rows].copy_(similarity_BK)
            return ()

        return nearest

    def _encoding_beside(self, frozen: Frozen, rows: int) -> Work:
        def along() -> Sequence[Tensor]:
            near_BK, place_B2 = self._answers.near_BK[:rows], self._place_B2[:rows]
            self._along_BE[:rows].copy_(self._along(frozen, near_BK, place_B2))
            return ()

        return along

    @property
    def _most_beside(self) -> int:
        return MAX_NEAREST * self.max_batch

    def _settle(self) -> None:
        for lane in self._lanes:
            lane.settle()

    def _lane(self) -> _Lane:
        device, host = self.model.backbone.device, self._streams.host_tensor
        most, embed_dim = self._most_beside, self.model.backbone.embed_dim
        return _Lane(
            inputs=_Inputs(*(host(*s, dtype=t) for s, t in self._asked())),
            staged=_Inputs(*(torch.zeros(s, dtype=t, device=device) for s, t in self._asked())),
            answers=_Answers(*(host(*s, dtype=t) for s, t in self._answered())),
            places_R2=host(most, 2, dtype=torch.int64),
            staged_R2=torch.zeros(most, 2, dtype=torch.int64, device=device),
            beside_RE=host(most, embed_dim, dtype=torch.float32),
            fetched=self._streams.down.record(),
        )

    def _asked(self) -> Sequence[tuple[tuple[int, ...], torch.dtype]]:
        B, P = self.max_batch, self.model.capacity.paths
        pixels = (B, 3, *self.model.backbone.image_size)
        return (
            (pixels, torch.uint8),
            ((B,), torch.int64),
            ((B, P), torch.bool),
            ((B, P), torch.bool),
        )

    def _answered(self) -> Sequence[tuple[tuple[int, ...], torch.dtype]]:
        B, P = self.max_batch, self.model.capacity.paths
        E = self.model.backbone.embed_dim
        return (
            ((B, E), torch.float32),
            ((B,), torch.int64),
            ((B, P), torch.float32),
            ((B, P), torch.bool),
            ((B, MAX_NEAREST), torch.int64),
            ((B, MAX_NEAREST), torch.float32),
        )


class _Inputs(NamedTuple):
    """What a batch brings, for as many images as the largest bucket holds."""

    pixels_BCHW: Tensor
    told_B: Tensor
    eligible_BP: Tensor
    among_BP: Tensor


class _Answers(NamedTuple):
    """What it leaves; the scores of a task are in the column of its path."""

    features_BE: Tensor
    paths_B: Tensor
    scores_BP: Tensor
    accepted_BP: Tensor
    near_BK: Tensor
    similarity_BK: Tensor


@dataclass(frozen=True)
class _Graphs:
    """A bucket's captured work: the trunk, and by name what reads it and what that was made for."""

    key: tuple[int, tuple[str, ...]]
    frozen: Frozen  # the trunk's outputs
    trunk: Capture
    others: dict[str, tuple[Hashable, Capture]] = field(default_factory=dict)

    def run(self, name: str, stream: Stream) -> None:
        """Replay one of the others."""
        stream.run(self.others[name][1].replay)


@dataclass(kw_only=True)
class _Lane:
    """Buffers of one batch in flight; they are its own until it is settled."""

    inputs: _Inputs  # on the host
    staged: _Inputs  # on the device
    answers: _Answers  # on the host
    places_R2: Tensor  # on the host: the rows beside the images' own
    staged_R2: Tensor  # on the device
    beside_RE: Tensor  # on the host: features of those rows
    fetched: Event  # when the answers of the last batch had been copied
    flight: _Replayed | None = None

    def fill(self, inputs: _Inputs, places_R2: Tensor) -> int:
        """Write a batch into the host's buffers; padding is whatever images were there.

        Returns:
            how many rows there are beside the images' own.
        """
        for buffer, given in zip(self.inputs, inputs, strict=True):
            buffer[: len(given)].copy_(given)
        self.places_R2[: len(places_R2)].copy_(places_R2)
        return len(places_R2)

    def launched(
        self, fetched: Event, count: int, tasks: tuple[int, ...], places: list[Place]
    ) -> _Replayed:
        """Take note of a batch in flight."""
        self.fetched = fetched
        self.flight = _Replayed(self, count, tasks, places)
        return self.flight

    def settle(self) -> None:
        """Give the answers of the batch in flight to whoever holds it; the buffers are free."""
        flight, self.flight = self.flight, None
        if flight is not None:
            flight.wait()


class _Replayed:
    """A batch whose answers come into the buffers of a lane."""

    def __init__(
        self, lane: _Lane, count: int, tasks: tuple[int, ...], places: list[Place]
    ) -> None:
        self._lane = lane
        self._fetched = lane.fetched
        self._count = count
        self._tasks = tasks
        self._places = places
        self._routed: Routed | None = None

    @property
    def ready(self) -> bool:
        return self._routed is not None or self._fetched.query()

    def wait(self) -> Routed:
        if self._routed is None:
            self._fetched.synchronize()
            self._routed = self._read()
        return self._routed

    def _read(self) -> Routed:
        features_BE, paths_B, scores_BP, accepted_BP, near_BK, similarity_BK = (
            tensor[: self._count] for tensor in self._lane.answers
        )
        columns_T = torch.tensor(self._tasks, dtype=torch.int64)
        beside_RE = self._lane.beside_RE[: len(self._places)].clone()
        return Routed(
            features_BE.clone(),
            paths_B.tolist(),
            list(self._tasks),
            scores_BP.index_select(1, columns_T),
            accepted_BP.index_select(1, columns_T),
            Beside(self._places, near_BK, similarity_BK, beside_RE).others(self._count),
        )


def _copy(stream: Stream, into: Sequence[Tensor], source: Sequence[Tensor], rows: int) -> None:
    for one, other in zip(into, source, strict=True):
        stream.copy(one[:rows], other[:rows])
