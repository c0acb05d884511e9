"""Damaged bundles, and what reading and admitting one may do: refuse it, or take it as it is.

A seal guards every byte against damage, so most mutants end there. `Resealed` is somebody who
writes files: manifest and tensors are changed, digests and seal are made to fit.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from medley import sealed
from medley.admission import PackedBundle, admit, pack, retire
from medley.bundle import TOWERS, Bundle, read_bundle, write_bundle
from medley.classifier import Ask, Classifier
from medley.errors import BundleError, CapacityError
from medley.experts import BlockExperts
from medley.pool import Capacity
from medley.prompts import class_text_features
from medley.routed import RoutedModel
from tests.fakes import tiny_bundle
from tests.fuzz.mutation import mutated
from tests.models import tiny_backbone
from tests.service.made import make_bundle

__all__ = ["Bundles", "Resealed", "change_tensor", "change_text"]

_STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 64, 2**31, 2**63, 1e308, -0.5, 1e-300, float("nan")),
    *("", "x", "a" * 5000, "\0", "../../x", "{}", "{0.__class__}", "auto", "\ud7ff\U0001f600"),
    *([], {}, [[]], [0] * 300, {"x": {}}, {"0": []}),
)
_DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool)
_NUMBERS = (float("nan"), float("inf"), -float("inf"), 3.4e38, 1e-45, 0.0, -1.0, 1e6)


class Bundles:
    """Reading damaged files."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bundle"
            self._corpus = []
            for seed in (0, 1):
                write_bundle(*tiny_bundle(seed=seed), path)
                self._corpus.append(path.read_bytes())

    def make(self, random: Random) -> bytes:
        """One mutant."""
        return mutated(random.choice(self._corpus), self._corpus, random)

    def check(self, data: bytes) -> str:
        """Read; what is read is one of the originals."""
        try:
            bundle = read_bundle(data)
        except BundleError as error:
            return error.code
        assert data in self._corpus
        assert bundle.manifest.seal.encode() in data
        return "bundle"


class Resealed:
    """Admitting bundles that were made to harm, beside a task that is served."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        backbone = tiny_backbone()
        capacity = Capacity(paths=2, slots=8, experts=8, bottleneck=16, max_top_k=2)
        self._classifier = Classifier(
            RoutedModel(backbone, first_expert_block=None, capacity=capacity), buckets=(4,)
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bundle"
            self._bundle = make_bundle(path, backbone=backbone)
            resident = make_bundle(path, task="tools", seed=1, backbone=backbone)
        self._path = admit(resident, self._classifier)
        self._pixels = resident.tensors["self_test.pixels"]
        self._expected = self._answer()

    def make(self, random: Random) -> bytes:
        """One bundle that its seal says is whole."""
        bundle = self._bundle
        text = json.loads(bundle.manifest.model_dump_json())
        tensors = {name: tensor.clone() for name, tensor in bundle.tensors.items()}
        for _ in range(random.choice((0, 0, 1, 2))):
            change_text(text, random)
        for _ in range(random.randint(0, 2)):
            change_tensor(tensors, random)
        if random.random() < 0.7:
            _fit_digests(text, Bundle(bundle.manifest, tensors))
        text.pop("seal", None)
        return sealed.pack(json.dumps(text or {"x": 0}), tensors)

    def check(self, data: bytes) -> str:
        """Take it in as a server does; the other task answers as before, and no slot is lost."""
        try:
            bundle = read_bundle(data)
            packed = pack(bundle, self._classifier)
        except (BundleError, CapacityError) as error:  # nothing has touched the model
            return error.code
        try:
            return self._admitted(packed)
        except (BundleError, CapacityError) as error:
            return error.code
        finally:
            assert set(self._classifier.selectors.tasks) == {self._path}
            assert torch.equal(self._answer(), self._expected), "another task answers otherwise"

    def _admitted(self, packed: PackedBundle) -> str:
        manifest, classifier = packed.bundle.manifest, self._classifier
        class_text_features(classifier.model, manifest.class_names, manifest.templates)
        path = admit(packed, classifier)
        routed = classifier.route(self._pixels, [Ask(path)] * len(self._pixels))
        finite = bool(routed.features_BE.isfinite().all())
        retire(path, classifier)
        assert finite, "admitted, and its answers are no numbers"
        return "admitted"

    def _answer(self) -> Tensor:
        asks = [Ask(self._path)] * len(self._pixels)
        return self._classifier.route(self._pixels, asks).features_BE.clone()


def change_text(text: dict[str, Any], random: Random) -> None:
    """Change, remove or add one entry somewhere in a JSON tree."""
    node: Any = text
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = random.choice(keys) if keys else "x"
        below = node[key] if keys else None
        if isinstance(below, dict | list) and below and random.random() < 0.8:
            node = below
            continue
        break
    act = random.randrange(4)
    if act == 0 and keys:
        del node[key]
    elif act == 1 and isinstance(node, dict):
        node[random.choice(("x", "0", "99", "", "__class__", "seal"))] = random.choice(_STRANGE)
    elif isinstance(node, list) and (act == 2 or not keys):
        node.append(random.choice(_STRANGE))
    else:
        node[key] = random.choice(_STRANGE)


def change_tensor(tensors: dict[str, Tensor], random: Random) -> None:
    """Change, cast, reshape, remove or rename one tensor."""
    name = random.choice(sorted(tensors))
    tensor, act = tensors[name], random.randrange(6)
    if act == 0:
        del tensors[name]
    elif act == 1:
        tensors[random.choice(("x", "", "vision.9.router", name + ".x"))] = tensors.pop(name)
    elif act == 2:
        tensors[name] = tensor.to(random.choice(_DTYPES))
    elif act == 3:
        tensors[name] = torch.zeros([random.choice((0, 1, 2, 7)) for _ in range(tensor.dim())])
    elif tensor.is_floating_point() and tensor.numel():
        flat = tensor.view(-1)
        flat[random.randrange(len(flat))] = random.choice(_NUMBERS)
    else:
        tensors[name] = torch.randint(0, 256, tensor.shape).to(tensor.dtype)


def _fit_digests(text: dict[str, Any], bundle: Bundle) -> None:
    """Let the manifest name the experts that are there, as far as they are."""
    for tower in TOWERS:
        for block in getattr(bundle.manifest, tower).blocks:
            try:
                experts: BlockExperts = bundle.experts(tower)[block]
                digests = [experts.digest(index) for index in range(len(experts.down_ERD))]
                text[tower]["blocks"][str(block)] = digests
            except (KeyError, TypeError, IndexError, RuntimeError):
                continue
