"""How good is what was learnt: per image, in mixed batches, by the code that serves.

Every image is scored against the class list of its own data set (the protocol of the field); which
experts encode it is told, or decided by DDAS, or nobody's. Routing is reported on its own, with
every image of every set in one shuffled stream.

Legend: N images, C classes, E joint embedding width, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from medley.admission import admit
from medley.backbone import Backbone
from medley.bundle import Bundle
from medley.classifier import Ask, Classifier, logits
from medley.decoupled import task_update
from medley.errors import DataError
from medley.extractor import Extractor
from medley.precision import Precision
from medley.prompts import class_text_features
from medley.routed import ZERO_SHOT, RoutedModel
from medley.unified import Unified
from trainer.capacity import capacity_for
from trainer.datasets import ImageSet
from trainer.export import BUCKET
from trainer.pixels import pixels_of
from trainer.trunk import CHUNK

__all__ = ["Case", "Evaluation", "Score", "evaluate", "linear_probe", "served"]

PROBE_STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # C of the logistic regression
Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A data set to be measured on; `task` is None where no bundle has learnt it."""

    name: str
    test: ImageSet
    task: str | None = None
    train: ImageSet | None = None  # for the linear probe


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one data set got; shares of its images, None where it does not apply."""

    name: str
    images: int
    classes: int
    zero_shot: float
    linear_probe: float | None
    told: float | None  # by its own task's experts
    agnostic: float  # DDAS decides
    routing: float  # went to its own task, or to zero-shot if it has none
    false_reject: float | None  # refused by its own task
    alpha: float | None  # what was promised of that


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores, and where the images went: counts, rows are data sets, columns are `columns`."""

    scores: tuple[Score, ...]
    columns: tuple[str, ...]
    confusion: NDArray[np.int64]

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "scores": [asdict(score) for score in self.scores],
            "routing": {"columns": list(self.columns), "counts": self.confusion.tolist()},
        }


def served(
    bundles: Sequence[Bundle],
    backbone: Backbone,
    *,
    unified: Iterable[Unified | None] = (),
    bucket: int = BUCKET,
    precision: Precision = "exact",
    extractors: Sequence[Extractor] = (),
) -> tuple[Classifier, dict[str, int]]:
    """Admit bundles to a model as a server would.

    Args:
        bundles: of different tasks.
        backbone: the one they were learnt on.
        unified: the unified models that they name, in any order and however often.
        bucket: images in a forward.
        precision: how the image tower computes.
        extractors: networks that their selectors look at beside the backbone.

    Returns:
        the classifier and each task's path.

    Raises:
        BundleError: a bundle does not fit, its unified model is missing, or it fails its self-test.
        DataError: two bundles of one task.
    """
    tasks = [bundle.manifest.task for bundle in bundles]
    if len(set(tasks)) < len(tasks):
        raise DataError(f"two bundles of one task: {', '.join(sorted(tasks))}", code="settings")
    named = {one.digest: one for one in unified if one is not None}
    owns = [named.get(b.manifest.fusion.unified) if b.manifest.fusion else None for b in bundles]
    firsts = [bundle.manifest.first_expert_block for bundle in bundles]
    model = RoutedModel(
        backbone,
        precision=precision,
        first_expert_block=min(firsts),
        capacity=capacity_for([task_update(b, own) for b, own in zip(bundles, owns, strict=True)]),
        extractors=extractors,
    )
    classifier = Classifier(model, buckets=(bucket,))
    return classifier, {
        bundle.manifest.task: admit(bundle, classifier, unified=own)
        for bundle, own in zip(bundles, owns, strict=True)
    }


def evaluate(
    classifier: Classifier,
    paths: Mapping[str, int],
    cases: Sequence[Case],
    *,
    alphas: Mapping[str, float | None],
    seed: int = 0,
    on_images: Progress = lambda _: None,
) -> Evaluation:
    """Measure all data sets at once.

    Args:
        classifier: with the tasks loaded, as `served` returns it.
        paths: of each task.
        cases: the data sets; labels already in the order of the class names to be asked for.
        alphas: of each task, the share of its own images that it was promised to refuse at most.
        seed: of the order in which images of all sets are mixed.
        on_images: told of each batch that has gone through the model.
    """
    stream = _Stream(classifier, cases, seed, on_images)
    own = [ZERO_SHOT if case.task is None else paths[case.task] for case in cases]
    routed = stream.routed()
    zero_shot = stream.along([ZERO_SHOT] * len(cases), routed)
    told = stream.along(own, routed)
    accuracy = _Accuracy(classifier.model, cases)
    order = [*paths.values(), ZERO_SHOT]
    confusion = [[int((went_N == path).sum()) for path in order] for went_N in routed.paths]
    scores = tuple(
        Score(
            name=case.name,
            images=len(case.test),
            classes=len(case.test.class_names),
            zero_shot=accuracy.of(c, zero_shot),
            linear_probe=stream.linear_probe(case, zero_shot.features[c], seed),
            told=accuracy.of(c, told) if case.task else None,
            agnostic=accuracy.of(c, routed),
            routing=_share(routed.paths[c] == own[c]),
            false_reject=_share(~routed.accepted[c][:, routed.tasks.index(own[c])])
            if case.task
            else None,
            alpha=alphas.get(case.task) if case.task else None,
        )
        for c, case in enumerate(cases)
    )
    return Evaluation(
        scores=scores, columns=(*paths, "zero-shot"), confusion=np.array(confusion, dtype=np.int64)
    )


@dataclass(frozen=True)
class _Encoded:
    """What became of the images of each data set, in the order of the set."""

    features: list[Tensor]  # (N, E) unit length
    paths: list[NDArray[np.int64]]  # (N,)
    accepted: list[NDArray[np.bool_]]  # (N, T), columns in the order of `tasks`
    tasks: list[int]


class _Stream:
    """The images of all sets, shuffled into one stream of mixed batches."""

    def __init__(
        self, classifier: Classifier, cases: Sequence[Case], seed: int, on_images: Progress
    ) -> None:
        self._classifier, self._cases, self._on_images = classifier, cases, on_images
        places = [(c, i) for c, case in enumerate(cases) for i in range(len(case.test))]
        self._places = [places[k] for k in np.random.default_rng(seed).permutation(len(places))]

    def routed(self) -> _Encoded:
        """All images, each along the path that DDAS gives it."""
        backbone, tasks = self._classifier.model.backbone, self._classifier.selectors.tasks
        encoded = _Encoded(
            [torch.zeros(len(case.test), backbone.embed_dim) for case in self._cases],
            [np.full(len(case.test), ZERO_SHOT) for case in self._cases],
            [np.zeros((len(case.test), len(tasks)), dtype=bool) for case in self._cases],
            list(tasks),
        )
        self._encode([(c, i, Ask()) for c, i in self._places], encoded)
        return encoded

    def along(self, paths: Sequence[int], routed: _Encoded) -> _Encoded:
        """All images, those of each set along one path.

        At a fixed batch size an image's features follow from (image, path) alone, so an image that
        went along this path already is not encoded again.
        """
        encoded = _Encoded(
            [features_NE.clone() for features_NE in routed.features],
            [went_N.copy() for went_N in routed.paths],
            [accepted_NT.copy() for accepted_NT in routed.accepted],
            routed.tasks,
        )
        wanted = [(c, i, Ask(paths[c])) for c, i in self._places if routed.paths[c][i] != paths[c]]
        self._encode(wanted, encoded)
        return encoded

    def linear_probe(self, case: Case, features_NE: Tensor, seed: int) -> float | None:
        """Accuracy of a logistic regression on the zero-shot features of the training images."""
        if case.train is None:
            return None
        train_ME = self._zero_shot(case.train)
        probe = linear_probe(train_ME.numpy(), case.train.labels, seed)
        return probe.score(features_NE.numpy(), case.test.labels)

    def _zero_shot(self, images: ImageSet) -> Tensor:
        backbone = self._classifier.model.backbone
        parts = []
        for start in range(0, len(images), CHUNK):
            index = range(start, min(start + CHUNK, len(images)))
            asks = [Ask(ZERO_SHOT)] * len(index)
            routed = self._classifier.route(pixels_of(backbone, images, index), asks)
            parts.append(routed.features_BE.cpu())
            self._on_images(len(index))
        return torch.cat(parts)

    def _encode(self, wanted: Sequence[tuple[int, int, Ask]], encoded: _Encoded) -> None:
        backbone = self._classifier.model.backbone
        for start in range(0, len(wanted), CHUNK):
            batch = wanted[start : start + CHUNK]
            pictures = [self._cases[c].test.image(i) for c, i, _ in batch]
            pixels_BCHW = torch.stack([backbone.pixels(image) for image in pictures])
            routed = self._classifier.route(pixels_BCHW, [ask for _, _, ask in batch])
            for row, (c, i, _) in enumerate(batch):
                encoded.features[c][i] = routed.features_BE[row]
                encoded.paths[c][i] = routed.paths[row]
                encoded.accepted[c][i] = routed.accepted_BT[row].cpu().numpy()
            self._on_images(len(batch))


class _Accuracy:
    """Top-1 over a data set's own classes, the texts encoded along the image's path."""

    def __init__(self, model: RoutedModel, cases: Sequence[Case]) -> None:
        self._model, self._cases = model, cases
        self._texts: dict[tuple[int, int], Tensor] = {}  # by case, path

    def of(self, case: int, encoded: _Encoded) -> float:
        rows = zip(encoded.features[case], encoded.paths[case].tolist(), strict=True)
        guesses = [self._guess(case, features_E, path) for features_E, path in rows]
        return _share(np.array(guesses) == self._cases[case].test.labels)

    def _guess(self, case: int, features_E: Tensor, path: int) -> int:
        if (case, path) not in self._texts:
            test = self._cases[case].test
            text_CE = class_text_features(self._model, test.class_names, test.templates, path)
            self._texts[case, path] = text_CE.cpu()
        scale = self._model.backbone.logit_scale
        return int(logits(features_E, self._texts[case, path], scale).argmax())


def linear_probe(
    features_NE: NDArray[np.float32], labels_N: NDArray[np.int64], seed: int
) -> Pipeline:
    """Fit a logistic regression on all images, with the strength that does best on a fifth."""
    order = np.random.default_rng(seed).permutation(len(labels_N))
    fifth = max(1, len(order) // 5)
    part, rest = order[:fifth], order[fifth:]

    def fitted(strength: float, rows: NDArray[np.int64]) -> Pipeline:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
        return probe.fit(features_NE[rows], labels_N[rows])

    best = max(
        PROBE_STRENGTHS,
        key=lambda strength: fitted(strength, rest).score(features_NE[part], labels_N[part]),
    )
    return fitted(best, order)


def _share(hits_N: NDArray[np.bool_]) -> float:
    return float(hits_N.mean())
