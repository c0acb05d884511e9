"""The classifier for a device: what it computes is captured once and replayed for every batch.

Each bucket has graphs that run in a row: the trunk (normalise, stem, blocks up to the experts, the
features that selectors look at), the selection (DDAS of every task, the path of every row), and the
experts, of which there is a second one without expert operations for batches that are zero-shot
altogether. Their shapes do not depend on which tasks there are: an expert that comes or goes is a
write into tensors that the graphs read. A graph is captured again only when what it depends on has
changed: the selection with the tasks; all of them with the depth of the trunk or the features.

Two lanes, each with pinned buffers and a staging area on the device, let a batch be copied in while
the one before computes. On a CPU the same code runs without a queue (`medley/streams.py`), which is
how the tests run it; on a CUDA device it has not run yet.

Legend: B images, E joint embedding width, P paths that there may be, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from medley.classifier import Ask, Classifier, Launched, Routed
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
        self._lanes = [self._lane() for _ in range(LANES)]
        self._turn = 0
        self._graphs: dict[int, _Graphs] = {}

    @torch.inference_mode()
    def prepare(self) -> None:
        """Capture what is not captured, or no longer true, so that no batch has to wait for it."""
        for bucket in self.buckets:
            self._graphs_of(bucket)

    def _start(self, pixels_BCHW: Tensor, asks: Sequence[Ask]) -> Launched:
        rows = self._bucket(len(asks))
        graphs = self._graphs_of(rows)
        lane = self._lanes[self._turn]
        self._turn = (self._turn + 1) % LANES
        lane.settle()
        lane.fill(_Inputs(pixels_BCHW, self._told(asks, rows), self._eligible(asks, rows)))
        up, main, down = self._streams.up, self._streams.main, self._streams.down
        _copy(up, lane.staged, lane.inputs, rows)
        main.wait_for(up.record())
        _copy(main, self._inputs, lane.staged, rows)
        main.run(graphs.trunk.replay)
        main.wait_for(self._lanes[self._turn].fetched)  # the answers before are overwritten now
        main.run(graphs.selection.replay)
        last = graphs.zero_shot if self._all_zero_shot(asks) else graphs.experts
        main.run(last.replay)
        down.wait_for(main.record())
        _copy(down, lane.answers, self._answers, rows)
        return lane.launched(down.record(), len(asks), self.selectors.tasks)

    def _graphs_of(self, rows: int) -> _Graphs:
        """The graphs of a bucket, captured again as far as need be."""
        graphs = self._graphs.get(rows)
        trunk_key = (self.model.first_expert_block, self.selectors.taps)
        if graphs is not None and graphs.trunk_key == trunk_key:
            if graphs.tasks_key == self.selectors.changes:
                return graphs
            self._settle()
            selection = self._selection(graphs.frozen, rows)
            graphs = replace(graphs, tasks_key=self.selectors.changes, selection=selection)
        else:
            self._settle()
            self._graphs.pop(rows, None)  # its memory is free for the new ones
            graphs = self._captured(rows, trunk_key)
        self._graphs[rows] = graphs
        return graphs

    def _captured(self, rows: int, trunk_key: tuple[int, tuple[str, ...]]) -> _Graphs:
        depth, taps = trunk_key
        trunk = self._streams.capture(self._trunk(rows, taps))
        hidden_BLD, *rest = trunk.outputs
        features_BE = rest[len(taps)] if len(rest) > len(taps) else None
        frozen = Frozen(hidden_BLD, dict(zip(taps, rest, strict=False)), features_BE, depth)
        return _Graphs(
            trunk_key,
            self.selectors.changes,
            frozen,
            trunk,
            self._selection(frozen, rows),
            self._streams.capture(self._encoding(frozen, self._answers.paths_B[:rows], rows)),
            self._streams.capture(self._encoding(frozen, None, rows)),
        )

    def _trunk(self, rows: int, taps: tuple[str, ...]) -> Work:
        def trunk() -> Sequence[Tensor]:
            images_BCHW = self.model.backbone.normalise(self._inputs.pixels_BCHW[:rows])
            frozen = self.model.frozen(images_BCHW, taps=taps)
            whole = () if frozen.features_BE is None else (frozen.features_BE,)
            return frozen.hidden_BLD, *(frozen.taps[tap] for tap in taps), *whole

        return trunk

    def _selection(self, frozen: Frozen, rows: int) -> Capture:
        def selection() -> Sequence[Tensor]:
            inputs, answers = self._inputs, self._answers
            paths_B, scores_BT, accepted_BT = self.selectors.route(
                frozen.taps, inputs.told_B[:rows], inputs.eligible_BP[:rows]
            )
            answers.paths_B[:rows].copy_(paths_B)
            answers.scores_BP[:rows].index_copy_(1, self.selectors.paths_T, scores_BT)
            answers.accepted_BP[:rows].index_copy_(1, self.selectors.paths_T, accepted_BT)
            return ()

        return self._streams.capture(selection)

    def _encoding(self, frozen: Frozen, paths_B: Tensor | None, rows: int) -> Work:
        def encoding() -> Sequence[Tensor]:
            features_BE = frozen.features_BE
            if features_BE is None or paths_B is not None:
                features_BE = self.model.finish(frozen, paths_B)
            self._answers.features_BE[:rows].copy_(F.normalize(features_BE.float(), dim=-1))
            return ()

        return encoding

    def _settle(self) -> None:
        for lane in self._lanes:
            lane.settle()

    def _lane(self) -> _Lane:
        device, host = self.model.backbone.device, self._streams.host_tensor
        return _Lane(
            _Inputs(*(host(*s, dtype=t) for s, t in self._asked())),
            _Inputs(*(torch.zeros(s, dtype=t, device=device) for s, t in self._asked())),
            _Answers(*(host(*s, dtype=t) for s, t in self._answered())),
            self._streams.down.record(),
        )

    def _asked(self) -> Sequence[tuple[tuple[int, ...], torch.dtype]]:
        B, P = self.max_batch, self.model.capacity.paths
        pixels = (B, 3, *self.model.backbone.image_size)
        return (pixels, torch.uint8), ((B,), torch.int64), ((B, P), torch.bool)

    def _answered(self) -> Sequence[tuple[tuple[int, ...], torch.dtype]]:
        B, P = self.max_batch, self.model.capacity.paths
        E = self.model.backbone.embed_dim
        return (
            ((B, E), torch.float32),
            ((B,), torch.int64),
            ((B, P), torch.float32),
            ((B, P), torch.bool),
        )


class _Inputs(NamedTuple):
    """What a batch brings, for as many images as the largest bucket holds."""

    pixels_BCHW: Tensor
    told_B: Tensor
    eligible_BP: Tensor


class _Answers(NamedTuple):
    """What it leaves; the scores of a task are in the column of its path."""

    features_BE: Tensor
    paths_B: Tensor
    scores_BP: Tensor
    accepted_BP: Tensor


@dataclass(frozen=True)
class _Graphs:
    """A bucket's captured work, and what it was captured for."""

    trunk_key: tuple[int, tuple[str, ...]]
    tasks_key: int
    frozen: Frozen  # the trunk's outputs, which the others read
    trunk: Capture
    selection: Capture
    experts: Capture
    zero_shot: Capture


class _Lane:
    """Buffers of one batch in flight; they are its own until it is settled."""

    def __init__(self, inputs: _Inputs, staged: _Inputs, answers: _Answers, fetched: Event) -> None:
        self.inputs = inputs  # on the host
        self.staged = staged  # on the device
        self.answers = answers  # on the host
        self.fetched = fetched  # when the answers of the last batch had been copied
        self._flight: _Replayed | None = None

    def fill(self, inputs: _Inputs) -> None:
        """Write a batch into the host's buffers; padding is whatever images were there."""
        for buffer, given in zip(self.inputs, inputs, strict=True):
            buffer[: len(given)].copy_(given)

    def launched(self, fetched: Event, count: int, tasks: tuple[int, ...]) -> _Replayed:
        """Take note of a batch in flight."""
        self.fetched = fetched
        self._flight = _Replayed(fetched, self.answers, count, tasks)
        return self._flight

    def settle(self) -> None:
        """Give the answers of the batch in flight to whoever holds it; the buffers are free."""
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.wait()


class _Replayed:
    """A batch whose answers come into the buffers of a lane."""

    def __init__(
        self, fetched: Event, answers: _Answers, count: int, tasks: tuple[int, ...]
    ) -> None:
        self._fetched = fetched
        self._answers = answers
        self._count = count
        self._tasks = tasks
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
        features_BE, paths_B, scores_BP, accepted_BP = (t[: self._count] for t in self._answers)
        columns_T = torch.tensor(self._tasks, dtype=torch.int64)
        return Routed(
            features_BE.clone(),
            paths_B.tolist(),
            list(self._tasks),
            scores_BP.index_select(1, columns_T),
            accepted_BP.index_select(1, columns_T),
            [()] * self._count,
        )


def _copy(stream: Stream, into: Sequence[Tensor], source: Sequence[Tensor], rows: int) -> None:
    for one, other in zip(into, source, strict=True):
        stream.copy(one[:rows], other[:rows])
