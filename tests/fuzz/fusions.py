"""Damaged fusions: a unified model and a bundle that names it, either of them made to harm.

Both are sealed again and the bundle names the model that is there, unless it is left to name
another: what remains to be found out is whether their parts fit.
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
from medley.admission import admit, pack, retire
from medley.bundle import read_bundle
from medley.classifier import Ask, Classifier
from medley.errors import BundleError, CapacityError
from medley.pool import Capacity
from medley.routed import RoutedModel
from medley.unified import read_unified
from tests.fuzz.bundles import change_tensor, change_text
from tests.models import tiny_backbone
from tests.service.fused import made_fusion
from tests.service.made import make_bundle

__all__ = ["Fusions"]

_LENGTH_BYTES = 8


class Fusions:
    """Admitting what names a unified model, beside a task that is served."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        backbone = tiny_backbone()
        capacity = Capacity(paths=2, slots=8, low_rank_slots=1, low_rank=4, models=1)
        model = RoutedModel(backbone, first_expert_block=None, capacity=capacity)
        self._classifier = Classifier(model, buckets=(4,))
        self._pairs = []
        with tempfile.TemporaryDirectory() as folder:
            for method in ("lora", "finetune"):
                made = made_fusion(Path(folder) / method, backbone, method=method)
                files = made.path, made.file("birds")
                self._pairs.append([sealed.unpack(file.read_bytes()) for file in files])
            resident = make_bundle(Path(folder) / "bundle", backbone=backbone)
        self._path = admit(resident, self._classifier)
        self._pixels = resident.tensors["self_test.pixels"]
        self._expected = self._answer()

    def make(self, random: Random) -> bytes:
        """A unified model and a bundle, one behind the other; the first says how long it is."""
        unified, bundle = (_opened(file) for file in random.choice(self._pairs))
        for body, tensors in (unified, bundle):
            for _ in range(random.choice((0, 0, 0, 1))):
                change_text(body, random)
            for _ in range(random.choice((0, 0, 1))):
                change_tensor(tensors, random)
        first = _sealed(*unified)
        fusion = bundle[0].get("fusion")
        if isinstance(fusion, dict) and random.random() < 0.9:
            fusion["unified"] = f"sha256:{json.loads(sealed.unpack(first).text)['seal']}"
        return len(first).to_bytes(_LENGTH_BYTES, "little") + first + _sealed(*bundle)

    def check(self, data: bytes) -> str:
        """Take both in as a server does; the other task answers as before."""
        size = int.from_bytes(data[:_LENGTH_BYTES], "little")
        first, second = data[_LENGTH_BYTES:][:size], data[_LENGTH_BYTES:][size:]
        try:
            unified, bundle = read_unified(first), read_bundle(second)
            path = admit(pack(bundle, self._classifier, unified), self._classifier)
        except (BundleError, CapacityError) as error:
            return error.code
        else:
            routed = self._classifier.route(self._pixels, [Ask(path)] * len(self._pixels))
            retire(path, self._classifier)
            assert routed.features_BE.isfinite().all(), "its answers are no numbers"
            return "admitted"
        finally:
            assert set(self._classifier.model.paths) == {self._path}
            assert torch.equal(self._answer(), self._expected), "another task answers otherwise"

    def _answer(self) -> Tensor:
        asks = [Ask(self._path)] * len(self._pixels)
        return self._classifier.route(self._pixels, asks).features_BE.clone()


def _opened(file: sealed.SealedFile) -> tuple[dict[str, Any], dict[str, Tensor]]:
    body = json.loads(file.text)
    del body["seal"]
    return body, {name: tensor.clone() for name, tensor in file.tensors.items()}


def _sealed(body: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    return sealed.pack(json.dumps(body or {"x": 0}), tensors)
