"""The stages of the recipe, in the order in which they need each other.

Every stage can be run again: it goes on where it stopped, and does nothing if it has finished.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor

from medley.errors import DataError
from medley.mini import WEIGHTS, build_mini, load_mini, mini_tokenizer
from trainer import sources
from trainer.pretrain.cache import fill_cache
from trainer.pretrain.card import write_numbers
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
from trainer.pretrain.render import render_sets
from trainer.pretrain.stem import pretrained_stem
from trainer.pretrain.teacher import MiniLM, TeacherTexts
from trainer.pretrain.text import TextLearner, TextTable
from trainer.pretrain.words import distillation_texts, forms, wordnet_nouns
from trainer.pretrain.workplace import ALL_ICONS, PACKAGES, Workplace
from trainer.suite import TASKS, load_task

_ALL_KINDS, _THINGS = {"colour", "noun", "other"}, {"colour", "noun"}
_JOINT_PROMPTS = ("{}", "an icon of a {}", "a photo of a {}.")
_WARMUP_STEPS = 150
_TEXT_DECAY = 0.3  # share of distillation in which its learning rate falls
_STATISTICS_ROWS = 2048  # of the cache, for the mixer's mean and standard deviation


class Pretraining:
    """Runs stages in a workplace.

    Args:
        place: the recipe and where its work lies.
        progress: where people can watch.
        workers: processes for rendering and caching.
        weights: where the embedded weights go, with evaluation and model card beside them.
    """

    def __init__(
        self, place: Workplace, progress: Progress, *, workers: int = 2, weights: Path = WEIGHTS
    ) -> None:
        self._place = place
        self._config = place.config
        self._progress = progress
        self._workers = workers
        self._weights = weights
        self._stages: dict[str, Callable[[], None]] = {
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

    def fetch(self) -> None:
        """Fetch every package that the recipe or its examination needs."""
        with self._progress.task("fetch", len(PACKAGES)) as task, ThreadPoolExecutor(4) as pool:
            for _ in pool.map(lambda source: self._place.package(source.name), PACKAGES):
                task.advance(1)

    def render(self) -> None:
        """Draw every icon set."""
        packages = {source.name: self._place.package(source.name) for source in ALL_ICONS}
        mono = [source.name for source in sources.MONO_ICONS]
        with self._progress.task("render", len(packages)) as task:
            for _ in render_sets(
                packages, mono, self._place.icons, px=self._config.icon_px, workers=self._workers
            ):
                task.advance(1)

    def embed_texts(self) -> None:
        """Let the teacher read every text and every token once."""
        if self._place.teacher_texts.exists():
            return
        spoken = [*self._place.emoji.keywords, *self._place.corpus.held_out]
        spoken += [word for words in self._place.emoji.keywords.values() for word in words]
        texts = distillation_texts(
            self._place.corpus.names,
            list(dict.fromkeys(spoken)),
            wordnet_nouns(self._place.package("wordnet")),
            num_nouns=self._config.wordnet_nouns,
            seed=self._config.seed,
        )
        decoder = mini_tokenizer().decoder
        tokens = [decoder[index].replace("</w>", "") for index in range(len(decoder))]
        teacher = MiniLM(self._place.package("minilm"))
        with self._progress.task("embed", len(texts) + len(tokens)) as task:
            TeacherTexts(
                texts,
                teacher(texts, advance=task.advance),
                teacher(tokens, advance=task.advance),
                names=self._place.corpus.names,
            ).save(self._place.teacher_texts)

    def cache_features(self) -> None:
        """Compute the frozen trunk's features of every augmented image."""
        stem = self._place.stem
        save_state(stem, pretrained_stem(self._place.package("efficientnet-lite0")).state_dict())
        with self._progress.task("cache", len(self._place.plan.order)) as task:
            for rows in fill_cache(
                self._place.plan,
                stem,
                self._place.icons,
                self._place.features,
                workers=self._workers,
            ):
                task.advance(rows)

    def train_image(self) -> None:
        """Train the image tower against the teacher's names."""
        if finished(self._place.image, self._place.image_steps):
            return
        torch.manual_seed(self._config.seed)
        model = build_mini(patch_dropout=self._config.patch_dropout)
        learner = self._image_learner(model, self._place.teacher_names, kinds=_ALL_KINDS)
        self._learn(
            "image", learner, self._image_schedule(), self._place.image, self._place.image_steps
        )

    def distil_text(self) -> None:
        """Train the text tower on the teacher's embeddings."""
        steps = self._place.text_steps
        if finished(self._place.text, steps):
            return
        torch.manual_seed(self._config.seed + 1)
        model = build_mini()
        tokenizer = mini_tokenizer()
        self._place.texts.start(model, tokenizer, seed=self._config.seed)
        written = forms(self._place.texts.texts, self._place.frequent_names())
        table = TextTable.build(
            [form.text for form in written],
            self._place.texts.targets[[form.row for form in written]],
            tokenizer=tokenizer,
            weights_N=np.array([form.weight for form in written]),
        )
        learner = TextLearner(model, table, batch=self._config.text_batch, seed=self._config.seed)
        schedule = Schedule(
            self._config.text_lr,
            warmup=_WARMUP_STEPS,
            decay_from=int(len(steps) * (1 - _TEXT_DECAY)),
            steps=len(steps),
        )
        self._learn("text", learner, schedule, self._place.text, steps)

    def tune_jointly(self) -> None:
        """Go on with the image tower, now against what the shipped text tower makes of the names.

        The learning rate falls to zero here, and interface symbols are left out: the tower settles
        on things, and on the features that it will really be compared with. A cosine term draws an
        image to its name wherever that lies, which a softmax over known names need not do.
        """
        steps = self._place.joint_steps
        if finished(self._place.joint, steps):
            return
        model = build_mini(patch_dropout=self._config.patch_dropout)
        TextLearner.restore(model, load_state(self._place.text)["learner"])
        read = shipped_reader(model, mini_tokenizer())
        names_NE = class_features(read, self._place.corpus.names, _JOINT_PROMPTS)
        learner = self._image_learner(
            model, names_NE, kinds=_THINGS, cosine_weight=self._config.joint_cosine
        )
        learner.load_state_dict(load_state(self._place.image)["learner"])
        self._learn("joint", learner, self._image_schedule(), self._place.joint, steps)

    def export(self) -> None:
        """Write the embedded weights."""
        export(self.trained(), self._weights, recipe=self._config.digest())

    def evaluate(self) -> None:
        """Examine the embedded weights; writes ``evaluation.json`` and the model card's table."""
        results = self.examine(load_mini(self._weights))
        rows = [asdict(result) for result in results]
        save_json(self._weights.with_name("evaluation.json"), rows)
        write_numbers(self._weights.with_name("MODEL_CARD.md"), results)
        self._progress.table(rows)

    def trained(self) -> CLIP:
        """The model that the recipe made.

        Raises:
            DataError: the joint stage has not ended.
        """
        if not finished(self._place.joint, self._place.joint_steps):
            raise DataError("nothing to export: the joint stage has not ended")
        image = load_state(self._place.joint)["learner"]
        model = build_mini()
        model.visual.conv1.trunk = pretrained_stem(self._place.package("efficientnet-lite0")).trunk
        load_tower(model, image["tower"])
        TextLearner.restore(model, load_state(self._place.text)["learner"])
        with torch.no_grad():
            model.logit_scale.copy_(image["scale"])
        return model

    def examine(self, model: CLIP) -> list[Result]:
        """Zero-shot results with the shipped text tower and with its teacher."""
        teacher = MiniLM(self._place.package("minilm"))
        mean = self._place.texts.mean
        readers: dict[str, Reader] = {
            "shipped": shipped_reader(model, mini_tokenizer()),
            "teacher": lambda texts: F.normalize(teacher(texts) - mean, dim=-1),
        }
        vendors = [self._place.icon_set(source.name) for source in sources.HELD_OUT_ICONS]
        learnt = {source.name: self._place.icon_set(source.name) for source in sources.COLOUR_ICONS}
        suite = (load_task(task, "test", cache=self._place.cache) for task in TASKS)
        return [
            *examine(
                model,
                readers,
                vendors=vendors,
                learnt=learnt,
                corpus=self._place.corpus,
                emoji=self._place.emoji,
            ),
            *examine_suite(model, readers, suite),
        ]

    def _learn(
        self, name: str, learner: Learner, schedule: Schedule, checkpoint: Path, steps: range
    ) -> None:
        batch = self._config.text_batch if name == "text" else self._config.image_batch
        with self._progress.task(name, len(steps) * batch) as task:
            learn(
                learner,
                schedule,
                checkpoint,
                task,
                steps=steps,
                batch=batch,
                every_s=self._config.checkpoint_every_s,
            )

    def _image_schedule(self) -> Schedule:
        """Constant with the teacher's names, falling with the shipped tower's."""
        return Schedule(
            self._config.image_lr,
            warmup=_WARMUP_STEPS,
            decay_from=self._place.image_steps.stop,
            steps=self._place.joint_steps.stop,
        )

    def _image_learner(
        self, model: CLIP, names_NE: Tensor, *, kinds: set[str], cosine_weight: float = 0.0
    ) -> ImageLearner:
        """A learner of pictures of some kinds, whose classes are embeddings of all names."""
        cache = self._place.feature_cache()
        chance = np.random.default_rng(self._config.seed)
        standardise(
            model.visual.conv1, cache.stacked(chance.choice(cache.num_rows, _STATISTICS_ROWS))
        )
        shown = [self._place.corpus.label[item.name] for item in self._place.corpus.items]
        shown_kinds = np.asarray([item.kind for item in self._place.corpus.items])[
            self._place.plan.order
        ]
        return ImageLearner(
            model,
            cache,
            np.asarray(shown)[self._place.plan.order],
            rows=np.flatnonzero(np.isin(shown_kinds, sorted(kinds))),
            names_NE=names_NE,
            soft_labels=SoftLabels(
                self._place.teacher_names,
                nearest=self._config.nearest_names,
                temperature=self._config.label_temperature,
            ),
            cosine_weight=cosine_weight,
            batch=self._config.image_batch,
            seed=self._config.seed,
        )
