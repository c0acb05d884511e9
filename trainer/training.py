"""The training loop of `moe_adapter`: from a data set to experts and routers of one task.

Only this task's experts and routers are trained; everything else, and the experts of earlier tasks,
is frozen. What random numbers a step uses follows from (seed, step) alone, and which images from
(seed, epoch), so a checkpoint needs no generator's state and a resumed run ends in the same bits.

Legend: B images, C classes, L tokens, D width, E joint embedding width.

Source: MoE-Adapters, arXiv:2403.11549.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from medley.backbone import Backbone
from medley.errors import DataError
from medley.experts import BlockExperts
from medley.prompts import prompts
from medley.tower import Block
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.datasets import ImageSet
from trainer.experts import ExpertConfig, TowerMixture
from trainer.settings import TrainSettings
from trainer.trunk import Entrance, ImageTrunk, entrance_bytes, prompt_entrance

__all__ = ["FrozenExperts", "History", "Learner", "Trained", "Watcher", "learning_rate", "train"]

CACHE_BYTES = 3 * 2**30  # of trunk outputs, in memory
CURVE_POINTS = 10  # how often held-out images are looked at in a run
CURVE_IMAGES = 512  # at most so many of them


@dataclass(frozen=True)
class FrozenExperts:
    """Experts of earlier tasks that a new router may choose, by tower, by block."""

    vision: Mapping[int, BlockExperts] = field(default_factory=dict)
    text: Mapping[int, BlockExperts] = field(default_factory=dict)


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


class Learner(nn.Module):
    """Both towers' experts on a frozen backbone, from the entrances to features."""

    def __init__(
        self,
        backbone: Backbone,
        class_prompts: Sequence[str],
        settings: TrainSettings,
        frozen: FrozenExperts,
    ) -> None:
        super().__init__()
        config = ExpertConfig(
            num_new=settings.num_experts,
            bottleneck=settings.bottleneck,
            top_k=settings.top_k,
            scale=settings.scale,
            dropout=settings.dropout,
        )
        tower = backbone.image
        image_blocks = range(settings.first_image_block(backbone), len(tower.blocks))
        self.vision = TowerMixture(tower.width, image_blocks, frozen.vision, config)
        self.text: TowerMixture | None = None
        self._backbone = _Unregistered(backbone)
        tokens_NL = backbone.tokenize(class_prompts)
        if backbone.text is None:
            with torch.no_grad():
                self._fixed_text_CE = F.normalize(
                    backbone.model.encode_text(tokens_NL).float(), dim=-1
                )
            return
        text_blocks = settings.text_blocks(backbone)
        self.text = TowerMixture(backbone.text.width, text_blocks, frozen.text, config)
        self._tokens_NL = _shortened(backbone, tokens_NL)
        # Blocks before the first with experts never change: the prompts enter them once, not every
        # step.
        self._prompts = prompt_entrance(backbone, self._tokens_NL, text_blocks.start)

    def image_features(
        self, entrance: Entrance, *, observe: Callable[[int, Tensor], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Unit-length image features (B, E), float32, and the balance loss."""
        tower = self._backbone.value.image
        x_BLD, balance = _walk(
            tower.blocks, self.vision, entrance, one_route=False, observe=observe
        )
        return F.normalize(tower.pool(x_BLD).float(), dim=-1), balance

    def text_features(
        self, *, observe: Callable[[int, Tensor], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Unit-length features of all class prompts (C, E), float32, and the balance loss.

        In a causal tower token 0, the start of text, sees only itself: it is the same in every
        prompt, so one routing decision serves all prompts (methods: constant text routing). In
        training the prompts of a step then share one draw of noise.
        """
        tower = self._backbone.value.text
        if tower is None or self.text is None:
            return self._fixed_text_CE, self._fixed_text_CE.new_zeros(())
        x_NLD, balance = _walk(
            tower.blocks, self.text, self._prompts, one_route=tower.causal, observe=observe
        )
        return F.normalize(tower.pool(x_NLD, self._tokens_NL).float(), dim=-1), balance


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
    frozen: FrozenExperts,
    checkpoint: Path,
    identity: str,
    resume: bool,
    checkpoint_every_s: float,
    watcher: Watcher,
) -> Trained:
    """Train one task's experts.

    Args:
        backbone: frozen.
        images: what gradients come from.
        held_out: what the curve of accuracy comes from, nothing else; None: no curve.
        settings: of the run.
        frozen: experts of earlier tasks.
        checkpoint: file to write to, and to resume from.
        identity: of everything that decides the result; a checkpoint of another is refused.
        resume: go on from the checkpoint.
        checkpoint_every_s: seconds between two checkpoints.
        watcher: told of every step.

    Raises:
        DataError: nothing to resume from, or it is another run's; or the checkpoint cannot be
        written.
    """
    torch.manual_seed(settings.seed)
    class_prompts = prompts(images.class_names, images.templates[0])
    learner = Learner(backbone, class_prompts, settings, frozen).to(backbone.device)
    optimiser = AdamW(learner.parameters(), lr=settings.lr, weight_decay=0.0)
    history = History()
    done = _restore(checkpoint, identity, learner, optimiser, history) if resume else 0
    trunk = _trunk(backbone, images, settings)
    curve = _Curve(backbone, held_out, settings) if held_out is not None else None
    labels_N = torch.from_numpy(images.labels.copy()).to(backbone.device)
    watcher.on_start(done, settings.iterations)
    written_s = time.monotonic()
    for step in range(done, settings.iterations):
        torch.manual_seed(_mixed(settings.seed, step))
        learner.train()
        index_B, epoch = _batch(len(images), settings, step)
        entrance = trunk.batch(index_B, epoch, on_chunk=watcher.on_trunk)
        with _precision(backbone, settings):
            image_BE, image_balance = learner.image_features(entrance)
            text_CE, text_balance = learner.text_features()
        logits_BC = backbone.logit_scale * (image_BE @ text_CE.T)
        labels_B = labels_N[torch.from_numpy(index_B)]
        loss = F.cross_entropy(logits_BC, labels_B, label_smoothing=settings.label_smoothing)
        if settings.balance:
            loss = loss + settings.balance * (image_balance + text_balance)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        accuracy = float((logits_BC.argmax(1) == labels_B).float().mean())
        history.losses.append(float(loss.detach()))
        history.accuracies.append(accuracy)
        if curve is not None and curve.is_due(step + 1):
            history.held_out.append((step + 1, curve.accuracy(learner)))
        if time.monotonic() - written_s >= checkpoint_every_s:
            _save(checkpoint, identity, learner, optimiser, history)
            written_s = time.monotonic()
        watcher.on_step(step + 1, history.losses[-1], accuracy)
    _save(checkpoint, identity, learner, optimiser, history)
    return Trained(learner.eval(), history, trunk)


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Linear warm-up, then a cosine to zero; `step` counts from 0."""
    warmup = round(settings.warmup * settings.iterations)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.iterations - warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class _Unregistered:
    """Keeps the frozen backbone out of the learner's parameters and checkpoints."""

    value: Backbone


def _walk(
    blocks: Sequence[Block],
    mixtures: TowerMixture,
    entrance: Entrance,
    *,
    one_route: bool,
    observe: Callable[[int, Tensor], None] | None,
) -> tuple[Tensor, Tensor]:
    """Go from the entrance through all blocks with experts, as `RoutedModel` does."""
    first, *rest = mixtures.blocks
    attended_BLD = entrance.attended_BLD
    if observe is not None:
        observe(first, attended_BLD)
    y_BLD, balance = mixtures[first](attended_BLD, one_route=one_route)
    x_BLD = entrance.after_BLD + y_BLD
    for index in rest:
        x_BLD = blocks[index].attend(x_BLD, entrance.mask)
        if observe is not None:
            observe(index, x_BLD)
        y_BLD, more = mixtures[index](x_BLD, one_route=one_route)
        x_BLD = x_BLD + blocks[index].mlp(x_BLD) + y_BLD
        balance = balance + more
    return x_BLD, balance


@torch.no_grad()
def _shortened(backbone: Backbone, tokens_NL: Tensor) -> Tensor:
    """Cut the padding that all prompts share, where that changes nothing.

    In a causal tower no token sees a later one, so what follows the end of the longest prompt
    cannot matter to the tokens before it; and the feature is read at the end of the text. A tower
    that reads it elsewhere (the last position, say) is found out by trying.
    """
    text = backbone.text
    assert text is not None
    used = (
        int(tokens_NL.ne(0).any(0).nonzero().max()) + 1
    )  # 0 pads; where something else does, nothing is cut
    if not text.causal or used == tokens_NL.shape[1]:
        return tokens_NL
    few_NL = tokens_NL[:4]
    whole_NE, cut_NE = _features(backbone, few_NL), _features(backbone, few_NL[:, :used])
    same = torch.allclose(whole_NE, cut_NE, rtol=1e-3, atol=1e-4)
    return tokens_NL[:, :used] if same else tokens_NL


def _features(backbone: Backbone, tokens_NL: Tensor) -> Tensor:
    assert backbone.text is not None
    last = len(backbone.text.blocks) - 1
    entrance = prompt_entrance(backbone, tokens_NL, last)
    return F.normalize(backbone.text.pool(entrance.after_BLD, tokens_NL).float(), dim=-1)


def _trunk(backbone: Backbone, images: ImageSet, settings: TrainSettings) -> ImageTrunk:
    """Cache as many copies as pay off: none if no image is seen twice, or if they do not fit."""
    first = settings.first_image_block(backbone)
    seen = settings.iterations * settings.batch_size / len(images)
    wanted = min(max(1, settings.augmented_copies), math.ceil(seen))
    fitting = CACHE_BYTES // (entrance_bytes(backbone, first) * len(images))
    return ImageTrunk(
        backbone,
        images,
        first,
        augment=settings.augmented_copies > 0,
        copies=0 if seen <= 1 else min(wanted, fitting),
        seed=settings.seed,
    )


class _Curve:
    """Accuracy on held-out images, a few times in a run."""

    def __init__(self, backbone: Backbone, held_out: ImageSet, settings: TrainSettings) -> None:
        chosen = np.random.default_rng(settings.seed).permutation(len(held_out))[:CURVE_IMAGES]
        self._images = held_out.subset(np.sort(chosen))
        first = settings.first_image_block(backbone)
        copies = CACHE_BYTES // (4 * entrance_bytes(backbone, first) * len(self._images))
        self._trunk = ImageTrunk(
            backbone, self._images, first, augment=False, copies=min(1, copies), seed=0
        )
        self._every = max(1, settings.iterations // CURVE_POINTS)
        self._last, self._size = settings.iterations, settings.batch_size

    def is_due(self, step: int) -> bool:
        return step % self._every == 0 or step == self._last

    @torch.no_grad()
    def accuracy(self, learner: Learner) -> float:
        learner.eval()
        text_CE, _ = learner.text_features()
        hits = 0
        for index_B in _parts(len(self._images), self._size):
            features_BE, _ = learner.image_features(self._trunk.batch(index_B, 0))
            guess_B = (features_BE @ text_CE.T).argmax(1).cpu().numpy()
            hits += int((guess_B == self._images.labels[index_B]).sum())
        return hits / len(self._images)


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
    path: Path, identity: str, learner: Learner, optimiser: AdamW, history: History
) -> int:
    """Take up a checkpoint; return how many steps it has done."""
    state: dict[str, Any] = load_checkpoint(path)
    if state.get("identity") != identity:
        raise DataError(
            f"{path.parent} holds another run: data, settings, backbone or earlier bundles differ"
        )
    learner.load_state_dict(state["learner"])
    optimiser.load_state_dict(state["optimiser"])
    for name, values in state["history"].items():
        setattr(history, name, list(values))
    return len(history.losses)
