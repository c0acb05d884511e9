"""The bundle: one version of a task as one safetensors file, written, read and verified.

Nothing in it is executed, and nothing is believed: `read_bundle` checks all that can be checked
without a model. Whether the bundle suits this backbone is for `medley/admission.py`.
`docs/bundle-format.md` is the specification.

Legend: E experts, R bottleneck, D width, C classes, N images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from torch import Tensor

from medley import sealed
from medley.errors import BundleError
from medley.experts import BlockExperts, TaskExperts
from medley.fusion import packed_bytes
from medley.manifest import FORMAT, READABLE_FORMATS, Manifest, TowerExperts
from medley.selector import TaskSelector
from medley.stored_selector import (
    bad_selector_values,
    selector_shapes,
    selector_spec,
    selector_tensors,
    stored_selector,
    unit_rows,
)

__all__ = [
    "MAX_BUNDLE_BYTES",
    "Bundle",
    "Tower",
    "expert_tensors",
    "read_bundle",
    "selector_spec",
    "selector_tensors",
    "tower_spec",
    "write_bundle",
]

MAX_BUNDLE_BYTES = 512 * 1024 * 1024
Tower = Literal["vision", "text"]
TOWERS: tuple[Tower, Tower] = ("vision", "text")

_MAX_PROBLEMS = 50

# Where a tensor lies in a bundle, and the field of BlockExperts that it becomes.
_EXPERT_FIELDS = {
    "experts.down": "down_ERD",
    "experts.down_bias": "down_bias_ER",
    "experts.up": "up_ERD",
    "experts.up_bias": "up_bias_ED",
    "router": "router_DE",
}


@dataclass(frozen=True, eq=False)
class Bundle:
    """One immutable version of a task: its manifest and its tensors by name, on the CPU."""

    manifest: Manifest
    tensors: Mapping[str, Tensor]

    @property
    def digest(self) -> str:
        """What identifies this bundle: "sha256:" and its seal."""
        return f"sha256:{self.manifest.seal}"

    def experts(self, tower: Tower) -> dict[int, BlockExperts]:
        """Experts and routers of one tower, by block."""
        blocks = getattr(self.manifest, tower).blocks
        return {block: self._block(f"{tower}.{block}") for block in sorted(blocks)}

    def task_experts(self) -> TaskExperts:
        """Both towers' experts, of a bundle of `moe_adapter`; see `medley/decoupled.py`."""
        return TaskExperts(
            vision=self.experts("vision"),
            text=self.experts("text"),
            top_k=self.manifest.top_k,
            scale=self.manifest.scale,
        )

    @property
    def prototypes(self) -> Tensor | None:
        """A prototype of each class, of unit length, float32; None where it has none."""
        return self.tensors["prototypes"] if self.manifest.prototypes else None

    def selector(self) -> TaskSelector:
        """What decides which images are this task's."""
        return stored_selector(self.manifest.selector, self.tensors)

    def _block(self, prefix: str) -> BlockExperts:
        return BlockExperts(
            **{field: self.tensors[f"{prefix}.{name}"] for name, field in _EXPERT_FIELDS.items()}
        )


def expert_tensors(tower: Tower, experts: Mapping[int, BlockExperts]) -> dict[str, Tensor]:
    """Name one tower's experts as they lie in a bundle."""
    return {
        f"{tower}.{block}.{name}": getattr(block_experts, field)
        for block, block_experts in experts.items()
        for name, field in _EXPERT_FIELDS.items()
    }


def tower_spec(width: int, experts: Mapping[int, BlockExperts]) -> TowerExperts:
    """Describe one tower's experts, of width D, for the manifest."""
    digests = {b: tuple(e.digest(i) for i in range(e.num_experts)) for b, e in experts.items()}
    return TowerExperts(width=width, blocks=digests)


def write_bundle(manifest: Manifest, tensors: Mapping[str, Tensor], path: Path) -> Bundle:
    """Seal a bundle and put it at `path`, whole or not at all.

    Equal content gives equal bytes. What the reader would refuse is not written. What was read in
    an older format is written in the present one.

    Returns:
        the bundle as it is read back, its manifest sealed.

    Raises:
        BundleError: the content is not a valid bundle, or (code `not_written`) the file cannot be
            written, such as on a full disk; nothing is left behind, an older file at `path` stays.
    """
    body = manifest.model_dump(mode="json", exclude={"seal"}) | {"format": FORMAT}
    text = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    data = sealed.pack(text, tensors)
    bundle = read_bundle(data)
    sealed.write(path, data)
    return bundle


def read_bundle(source: bytes | Path, *, max_bytes: int = MAX_BUNDLE_BYTES) -> Bundle:
    """Read a bundle and verify all that can be verified without a model.

    Raises:
        BundleError: with code `unreadable` (no such file, no permission), `too_large`,
            `not_safetensors`, `truncated`, `not_a_bundle` (safetensors of something else),
            `damaged` (the seal is broken), `unsupported_format`, or `bundle_invalid`: then
            `problems` lists everything in manifest and tensors that does not fit.
    """
    file = sealed.read(source, what="bundle", max_bytes=max_bytes)
    manifest, problems = _parse_manifest(file.text)
    problems += _bad_values(file.tensors)
    if manifest is None:
        raise BundleError(_shortened(problems))
    bundle = Bundle(manifest, file.tensors)
    problems += _misfits(bundle) or [*_wrong_digests(bundle), *_bad_fusion(bundle)]
    if problems:
        raise BundleError(_shortened(problems))
    return bundle


def _parse_manifest(text: str) -> tuple[Manifest | None, list[str]]:
    """Return the manifest, or None and what is wrong with it."""
    try:
        _check_format(sealed.parse_json(text))
        return Manifest.model_validate_json(text, strict=True), []
    except ValidationError as error:
        return None, [_sentence(one) for one in error.errors(include_url=False)]
    except ValueError as error:
        return None, [f"manifest: {error}"]


def _check_format(raw: Any) -> None:
    """Refuse another format version as such, before its unknown fields are called wrong."""
    version = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(raw, dict) and raw.get("kind") == "unified":
        problem = "this is a unified model, which bundles name, and no bundle"
        raise BundleError([problem], code="not_a_bundle")
    if isinstance(version, int) and version not in READABLE_FORMATS:
        first, last = READABLE_FORMATS[0], READABLE_FORMATS[-1]
        problem = f"this is bundle format {version}, only formats {first} to {last} can be read"
        raise BundleError([problem], code="unsupported_format")


def _sentence(error: ErrorDetails) -> str:
    place = ".".join(str(part) for part in error["loc"])
    return f"manifest: {place or 'whole'}: {error['msg']}"


class _Expected(NamedTuple):
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)


def _expected_tensors(manifest: Manifest) -> dict[str, _Expected]:
    """Name every tensor that this manifest promises, with its shape and the dtypes it may have."""
    C, N = len(manifest.class_names), manifest.self_test.images
    expected = {
        "class_text_features": _Expected((C, manifest.backbone.embed_dim)),
        "self_test.pixels": _Expected((N, 3, *manifest.backbone.image_size), (torch.uint8,)),
        "self_test.logits": _Expected((N, C), (torch.float32,)),
        "self_test.scores": _Expected((N,), (torch.float32,)),
    }
    if manifest.fusion is not None:
        expected["trigger"] = _Expected((packed_bytes(manifest.fusion.elements),), (torch.uint8,))
    if manifest.prototypes:
        expected["prototypes"] = _Expected((C, manifest.backbone.embed_dim), (torch.float32,))
    for tower in TOWERS:
        spec: TowerExperts = getattr(manifest, tower)
        for block, digests in spec.blocks.items():
            shapes = _expert_shapes(len(digests), manifest.bottleneck, spec.width)
            expected |= {f"{tower}.{block}.{name}": _Expected(s) for name, s in shapes.items()}
    shapes = selector_shapes(manifest.selector)
    expected |= {name: _Expected(shape) for name, shape in shapes.items()}
    return expected


def _expert_shapes(E: int, R: int, D: int) -> dict[str, tuple[int, ...]]:
    return dict(zip(_EXPERT_FIELDS, ((E, R, D), (E, R), (E, R, D), (E, D), (D, E)), strict=True))


def _misfits(bundle: Bundle) -> list[str]:
    """Tell where the tensors are not those that the manifest promises."""
    expected, found = _expected_tensors(bundle.manifest), bundle.tensors
    problems = [f"tensor {name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"tensor {name} is not expected" for name in sorted(found.keys() - expected)]
    for name in sorted(expected.keys() & found.keys()):
        tensor, (shape, dtypes) = found[name], expected[name]
        if tensor.shape != shape:
            problems.append(f"tensor {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype not in dtypes:
            allowed = " or ".join(map(str, dtypes))
            problems.append(f"tensor {name} has dtype {tensor.dtype}, expected {allowed}")
    return problems


def _bad_values(tensors: Mapping[str, Tensor]) -> list[str]:
    problems = [
        f"tensor {name} has values that are not finite"
        for name, tensor in sorted(tensors.items())
        if not tensor.isfinite().all()
    ]
    return problems + bad_selector_values(tensors)


def _wrong_digests(bundle: Bundle) -> list[str]:
    return [
        f"{tower}: expert {index} of block {block} is not the one its digest names"
        for tower in TOWERS
        for block, experts in bundle.experts(tower).items()
        for index, digest in enumerate(getattr(bundle.manifest, tower).blocks[block])
        if experts.digest(index) != digest
    ]


def _bad_fusion(bundle: Bundle) -> list[str]:
    """What is wrong in values that only some methods have."""
    problems, fusion = [], bundle.manifest.fusion
    prototypes_CE = bundle.prototypes
    if prototypes_CE is not None and not unit_rows(prototypes_CE):
        problems.append("tensor prototypes has rows that are not of unit length")
    if fusion is not None and fusion.elements % 8:
        beyond = int(bundle.tensors["trigger"][-1]) >> fusion.elements % 8
        if beyond:
            problems.append(f"tensor trigger has bits beyond its {fusion.elements} elements")
    return problems


def _shortened(problems: list[str]) -> list[str]:
    more = len(problems) - _MAX_PROBLEMS
    return problems if more <= 0 else [*problems[:_MAX_PROBLEMS], f"and {more} more"]
