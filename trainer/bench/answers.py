"""What every path says of every test image, computed once: all protocols and routers count in it.

A path's answer for an image follows from (image, path) alone: not from its batch, nor from what
else is loaded. So the accuracy after each task of a sequence is a matter of who was there to answer
then, and one pass over the images serves every router, protocol and order. That this is so in
shuffled batches of all data sets, through the classifier that serves, `mixed_batches` measures.

Legend: N images, C classes, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medley.classifier import Ask, Classifier, logits
from medley.prompts import class_text_features
from medley.routed import ZERO_SHOT
from trainer.datasets import ImageSet, normalised
from trainer.frozen import frozen_buckets, frozen_features

__all__ = ["Answers", "Hits", "Paths"]

Paths = NDArray[np.int64]
Hits = NDArray[np.bool_]


class Answers:
    """The test images of a sequence, and what each path makes of them.

    Args:
        classifier: with all tasks loaded.
        paths: of each task.
        tests: of each data set, in the order of the sequence; learnt or not.
        on_images: told how many more images have been encoded.
    """

    def __init__(
        self,
        classifier: Classifier,
        paths: Mapping[str, int],
        tests: Mapping[str, ImageSet],
        *,
        on_images: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.tests = tests
        self._classifier, self._on_images = classifier, on_images
        self._task_of = {path: task for task, path in paths.items()}
        self._features: dict[tuple[str, int], Tensor] = {}  # (N, E), NaN where not asked for
        self._logits: dict[tuple[str, int], Tensor] = {}  # (N, C), NaN where not asked for
        self._texts: dict[tuple[str, int], Tensor] = {}
        self._union = [normalised(name) for images in tests.values() for name in images.class_names]

    def hits(self, task: str, paths_N: Paths, *, union: bool = False) -> Hits:
        """Which images of a data set are answered right if each takes the path given.

        Args:
            task: whose test images.
            paths_N: for each of them a task's path, or ZERO_SHOT.
            union: answer among the classes of all data sets: those of the path's own task, or all
                of them where the image stays zero-shot; otherwise among this data set's classes.
        """
        hit_N = np.zeros(len(self.tests[task]), dtype=bool)
        for path in np.unique(paths_N).tolist():
            rows = np.flatnonzero(paths_N == path)
            if union:
                names, text_CE = self._choices(path)
                said = self._compared(task, path, rows, text_CE)
            else:
                names, said = self.classes(task), iter(self.logits(task, path, rows))
            guessed = [names[int(one_C.argmax())] for one_C in said]
            hit_N[rows] = self.right(task, rows, guessed)
        return hit_N

    def again(self, classifier: Classifier, paths: Mapping[str, int]) -> Answers:
        """The same images with other tasks loaded; what zero-shot says of them is kept."""
        other = Answers(classifier, paths, self.tests, on_images=self._on_images)
        for name in ("_features", "_logits", "_texts"):
            known: dict[tuple[str, int], Tensor] = getattr(self, name)
            getattr(other, name).update({k: t for k, t in known.items() if k[1] == ZERO_SHOT})
        return other

    def classes(self, task: str) -> list[str]:
        """The class names of a data set, as they are compared."""
        return [normalised(name) for name in self.tests[task].class_names]

    def logits(self, task: str, path: int, rows: NDArray[np.int64]) -> Tensor:
        """What a path says of some images of a data set, among its own classes (rows, C)."""
        if (task, path) not in self._logits:
            shape = len(self.tests[task]), len(self.tests[task].class_names)
            self._logits[task, path] = torch.full(shape, torch.nan)
        logits_NC = self._logits[task, path]
        missing = rows[logits_NC[rows, 0].isnan().numpy()]
        for row, said_C in zip(
            missing, self._compared(task, path, missing, self._text(task, path)), strict=True
        ):
            logits_NC[row] = said_C
        return logits_NC[torch.from_numpy(rows)]

    def right(self, task: str, rows: NDArray[np.int64], guessed: Sequence[str]) -> Hits:
        """Which of some images of a data set have the class that was guessed."""
        names, labels = self.classes(task), self.tests[task].labels[rows]
        truth = [names[label] for label in labels]
        return np.array([guess == true for guess, true in zip(guessed, truth, strict=True)], bool)

    def mixed_batches(self, count: int, seed: int, *, nearest: int = 0) -> dict[str, int]:
        """Send images of all data sets in shuffled batches through the classifier, DDAS deciding.

        Args:
            count: at most so many.
            seed: of the order.
            nearest: how many neighbours are to answer for an image that nobody claims.

        Returns:
            how many images went, and of how many the features along the path or along those of the
            neighbours differ by any bit from those that the rest of the benchmark counts in.
        """
        places = [(task, row) for task, images in self.tests.items() for row in range(len(images))]
        order = np.random.default_rng(seed).permutation(len(places))[:count]
        size, backbone = self._classifier.max_batch, self._classifier.model.backbone
        differ = 0
        for start in range(0, len(order), size):
            batch = [places[place] for place in order[start : start + size]]
            pixels = [backbone.pixels(self.tests[task].image(row)) for task, row in batch]
            asks = [Ask(nearest=nearest)] * len(batch)
            routed = self._classifier.route(torch.stack(pixels), asks)
            for at, (task, row) in enumerate(batch):
                got = {routed.paths[at]: routed.features_BE[at].cpu()}
                got |= {other.path: other.features_E for other in routed.others[at]}
                differ += not all(
                    torch.equal(self._encoded(task, path, np.array([row]))[0], features_E)
                    for path, features_E in got.items()
                )
        return {"images": len(order), "features_that_differ": differ}

    def _compared(
        self, task: str, path: int, rows: NDArray[np.int64], text_CE: Tensor
    ) -> Iterator[Tensor]:
        """Logits (C,) of each image along a path, as a server computes them: one by one."""
        scale = self._classifier.model.backbone.logit_scale
        for features_E in self._encoded(task, path, rows):
            yield logits(features_E, text_CE, scale)

    def _choices(self, path: int) -> tuple[list[str], Tensor]:
        """Names to choose from among all, and their text features along the path (C, E)."""
        if path == ZERO_SHOT:
            return self._union, torch.cat([self._text(other, ZERO_SHOT) for other in self.tests])
        task = self._task_of[path]
        return self.classes(task), self._text(task, path)

    def _text(self, task: str, path: int) -> Tensor:
        if (task, path) not in self._texts:
            images = self.tests[task]
            self._texts[task, path] = class_text_features(
                self._classifier.model, images.class_names, images.templates, path
            ).cpu()
        return self._texts[task, path]

    def _encoded(self, task: str, path: int, rows: NDArray[np.int64]) -> Tensor:
        """Features along a path (rows, E), unit length; encoded now where they were not before."""
        images, width = self.tests[task], self._classifier.model.backbone.embed_dim
        if (task, path) not in self._features:
            self._features[task, path] = torch.full((len(images), width), torch.nan)
        features_NE = self._features[task, path]
        missing = [int(row) for row in rows if features_NE[row, 0].isnan()]
        if missing:
            features_NE[missing] = self._encode(images.subset(missing), path)
            self._on_images(len(missing))
        return features_NE[torch.from_numpy(rows)]

    def _encode(self, images: ImageSet, path: int) -> Tensor:
        if path == ZERO_SHOT:
            return frozen_features(self._classifier, images)
        taps: Sequence[str] = self._classifier.selectors.taps
        return torch.cat(
            [
                self._classifier.follow(frozen, [Ask(path)] * count).features_BE.cpu()
                for frozen, count in frozen_buckets(self._classifier, images, taps=taps)
            ]
        )
