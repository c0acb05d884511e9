"""What the stages of one recipe share: where each leaves its work, and what they read from it.

Nothing is learnt here. A file's name carries a digest of the part of the recipe that it depends on
and of the pinned packages, so another recipe starts afresh beside it.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

from torch import Tensor

from trainer import sources
from trainer.pretrain.cache import CachePlan, FeatureCache, plan_cache
from trainer.pretrain.config import PretrainConfig
from trainer.pretrain.corpus import Corpus, Emoji, build_corpus, read_nouns
from trainer.pretrain.render import IconSet, load_set
from trainer.pretrain.teacher import TeacherTexts

LEARNT_ICONS = (*sources.COLOUR_ICONS, *sources.MONO_ICONS)
ALL_ICONS = (*LEARNT_ICONS, *sources.HELD_OUT_ICONS)
PACKAGES = (*ALL_ICONS, *sources.TEXTS_AND_TEACHERS)

_TEACHER_FIELDS = ("seed", "icon_px", "wordnet_nouns")
_TEXT_FIELDS = (*_TEACHER_FIELDS, "text_batch", "text_lr")
_CACHE_FIELDS = ("seed", "icon_px", "colour_copies", "noun_copies", "other_copies", "shard_images")
_IMAGE_FIELDS = (
    *_CACHE_FIELDS,
    "cached_images",
    "image_batch",
    "image_lr",
    "nearest_names",
    "label_temperature",
    "patch_dropout",
)


class Workplace:
    """One recipe in one cache folder (about 7 GB).

    Attributes:
        config: the recipe.
        cache: its ``sources`` folder may be shared with other uses of the packages.
    """

    def __init__(self, config: PretrainConfig, cache: Path) -> None:
        self.config = config
        self.cache = cache.expanduser()

    def package(self, name: str) -> Path:
        """The unpacked package of a source."""
        return sources.fetch(sources.source(name), self.cache)

    def file(self, name: str, *fields: str, suffix: str = ".pt") -> Path:
        """Where something lies that depends on these fields of the recipe (all, if none)."""
        pins = "".join(source.sha256 for source in PACKAGES)
        digest = hashlib.sha256((self.config.digest(*fields) + pins).encode()).hexdigest()[:12]
        return self.cache / "pretrain" / f"{name}-{digest}{suffix}"

    @property
    def icons(self) -> Path:
        """Folder of rendered icon sets."""
        return self.file("icons", "icon_px", suffix="")

    @property
    def stem(self) -> Path:
        """The pretrained stem's state."""
        return self.file("stem", "icon_px")

    @property
    def features(self) -> Path:
        """Folder of the feature cache."""
        return self.file("features", *_CACHE_FIELDS, suffix="")

    @property
    def teacher_texts(self) -> Path:
        """Teacher embeddings of all texts and tokens."""
        return self.file("teacher", *_TEACHER_FIELDS)

    @property
    def image(self) -> Path:
        """Checkpoint of the image stage; its length is not in the name, see `loop.Schedule`."""
        return self.file("image", *_IMAGE_FIELDS)

    @property
    def text(self) -> Path:
        """Checkpoint of distillation; its length is not in the name either."""
        return self.file("text", *_TEXT_FIELDS)

    @property
    def joint(self) -> Path:
        """Checkpoint of the joint stage."""
        return self.file("joint")

    @property
    def image_steps(self) -> range:
        """Steps of the image stage."""
        return range(self.config.image_samples // self.config.image_batch)

    @property
    def joint_steps(self) -> range:
        """Steps of the joint stage: they go on counting."""
        more = self.config.joint_samples // self.config.image_batch
        return range(self.image_steps.stop, self.image_steps.stop + more)

    @property
    def text_steps(self) -> range:
        """Steps of distillation."""
        return range(self.config.text_samples // self.config.text_batch)

    def icon_set(self, name: str) -> IconSet:
        """One rendered set."""
        return load_set(name, self.icons)

    @cached_property
    def emoji(self) -> Emoji:
        """Labels, search words, groups."""
        return Emoji.read(self.package("emojibase"))

    @cached_property
    def corpus(self) -> Corpus:
        """What is learnt from; the sets must have been rendered."""
        learnt = [self.icon_set(source.name) for source in LEARNT_ICONS]
        nouns = read_nouns(self.package("wordnet"))
        return build_corpus(learnt, self.icon_set("openmoji"), self.emoji, nouns)

    @cached_property
    def plan(self) -> CachePlan:
        """Which picture is in which row of the feature cache."""
        copies = {
            "colour": self.config.colour_copies,
            "noun": self.config.noun_copies,
            "other": self.config.other_copies,
        }
        return plan_cache(
            self.corpus,
            copies,
            most=self.config.cached_images,
            shard_images=self.config.shard_images,
            seed=self.config.seed,
        )

    def feature_cache(self) -> FeatureCache:
        """The complete feature cache."""
        return FeatureCache(self.plan, self.features)

    @cached_property
    def texts(self) -> TeacherTexts:
        """What the teacher says; made by the embed stage."""
        return TeacherTexts.load(self.teacher_texts)

    @cached_property
    def teacher_names(self) -> Tensor:
        """(names, 384): the teacher's centred embedding of each name of the corpus."""
        return self.texts.of(self.corpus.names)

    def frequent_names(self) -> set[str]:
        """Names that most pictures have."""
        colour = {item.name for item in self.corpus.items if item.kind == "colour"}
        return colour.union(self.emoji.keywords, self.corpus.held_out)
