"""The training loop: from a data set to what a method learns of one task.

It is the same for all methods; what is trained is the learner's affair (`trainer/methods`). What
random numbers a step uses follows from (seed, step) alone, and which images from (seed, epoch), so
a checkpoint needs no generator's state and a resumed run ends in the same bits.

Legend: B images, C classes, E joint embedding width.

Source: MoE-Adapters, arXiv:2403.11549.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW

from medley.backbone import Backbone
from medley.errors import DataError
from medley.prompts import prompts
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.datasets import ImageSet
from trainer.distributed import ALONE, Team
from trainer.methods import FrozenExperts, Learner, make_learner
from trainer.penalties import Penalties
from trainer.settings import TrainSettings
from trainer.trunk import ImageTrunk, image_hidden

__all__ = ["History", "State", "Trained", "Watcher", "learning_rate", "redundancy_weight", "train"]

CACHE_BYTES = 3 * 2**30  # of trunk outputs, in memory
CURVE_POINTS = 10  # how often held-out images are looked at in a run
CURVE_IMAGES = 512  # at most so many of them
REDUNDANCY_WARMUP = 0.1  # share of the iterations

State = Mapping[str, Tensor]  # of a learner


@dataclass
class History:
    """What a run looked like, a value each step; held-out accuracy as (step, value)."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


class Watcher(Protocol):
    """Who wants to know how a run is doing; nothing it does changes what is learnt."""

    def on_start(self, step: int, steps: int) -> None:
        """Learning starts, or resumes, before `step`."""

    def on_trunk(self, images: int) -> None:
        """So many more images have gone through the frozen trunk."""

    def on_step(self, step: int, loss: float, accuracy: float) -> None:
        """A step is done; `step` counts from 1."""


@dataclass(frozen=True)
class Trained:
    """What a run of the loop leaves."""

    learner: Learner
    history: History
    trunk: ImageTrunk  # of the training images, as far as it was filled


def train(
    backbone: Backbone,
    images: ImageSet,
    held_out: ImageSet | None,
    settings: TrainSettings,
    *,
    frozen: FrozenExperts | None = None,
    initial: State | None = None,
    checkpoint: Path,
    identity: str,
    resume: bool,
    checkpoint_every_s: float,
    watcher: Watcher,
    team: Team = ALONE,
) -> Trained:
    """Train the learner of `settings.method` on one task.

    The processes of a team take each batch apart and end with the same learner. A step's batch, its
    random numbers and its loss are those of one process alone; what differs is the order in which
    numbers are added.

    Args:
        backbone: frozen.
        images: what gradients come from.
        held_out: what the curve of accuracy comes from, nothing else; None: no curve.
        settings: of the run.
        frozen: experts of earlier tasks that `moe_adapter` may choose.
        initial: state of an earlier run's learner to start from; None: as the backbone is.
        checkpoint: file to write to, and to resume from.
        identity: of everything that decides the result; a checkpoint of another is refused.
        resume: go on from the checkpoint.
        checkpoint_every_s: seconds between two checkpoints.
        watcher: told of every step.
        team: all of it must call alike; only the first of it needs `checkpoint`, and writes it.

    Raises:
        DataError: nothing to resume from, or it is another run's; the checkpoint cannot be
        written; the settings do not suit the backbone; or the team is not of one mind.
    """
    team.agree(identity)
    torch.manual_seed(settings.seed)
    class_prompts = prompts(images.class_names, images.templates[0])
    learner = make_learner(backbone, class_prompts, settings, frozen or FrozenExperts()).to(
        backbone.device
    )
    if initial is not None:
        learner.load_state_dict(initial)
    optimiser = AdamW(learner.parameters(), lr=settings.lr, weight_decay=0.0)
    history = History()
    done = _restore(checkpoint, identity, learner, optimiser, history, team) if resume else 0
    trunk = _trunk(learner, images, settings, team)
    curve = _Curve(learner, held_out, settings, team) if held_out is not None else None
    labels_N = torch.from_numpy(images.labels.copy()).to(backbone.device)
    watcher.on_start(done, settings.iterations)
    written_s = time.monotonic()
    for step in range(done, settings.iterations):
        torch.manual_seed(_mixed(settings.seed, step))
        learner.train()
        index_B, epoch = _batch(len(images), settings, step)
        entrance = trunk.batch(index_B, epoch, on_chunk=watcher.on_trunk)
        with _precision(backbone, settings):
            image_BE, image_penalties = learner.image_features(entrance)
            text_CE, text_penalties = learner.text_features(team)
        logits_BC = backbone.logit_scale * (image_BE @ text_CE.T)
        part = team.part(len(index_B))
        labels_B = labels_N[torch.from_numpy(index_B[part.rows])]
        loss = part.share * _cross_entropy(logits_BC, labels_B, settings)
        # All have the penalties of the whole batch and of all prompts.
        loss = loss + _weighted(image_penalties + text_penalties, settings, step) / team.size
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimiser.zero_grad()
        loss.backward()
        hits = (logits_BC.argmax(1) == labels_B).float().sum()
        result = torch.stack([loss.detach(), hits / part.whole])
        team.add_up([*(p.grad for p in learner.parameters() if p.grad is not None), result])
        optimiser.step()
        loss_now, accuracy = result.tolist()
        history.losses.append(loss_now)
        history.accuracies.append(accuracy)
        if curve is not None and curve.is_due(step + 1):
            history.held_out.append((step + 1, curve.accuracy()))
        if team.is_first and time.monotonic() - written_s >= checkpoint_every_s:
            _save(checkpoint, identity, learner, optimiser, history)
            written_s = time.monotonic()
        watcher.on_step(step + 1, loss_now, accuracy)
    if team.is_first:
        _save(checkpoint, identity, learner, optimiser, history)
    return Trained(learner.eval(), history, trunk)


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Linear warm-up, then a cosine to zero; `step` counts from 0."""
    warmup = round(settings.warmup * settings.iterations)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.iterations - warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


def redundancy_weight(settings: TrainSettings, step: int) -> float:
    """Linear from zero over the first tenth, where an update adds little yet, then constant."""
    if settings.redundancy == "off":
        return 0.0
    warmup = round(REDUNDANCY_WARMUP * settings.iterations)
    return settings.redundancy_weight * min(1.0, step / max(1, warmup))


def _weighted(penalties: Penalties, settings: TrainSettings, step: int) -> Tensor | float:
    """What penalties add to the loss; without weight not even a gradient of zero."""
    weighted: Tensor | float = 0.0
    if settings.balance:
        weighted = settings.balance * penalties.balance
    if weight := redundancy_weight(settings, step):
        weighted = weighted + weight * penalties.redundancy
    return weighted


def _cross_entropy(logits_BC: Tensor, labels_B: Tensor, settings: TrainSettings) -> Tensor:
    """The mean over some images; zero, not NaN, over none."""
    if not len(labels_B):
        return logits_BC.sum()
    return F.cross_entropy(logits_BC, labels_B, label_smoothing=settings.label_smoothing)


def _trunk(learner: Learner, images: ImageSet, settings: TrainSettings, team: Team) -> ImageTrunk:
    """Cache as many copies as pay off: none if no image is seen twice, or if they do not fit."""
    seen = settings.iterations * settings.batch_size / len(images)
    wanted = min(max(1, settings.augmented_copies), math.ceil(seen))
    fitting = CACHE_BYTES // (_entrance_bytes(learner) * len(images))
    return ImageTrunk(
        learner.backbone,
        images,
        learner.first_image_block,
        learner.enter,
        augment=settings.augmented_copies > 0,
        copies=0 if seen <= 1 else min(wanted, fitting),
        seed=settings.seed,
        team=team,
    )


def _entrance_bytes(learner: Learner) -> int:
    """How much memory the entrance of one image takes."""
    height, width = learner.backbone.image_size
    pixels_BCHW = torch.zeros(1, 3, height, width, dtype=torch.uint8)
    hidden_BLD = image_hidden(learner.backbone, pixels_BCHW, learner.first_image_block)
    return learner.enter(hidden_BLD).nbytes


class _Curve:
    """Accuracy on held-out images, a few times in a run."""

    def __init__(
        self, learner: Learner, held_out: ImageSet, settings: TrainSettings, team: Team
    ) -> None:
        chosen = np.random.default_rng(settings.seed).permutation(len(held_out))[:CURVE_IMAGES]
        self._learner, self._images = learner, held_out.subset(np.sort(chosen))
        copies = CACHE_BYTES // (4 * _entrance_bytes(learner) * len(self._images))
        self._trunk = ImageTrunk(
            learner.backbone,
            self._images,
            learner.first_image_block,
            learner.enter,
            augment=False,
            copies=min(1, copies),
            seed=0,
            team=team,
        )
        self._every = max(1, settings.iterations // CURVE_POINTS)
        self._last, self._size = settings.iterations, settings.batch_size

    def is_due(self, step: int) -> bool:
        return step % self._every == 0 or step == self._last

    @torch.no_grad()
    def accuracy(self) -> float:
        self._learner.eval()
        team, hits = self._trunk.team, 0
        text_CE, _ = self._learner.text_features(team)
        for index_B in _parts(len(self._images), self._size):
            features_BE, _ = self._learner.image_features(self._trunk.batch(index_B, 0))
            guess_B = (features_BE @ text_CE.T).argmax(1).cpu().numpy()
            own_B = index_B[team.part(len(index_B)).rows]
            hits += int((guess_B == self._images.labels[own_B]).sum())
        return int(team.total(torch.tensor(hits))) / len(self._images)


def _parts(count: int, size: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, count, size):
        yield np.arange(start, min(start + size, count))


def _batch(count: int, settings: TrainSettings, step: int) -> tuple[NDArray[np.int64], int]:
    """Which images a step sees, and in which epoch; the last batch of one may be smaller."""
    steps_per_epoch = math.ceil(count / settings.batch_size)
    epoch, place = divmod(step, steps_per_epoch)
    order = np.random.default_rng((settings.seed, epoch)).permutation(count)
    start = place * settings.batch_size
    return order[start : start + settings.batch_size], epoch


def _mixed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> 1)


def _precision(backbone: Backbone, settings: TrainSettings) -> torch.autocast:
    half = settings.precision == "bf16"
    return torch.autocast(backbone.device.type, torch.bfloat16, enabled=half)


def _save(path: Path, identity: str, learner: Learner, optimiser: AdamW, history: History) -> None:
    state = {
        "identity": identity,
        "learner": learner.state_dict(),
        "optimiser": optimiser.state_dict(),
        "history": vars(history),
    }
    save_checkpoint(path, state)


def _restore(
    path: Path,
    identity: str,
    learner: Learner,
    optimiser: AdamW,
    history: History,
    team: Team,
) -> int:
    """Take up a checkpoint; return how many steps it has done."""
    state: dict[str, Any] = team.told(lambda: load_checkpoint(path))
    if state.get("identity") != identity:
        raise DataError(
            f"{path.parent} holds another run: data, settings, backbone or earlier bundles differ"
        )
    learner.load_state_dict(state["learner"])
    optimiser.load_state_dict(state["optimiser"])
    for name, values in state["history"].items():
        setattr(history, name, list(values))
    return len(history.losses)
