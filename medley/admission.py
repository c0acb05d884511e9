"""Between a verified bundle and a path that may be routed to.

Does it suit this backbone, and does it still say what the trainer saw? A bundle carries a few
inputs with their answers, and the very model that will serve it runs them first: a task that loads
but answers wrongly is the worst kind of failure, because nobody notices.

Legend: N self-test images, C classes, E joint embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medley.backbone import Backbone
from medley.bundle import Bundle
from medley.classifier import Ask, Classifier, logits
from medley.decoupled import task_update
from medley.errors import BackboneError, BundleError
from medley.manifest import BackboneRef
from medley.precision import ADDED_TOLERANCE
from medley.routed import PackedTask
from medley.selector import TaskSelector
from medley.unified import Unified

__all__ = ["PackedBundle", "admit", "backbone_ref", "pack", "prove", "record_self_test", "retire"]

_PATH = ("vision.", "text.", "trigger")  # how the names of what becomes the path begin


@dataclass(frozen=True)
class PackedBundle:
    """A bundle that suits the backbone of a classifier, ready for its slots."""

    bundle: Bundle  # without its experts, which are in `task`
    task: PackedTask
    selector: TaskSelector

    @property
    def size_bytes(self) -> int:
        """What it takes on the host, but for a few lines of manifest."""
        tensors = self.bundle.tensors.values()
        return self.task.size_bytes + sum(tensor.nbytes for tensor in tensors)


def backbone_ref(backbone: Backbone) -> BackboneRef:
    """Describe a backbone as a manifest names it."""
    return BackboneRef(
        name=backbone.name,
        fingerprint=backbone.fingerprint,
        image_size=backbone.image_size,
        embed_dim=backbone.embed_dim,
    )


def record_self_test(
    classifier: Classifier, path: int, class_text_CE: Tensor, pixels_NCHW: Tensor
) -> dict[str, Tensor]:
    """Run the inputs of a self-test along a loaded path and keep the answers.

    Args:
        classifier: with the path's experts and selector loaded.
        path: the task's path.
        class_text_CE: its class text features.
        pixels_NCHW: uint8, as `Backbone.pixels` makes them.

    Returns:
        the bundle's `self_test.*` tensors: pixels, logits (N, C) and scores (N,).
    """
    logits_NC, scores_N = _answers(classifier, path, class_text_CE, pixels_NCHW)
    return {
        "self_test.pixels": pixels_NCHW,
        "self_test.logits": logits_NC,
        "self_test.scores": scores_N,
    }


def pack(bundle: Bundle, classifier: Classifier, unified: Unified | None = None) -> PackedBundle:
    """Do what admitting a bundle takes on the host; any thread may.

    Args:
        bundle: what `read_bundle` made.
        classifier: the one that will serve it.
        unified: the unified model that the bundle names, if it names one.

    Raises:
        BundleError: it is for another backbone (code `wrong_backbone`, every difference is listed),
            or its unified model is missing or another one, see `task_update`.
        CapacityError: it is larger than the slots of this classifier.
    """
    _check_backbone(bundle, classifier)
    try:
        task = classifier.model.pack(task_update(bundle, unified))
    except (BackboneError, ValueError) as error:
        raise BundleError([str(error)], code="wrong_backbone") from error
    rest = {n: t for n, t in bundle.tensors.items() if not n.startswith(_PATH)}
    return PackedBundle(Bundle(bundle.manifest, rest), task, bundle.selector())


def admit(
    bundle: Bundle | PackedBundle,
    classifier: Classifier,
    *,
    unified: Unified | None = None,
    images: int | None = None,
) -> int:
    """Load a bundle, run its self-test on the real model, and make it routable.

    Args:
        bundle: what `read_bundle` or `pack` made.
        classifier: the one that will serve it.
        unified: the unified model that a bundle names; one that is packed has no need of it.
        images: at least 1, how many of the self-test to run now; the others are for `prove`. None:
            all of them.

    Returns:
        its path.

    Raises:
        BundleError: as for `pack`, or it answers otherwise than when it was made
            (`self_test_failed`). Nothing stays loaded.
        CapacityError: there is no room for it. Nothing stays loaded.
    """
    packed = pack(bundle, classifier, unified) if isinstance(bundle, Bundle) else bundle
    path = classifier.model.load(packed.task)
    try:
        classifier.selectors.add(path, packed.selector)
        prototypes_CE = packed.bundle.prototypes
        if prototypes_CE is not None:
            classifier.neighbours.add(path, prototypes_CE)
        classifier.prepare()
        prove(packed, classifier, path, slice(images))
    except (BackboneError, ValueError) as error:  # DDAS looks at a feature that is not here
        retire(path, classifier)
        raise BundleError([f"DDAS: {error}"], code="wrong_backbone") from error
    except BaseException:
        retire(path, classifier)
        raise
    return path


def prove(packed: PackedBundle, classifier: Classifier, path: int, images: slice) -> None:
    """Run some images of a bundle's self-test along its path.

    Raises:
        BundleError: it answers otherwise than when it was made (`self_test_failed`).
    """
    tensors, manifest = packed.bundle.tensors, packed.bundle.manifest
    tolerance = manifest.self_test.tolerance + ADDED_TOLERANCE[classifier.model.precision]
    logits_NC, scores_N = _answers(
        classifier,
        path,
        tensors["class_text_features"].float(),
        tensors["self_test.pixels"][images],
    )
    checks = (
        ("logits", logits_NC, tensors["self_test.logits"][images]),
        ("DDAS scores", scores_N, tensors["self_test.scores"][images]),
    )
    problems = [
        f"self-test: {name} differ by {worst:.3g}, {tolerance:.3g} is allowed"
        for name, ours, theirs in checks
        if not (worst := float((ours - theirs).abs().max())) <= tolerance
    ]
    if problems:
        raise BundleError(problems, code="self_test_failed")


def retire(path: int, classifier: Classifier) -> None:
    """Take a path out of routing and free its slots."""
    if path in classifier.selectors.tasks:
        classifier.selectors.remove(path)
    if path in classifier.neighbours.paths:
        classifier.neighbours.remove(path)
    classifier.model.unload(path)
    classifier.prepare()


def _check_backbone(bundle: Bundle, classifier: Classifier) -> None:
    manifest, backbone = bundle.manifest, classifier.model.backbone
    ours = backbone_ref(backbone)
    problems = [
        f"{name}: made for {getattr(manifest.backbone, name)}, this backbone has {value}"
        for name, value in ours
        if name != "name" and getattr(manifest.backbone, name) != value
    ]
    text_width = backbone.text.width if backbone.text else None
    for tower, spec, width, blocks in (
        ("vision", manifest.vision, backbone.image.width, len(backbone.image.blocks)),
        ("text", manifest.text, text_width, len(backbone.text.blocks) if backbone.text else 0),
    ):
        if spec.blocks and spec.width != width:
            problems.append(f"{tower} experts are {spec.width} wide, the tower is {width}")
        if any(block >= blocks for block in spec.blocks):
            problems.append(f"{tower} experts up to block {max(spec.blocks)}, there are {blocks}")
    for feature, digest in manifest.selector.extractors.items():
        extractor = classifier.model.extractors.get(feature)
        if extractor is None:
            problems.append(f"its selector looks at {feature}, whose network is not loaded here")
        elif extractor.digest != digest:
            problems.append(f"{feature}: made with weights {digest}, here are {extractor.digest}")
    if problems:
        raise BundleError(problems, code="wrong_backbone")


def _answers(
    classifier: Classifier, path: int, class_text_CE: Tensor, pixels_NCHW: Tensor
) -> tuple[Tensor, Tensor]:
    routed = classifier.route(pixels_NCHW, [Ask(path)] * len(pixels_NCHW))
    scale = classifier.model.backbone.logit_scale
    class_text_CE = class_text_CE.to(routed.features_BE.device)
    logits_NC = torch.stack([logits(row, class_text_CE, scale) for row in routed.features_BE])
    return logits_NC.cpu(), routed.scores_BT[:, routed.tasks.index(path)].cpu()
