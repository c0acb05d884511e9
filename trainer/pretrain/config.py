"""The recipe of medley-mini as one frozen value: sizes, amounts, seeds.

Nothing is computed here. Stages compare `digest` of the fields they depend on with what they left
on disk, so a changed recipe never continues a run that was started with another one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class PretrainConfig:
    """What `medley pretrain` does. The defaults are the recipe of the shipped weights.

    Attributes:
        seed: of every random choice.
        icon_px: side of a rendered icon, and of the image the tower sees.
        colour_copies: augmented images of every colour icon in the feature cache.
        noun_copies: the same for single-colour icons whose name is made of WordNet nouns.
        other_copies: the same for the other single-colour icons (mostly interface symbols).
        cached_images: at most so many augmented images, out of all in random order.
        shard_images: augmented images in one cache file.
        patch_dropout: share of the image tokens left out in training.
        image_batch: images in one step.
        image_samples: images seen with the teacher's names, at constant learning rate.
        joint_samples: images seen after that with the shipped tower's names, while it decays.
        joint_cosine: weight of the cosine between image and name there, against the softmax.
        image_lr: its peak learning rate.
        nearest_names: names that share one image's soft label.
        label_temperature: of the softmax over cosines that makes the soft label.
        wordnet_nouns: dictionary nouns among the texts.
        text_batch: texts in one step.
        text_samples: texts seen in distillation.
        text_lr: its peak learning rate.
        checkpoint_every_s: seconds between two checkpoints of a training stage.
    """

    seed: int = 0
    icon_px: int = 128
    colour_copies: float = 6.0
    noun_copies: float = 2.0
    other_copies: float = 0.5
    shard_images: int = 2048
    cached_images: int = 98_304
    patch_dropout: float = 0.5
    image_batch: int = 64
    image_samples: int = 160_000
    joint_samples: int = 192_000
    joint_cosine: float = 5.0
    image_lr: float = 1e-3
    nearest_names: int = 8
    label_temperature: float = 0.05
    wordnet_nouns: int = 24_000
    text_batch: int = 128
    text_samples: int = 420_000
    text_lr: float = 1e-3
    checkpoint_every_s: float = 240.0

    def digest(self, *fields: str) -> str:
        """Short digest of the named fields (all but the checkpoint interval if none is named)."""
        values = asdict(self)
        values.pop("checkpoint_every_s")
        chosen = {name: values[name] for name in (fields or sorted(values))}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:12]
