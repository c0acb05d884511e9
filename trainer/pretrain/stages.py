"""The stages of the recipe, in order, and where each leaves what it made.

Every stage can be run again: it goes on where it stopped, and does nothing if it has finished. What
depends on the recipe has its digest in the file name, so another recipe starts afresh beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor

from medley.mini import WEIGHTS, build_mini, load_mini, mini_tokenizer
from trainer import sources
from trainer.pretrain.cache import CachePlan, FeatureCache, fill_cache, plan_cache
from trainer.pretrain.card import write_numbers
from trainer.pretrain.config import PretrainConfig
from trainer.pretrain.corpus import Corpus, Emoji, build_corpus, read_nouns
from trainer.pretrain.examination import (
    Reader,
    Result,
    class_features,
    examine,
    examine_suite,
    shipped_reader,
)
from trainer.pretrain.export import export
from trainer.pretrain.files import load_state, save_json, save_state
from trainer.pretrain.image import ImageLearner, SoftLabels, load_tower, standardise
from trainer.pretrain.loop import Learner, Schedule, finished, learn
from trainer.pretrain.progress import Progress
from trainer.pretrain.render import IconSet, load_set, render_sets
from trainer.pretrain.stem import pretrained_stem
from trainer.pretrain.teacher import MiniLM, TeacherTexts
from trainer.pretrain.text import TextLearner, TextTable
from trainer.pretrain.words import distillation_texts, forms, wordnet_nouns
from trainer.suite import TASKS, load_task

_CACHE_FIELDS = (
    "seed",
    "icon_px",
    "colour_copies",
    "noun_copies",
    "other_copies",
    "shard_images",
)
_IMAGE_FIELDS = (
    "cached_images",
    "image_batch",
    "image_lr",
    "nearest_names",
    "label_temperature",
    "patch_dropout",
)
_TEXT_FIELDS = ("seed", "icon_px", "wordnet_nouns", "text_batch", "text_lr")
_ALL_KINDS, _THINGS = {"colour", "noun", "other"}, {"colour", "noun"}
_JOINT_PROMPTS = ("{}", "an icon of a {}", "a photo of a {}.")
_WARMUP_STEPS = 150
_TEXT_DECAY = 0.3  # share of distillation in which its learning rate falls


@dataclass
class Pretraining:
    """One recipe in one cache folder.

    Attributes:
        config: the recipe.
        cache: gets sources, pictures, features and checkpoints (about 7 GB).
        progress: where people can watch.
        workers: processes for rendering and caching.
        weights: where the embedded weights go, with evaluation and model card beside them.
    """

    config: PretrainConfig
    cache: Path
    progress: Progress
    workers: int = 2
    weights: Path = WEIGHTS
    _stages: dict[str, Callable[[], None]] = field(init=False)

    def __post_init__(self) -> None:
        self.cache = self.cache.expanduser()
        self._stages = {
            "fetch": self.fetch,
            "render": self.render,
            "embed": self.embed_texts,
            "cache": self.cache_features,
            "image": self.train_image,
            "text": self.distil_text,
            "joint": self.tune_jointly,
            "export": self.export,
            "evaluate": self.evaluate,
        }

    @property
    def stage_names(self) -> tuple[str, ...]:
        """In the order in which they need each other."""
        return tuple(self._stages)

    def run(self, *stages: str) -> None:
        """Run the named stages in order, or all."""
        for name in stages or self.stage_names:
            self._stages[name]()

    # What the stages need, made when first asked for.

    def package(self, name: str) -> Path:
        """The unpacked package of a source."""
        return sources.fetch(sources.source(name), self.cache)

    @property
    def work(self) -> Path:
        """Everything but the sources."""
        return self.cache / "pretrain"

    @property
    def icons(self) -> Path:
        """Rendered icon sets."""
        return self.work / f"icons-{self.config.digest('icon_px')}"

    @cached_property
    def emoji(self) -> Emoji:
        """Labels, search words, groups."""
        return Emoji.read(self.package("emojibase"))

    def icon_set(self, name: str) -> IconSet:
        """One rendered set."""
        return load_set(name, self.icons)

    @cached_property
    def corpus(self) -> Corpus:
        """What is learnt from."""
        learnt = [self.icon_set(s.name) for s in (*sources.COLOUR_ICONS, *sources.MONO_ICONS)]
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

    @property
    def features(self) -> Path:
        """The feature cache."""
        return self.work / f"features-{self.config.digest(*_CACHE_FIELDS)}"

    def feature_cache(self) -> FeatureCache:
        """The complete feature cache."""
        return FeatureCache(self.plan, self.features)

    @cached_property
    def texts(self) -> TeacherTexts:
        """What the teacher says; made by the embed stage."""
        return TeacherTexts.load(self.teacher_file)

    @property
    def teacher_file(self) -> Path:
        """Teacher embeddings of all texts and tokens."""
        return self.work / f"teacher-{self.config.digest('seed', 'icon_px', 'wordnet_nouns')}.pt"

    @cached_property
    def teacher_names(self) -> Tensor:
        """(names, 384): the teacher's centred embedding of each name of the corpus."""
        return self.texts.of(self.corpus.names)

    @property
    def image_file(self) -> Path:
        """Checkpoint of the image stage; how long it lasts is not in the name, see `Schedule`."""
        return self.work / f"image-{self.config.digest(*_CACHE_FIELDS, *_IMAGE_FIELDS)}.pt"

    @property
    def text_file(self) -> Path:
        """Checkpoint of distillation."""
        return self.work / f"text-{self.config.digest(*_TEXT_FIELDS)}.pt"

    @property
    def joint_file(self) -> Path:
        """Checkpoint of the joint stage."""
        return self.work / f"joint-{self.config.digest()}.pt"

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

    def image_schedule(self) -> Schedule:
        """Constant with the teacher's names, falling with the shipped tower's."""
        return Schedule(
            self.config.image_lr,
            warmup=_WARMUP_STEPS,
            decay_from=self.image_steps.stop,
            steps=self.joint_steps.stop,
        )

    def image_learner(
        self, model: CLIP, names_NE: Tensor, *, kinds: set[str], cosine_weight: float = 0.0
    ) -> ImageLearner:
        """A learner of pictures of some kinds, whose classes are embeddings of all names."""
        cache = self.feature_cache()
        chance = np.random.default_rng(self.config.seed)
        standardise(model.visual.conv1, cache.stacked(chance.choice(cache.num_rows, 2048)))
        shown = [self.corpus.label[item.name] for item in self.corpus.items]
        shown_kinds = np.asarray([item.kind for item in self.corpus.items])[self.plan.order]
        return ImageLearner(
            model,
            cache,
            np.asarray(shown)[self.plan.order],
            rows=np.flatnonzero(np.isin(shown_kinds, sorted(kinds))),
            names_NE=names_NE,
            soft_labels=SoftLabels(
                self.teacher_names,
                nearest=self.config.nearest_names,
                temperature=self.config.label_temperature,
            ),
            cosine_weight=cosine_weight,
            batch=self.config.image_batch,
            seed=self.config.seed,
        )

    # The stages.

    def fetch(self) -> None:
        """Fetch every package that the recipe or its examination needs."""
        wanted = (
            *sources.COLOUR_ICONS,
            *sources.MONO_ICONS,
            *sources.HELD_OUT_ICONS,
            *sources.TEXTS_AND_TEACHERS,
        )
        with self.progress.task("fetch", len(wanted)) as task, ThreadPoolExecutor(4) as pool:
            for _ in pool.map(lambda source: sources.fetch(source, self.cache), wanted):
                task.advance(1)

    def render(self) -> None:
        """Draw every icon set."""
        sets = (*sources.COLOUR_ICONS, *sources.MONO_ICONS, *sources.HELD_OUT_ICONS)
        packages = {source.name: self.package(source.name) for source in sets}
        mono = [source.name for source in sources.MONO_ICONS]
        with self.progress.task("render", len(sets)) as task:
            for _ in render_sets(
                packages, mono, self.icons, px=self.config.icon_px, workers=self.workers
            ):
                task.advance(1)

    def embed_texts(self) -> None:
        """Let the teacher read every text and every token once."""
        if self.teacher_file.exists():
            return
        spoken = [*self.emoji.keywords, *self.corpus.held_out]
        spoken += [word for words in self.emoji.keywords.values() for word in words]
        texts = distillation_texts(
            self.corpus.names,
            list(dict.fromkeys(spoken)),
            wordnet_nouns(self.package("wordnet")),
            num_nouns=self.config.wordnet_nouns,
            seed=self.config.seed,
        )
        decoder = mini_tokenizer().decoder
        tokens = [decoder[index].replace("</w>", "") for index in range(len(decoder))]
        teacher = MiniLM(self.package("minilm"))
        with self.progress.task("embed", len(texts) + len(tokens)) as task:
            TeacherTexts(
                texts,
                teacher(texts, advance=task.advance),
                teacher(tokens, advance=task.advance),
                names=self.corpus.names,
            ).save(self.teacher_file)

    def cache_features(self) -> None:
        """Compute the frozen trunk's features of every augmented image."""
        stem = self.work / "stem.pt"
        save_state(stem, pretrained_stem(self.package("efficientnet-lite0")).state_dict())
        with self.progress.task("cache", len(self.plan.order)) as task:
            for rows in fill_cache(
                self.plan, stem, self.icons, self.features, workers=self.workers
            ):
                task.advance(rows)

    def train_image(self) -> None:
        """Train the image tower against the teacher's names."""
        if finished(self.image_file, self.image_steps):
            return
        torch.manual_seed(self.config.seed)
        model = build_mini(patch_dropout=self.config.patch_dropout)
        learner = self.image_learner(model, self.teacher_names, kinds=_ALL_KINDS)
        self._learn("image", learner, self.image_schedule(), self.image_file, self.image_steps)

    def distil_text(self) -> None:
        """Train the text tower on the teacher's embeddings."""
        steps = self.text_steps
        if finished(self.text_file, steps):
            return
        torch.manual_seed(self.config.seed + 1)
        model = build_mini()
        tokenizer = mini_tokenizer()
        self.texts.start(model, tokenizer, seed=self.config.seed)
        written = forms(self.texts.texts, self.frequent_names())
        table = TextTable.build(
            [form.text for form in written],
            self.texts.targets[[form.row for form in written]],
            tokenizer=tokenizer,
            weights_N=np.array([form.weight for form in written]),
        )
        learner = TextLearner(model, table, batch=self.config.text_batch, seed=self.config.seed)
        schedule = Schedule(
            self.config.text_lr,
            warmup=_WARMUP_STEPS,
            decay_from=int(len(steps) * (1 - _TEXT_DECAY)),
            steps=len(steps),
        )
        self._learn("text", learner, schedule, self.text_file, steps)

    def tune_jointly(self) -> None:
        """Go on with the image tower, now against what the shipped text tower makes of the names.

        The learning rate falls to zero here, and interface symbols are left out: the tower settles
        on things, and on the features that it will really be compared with. A cosine term draws an
        image to its name wherever that lies, which a softmax over known names need not do.
        """
        steps = self.joint_steps
        if finished(self.joint_file, steps):
            return
        model = build_mini(patch_dropout=self.config.patch_dropout)
        TextLearner.restore(model, load_state(self.text_file)["learner"])
        read = shipped_reader(model, mini_tokenizer())
        names_NE = class_features(read, self.corpus.names, _JOINT_PROMPTS)
        learner = self.image_learner(
            model, names_NE, kinds=_THINGS, cosine_weight=self.config.joint_cosine
        )
        learner.load_state_dict(load_state(self.image_file)["learner"])
        self._learn("joint", learner, self.image_schedule(), self.joint_file, steps)

    def export(self) -> None:
        """Write the embedded weights."""
        export(self.trained(), self.weights, recipe=self.config.digest())

    def evaluate(self) -> None:
        """Examine the embedded weights; writes ``evaluation.json`` and the model card's table."""
        results = self.examine(load_mini(self.weights))
        rows = [asdict(result) for result in results]
        save_json(self.weights.with_name("evaluation.json"), rows)
        write_numbers(self.weights.with_name("MODEL_CARD.md"), results)
        self.progress.table(rows)

    def trained(self) -> CLIP:
        """The best that is there: image tower of the joint or else the image stage, and text."""
        file = self.joint_file if self.joint_file.exists() else self.image_file
        image = load_state(file)["learner"]
        model = build_mini()
        model.visual.conv1.trunk = pretrained_stem(self.package("efficientnet-lite0")).trunk
        load_tower(model, image["tower"])
        TextLearner.restore(model, load_state(self.text_file)["learner"])
        with torch.no_grad():
            model.logit_scale.copy_(image["scale"])
        return model

    def examine(self, model: CLIP) -> list[Result]:
        """Zero-shot results with the shipped text tower and with its teacher."""
        teacher = MiniLM(self.package("minilm"))
        mean = self.texts.mean
        readers: dict[str, Reader] = {
            "shipped": shipped_reader(model, mini_tokenizer()),
            "teacher": lambda texts: F.normalize(teacher(texts) - mean, dim=-1),
        }
        vendors = [self.icon_set(source.name) for source in sources.HELD_OUT_ICONS]
        learnt = {source.name: self.icon_set(source.name) for source in sources.COLOUR_ICONS}
        suite = (load_task(task, "test", cache=self.cache) for task in TASKS)
        return [
            *examine(
                model,
                readers,
                vendors=vendors,
                learnt=learnt,
                corpus=self.corpus,
                emoji=self.emoji,
            ),
            *examine_suite(model, readers, suite),
        ]

    def _learn(
        self, name: str, learner: Learner, schedule: Schedule, checkpoint: Path, steps: range
    ) -> None:
        batch = self.config.text_batch if name == "text" else self.config.image_batch
        with self.progress.task(name, len(steps) * batch) as task:
            learn(
                learner,
                schedule,
                checkpoint,
                task,
                steps=steps,
                batch=batch,
                every_s=self.config.checkpoint_every_s,
            )

    def frequent_names(self) -> set[str]:
        """Names that most pictures have."""
        colour = {item.name for item in self.corpus.items if item.kind == "colour"}
        return colour.union(self.emoji.keywords, self.corpus.held_out)
