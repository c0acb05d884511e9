"""The image tower learns names: a softmax over all names of the corpus at once.

Only the mixer and the ViT blocks learn, from cached features of the frozen trunk. A name's weight
is its text embedding, the teacher's or the shipped tower's, and never moves here.

Dimensions: B batch, N names, E embedding, K nearest names.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.model import CLIP
from torch import Tensor, nn

from medley.mini import Stem
from trainer.pretrain.cache import FeatureCache
from trainer.pretrain.loop import adamw, update

_WEIGHT_DECAY = 0.05
_START_SCALE, _LEAST_SCALE, _MOST_SCALE = math.log(15.0), math.log(4.5), math.log(55.0)


class SoftLabels:
    """A name and the names nearest to it share an image, in proportion to softmax(cosine)."""

    def __init__(self, names_NE: Tensor, *, nearest: int, temperature: float) -> None:
        rows = [(part @ names_NE.T).topk(nearest) for part in names_NE.split(1024)]
        self._nearest = torch.cat([row.indices for row in rows])
        self._weights = torch.softmax(torch.cat([row.values for row in rows]) / temperature, 1)

    def loss(self, logits_BN: Tensor, labels_B: Tensor) -> Tensor:
        """Cross-entropy, mean over the batch."""
        log_BK = logits_BN.gather(1, self._nearest[labels_B])
        log_BK = log_BK - logits_BN.logsumexp(1, keepdim=True)
        return -(self._weights[labels_B] * log_BK).sum(1).mean()


class ImageLearner:
    """Trains ``model.visual`` from some rows of a feature cache; see `loop.Learner`."""

    def __init__(
        self,
        model: CLIP,
        cache: FeatureCache,
        labels: NDArray[np.int64],
        *,
        rows: NDArray[np.int64],
        names_NE: Tensor,
        soft_labels: SoftLabels,
        cosine_weight: float,
        batch: int,
        seed: int,
    ) -> None:
        self._tower = model.visual
        self._tower.train()
        self._trunk = self._tower.conv1.trunk
        self._tower.conv1 = self._tower.conv1.mix  # the trunk's part is in the cache
        self._scale = nn.Parameter(torch.tensor(_START_SCALE))
        named = [*self._tower.named_parameters(), ("scale", self._scale)]
        self._optimizer = adamw(named, weight_decay=_WEIGHT_DECAY)
        self._cache = cache
        self._learnt_rows = rows
        self._labels = labels
        self._classes = names_NE.T.contiguous()
        self._soft_labels = soft_labels
        self._cosine_weight = cosine_weight
        self._batch = batch
        self._seed = seed
        self._epoch = (-1, np.empty(0, np.int64))

    def step(self, index: int, learning_rate: float) -> dict[str, float]:
        """One batch; the chance in it (order, dropped patches) follows from ``index``."""
        rows = self._rows(index)
        labels_B = torch.from_numpy(self._labels[rows])
        torch.manual_seed(self._seed + index)
        image_BE = F.normalize(self._tower(self._cache.stacked(rows)), dim=-1)
        logits_BN = self._scale.exp() * image_BE @ self._classes
        loss = self._soft_labels.loss(logits_BN, labels_B)
        cosine = (image_BE * self._classes.T[labels_B]).sum(1).mean()
        update(self._optimizer, loss - self._cosine_weight * cosine, learning_rate)
        with torch.no_grad():
            self._scale.clamp_(_LEAST_SCALE, _MOST_SCALE)
        top1 = (logits_BN.argmax(1) == labels_B).float().mean()
        return {
            "loss": loss.item(),
            "cosine": cosine.item(),
            "top1": top1.item(),
            "scale": self._scale.exp().item(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Tower without trunk, scale, optimizer."""
        return {
            "tower": self._tower.state_dict(),
            "scale": self._scale.detach(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a `state_dict`."""
        self._tower.load_state_dict(state["tower"])
        with torch.no_grad():
            self._scale.copy_(state["scale"])
        self._optimizer.load_state_dict(state["optimizer"])

    def _rows(self, index: int) -> NDArray[np.int64]:
        """Rows of the cache for a step: each epoch shuffles anew and drops its last odd rows."""
        steps_an_epoch = max(len(self._learnt_rows) // self._batch, 1)
        epoch, place = divmod(index, steps_an_epoch)
        if self._epoch[0] != epoch:
            chance = np.random.default_rng((self._seed, epoch))
            self._epoch = (epoch, chance.permutation(self._learnt_rows))
        return self._epoch[1][place * self._batch : (place + 1) * self._batch]


def standardise(stem: Stem, sample_BChw: Tensor) -> None:
    """Freeze the mixer's channel statistics at those of a sample of the cache."""
    stem.mix.mean.copy_(sample_BChw.mean((0, 2, 3)))
    stem.mix.std.copy_(sample_BChw.std((0, 2, 3)).clamp_min(1e-3))


def load_tower(model: CLIP, state: dict[str, Any]) -> None:
    """Put a trained tower of `ImageLearner.state_dict` under a whole model's stem."""
    mixed = {name: value for name, value in state.items() if name.startswith("conv1.")}
    rest = {name: value for name, value in state.items() if name not in mixed}
    model.visual.conv1.mix.load_state_dict(
        {name.removeprefix("conv1."): value for name, value in mixed.items()}
    )
    missing, unexpected = model.visual.load_state_dict(rest, strict=False)
    assert not unexpected, unexpected
    assert all(name.startswith("conv1.") for name in missing), missing
