"""The unified model: what the deltas of several tasks were fused to, one sealed file for all.

A trigger bundle names it by its digest, so it is as immutable as they are. For low-rank updates it
also holds where their down factors started: the same for every task of a backbone and a rank.
`docs/bundle-format.md` is the specification; the arithmetic is `medley/fusion.py`.

Legend: R rank, I inputs, O outputs.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from medley import sealed
from medley.errors import BundleError
from medley.fusion import Deltas
from medley.manifest import MAX_FLOAT32, BackboneRef, Block, Dim, Manifest, Text

__all__ = [
    "MAX_UNIFIED_BYTES",
    "Unified",
    "UnifiedManifest",
    "check_belongs",
    "read_unified",
    "unified_name",
    "unified_of",
    "write_unified",
]

MAX_UNIFIED_BYTES = 2 * 1024**3
_LOW_RANK = re.compile(r"(vision|text)\.(0|[1-9]\d{0,2})\.(fc|proj)\.(down|up)")
_PARTS = frozenset({"fc.down", "fc.up", "proj.down", "proj.up"})


class UnifiedManifest(BaseModel):
    """What a unified model says about itself; `rank` and `scale` only of low-rank updates.

    `tasks` are those that were fused, as `task@version`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seal: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = "0" * 64
    kind: Literal["unified"] = "unified"
    format: Literal[1] = 1
    method: Literal["lora", "finetune"]
    backbone: BackboneRef
    first_expert_block: Block
    rank: Dim | None = None
    scale: Annotated[float, Field(gt=0, le=MAX_FLOAT32)] | None = None
    tasks: Annotated[tuple[Text, ...], Field(min_length=1, max_length=10_000)]


@dataclass(frozen=True, eq=False)
class Unified:
    """A unified model: its manifest, and its tensors by name, on the CPU.

    Attributes:
        manifest: of it.
        deltas: the unified delta, float32.
        start: where the down factors of low-rank updates started, by the names of `deltas`.
    """

    manifest: UnifiedManifest
    deltas: Deltas
    start: Mapping[str, Tensor]

    @property
    def digest(self) -> str:
        """What identifies it: "sha256:" and its seal."""
        return f"sha256:{self.manifest.seal}"

    @property
    def elements(self) -> int:
        """How many numbers the delta has."""
        return sum(tensor.numel() for tensor in self.deltas.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the delta's tensors."""
        return {name: tuple(tensor.shape) for name, tensor in self.deltas.items()}


def write_unified(
    manifest: UnifiedManifest, deltas: Deltas, start: Mapping[str, Tensor], folder: Path
) -> Unified:
    """Seal a unified model and put it into a folder, whole or not at all.

    The file is called `unified_name` of its digest; equal content gives equal bytes.

    Raises:
        BundleError: the reader would refuse it, or (code `not_written`) it cannot be written.
    """
    body = manifest.model_dump(mode="json", exclude={"seal"})
    text = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    named = {f"unified.{name}": tensor for name, tensor in deltas.items()}
    named |= {f"start.{name}": tensor for name, tensor in start.items()}
    data = sealed.pack(text, named)
    unified = read_unified(data)
    path = folder / unified_name(unified.digest)
    sealed.write(path, data)
    return unified


def read_unified(source: bytes | Path, *, max_bytes: int = MAX_UNIFIED_BYTES) -> Unified:
    """Read a unified model and verify all that can be verified without a backbone.

    Raises:
        BundleError: as `medley.bundle.read_bundle`; `not_unified` is a sealed file of another
            kind, `unified_invalid` one whose parts do not fit each other.
    """
    file = sealed.read(source, what="unified model", max_bytes=max_bytes)
    manifest = _parse_manifest(file.text)
    deltas, start = _under(file.tensors, "unified."), _under(file.tensors, "start.")
    problems = [
        f"tensor {name} is not expected"
        for name in sorted(file.tensors)
        if not name.startswith(("unified.", "start."))
    ]
    problems += _misfits(manifest, deltas, start)
    if problems:
        raise BundleError(problems[:50], code="unified_invalid")
    return Unified(manifest, deltas, start)


def unified_name(digest: str) -> str:
    """What the file of a unified model is called beside the bundles that name it."""
    return f"unified-{digest.removeprefix('sha256:')[:12]}.safetensors"


def unified_of(manifest: Manifest, folder: Path) -> Unified | None:
    """Read the unified model that a bundle in `folder` names; None if it names none.

    Raises:
        BundleError: it is not there (`unified_missing`), is not the one that is meant
            (`unified_mismatch`), or cannot be read.
    """
    if manifest.fusion is None:
        return None
    path = folder / unified_name(manifest.fusion.unified)
    if not path.exists():
        check_belongs(manifest, None)
    unified = read_unified(path)
    check_belongs(manifest, unified)
    return unified


def check_belongs(manifest: Manifest, unified: Unified | None) -> None:
    """See that a unified model is the one that a trigger bundle was made with.

    Raises:
        BundleError: it is missing (`unified_missing`), or another one (`unified_mismatch`).
    """
    fusion, name = manifest.fusion, f"{manifest.task} {manifest.version}"
    assert fusion is not None
    if unified is None:
        problem = (
            f"{name} needs the unified model {fusion.unified}, which is not here: "
            f"{unified_name(fusion.unified)} belongs beside the bundle"
        )
        raise BundleError([problem], code="unified_missing")
    theirs = unified.manifest
    problems = [
        f"{name} belongs to {what} {meant}, the unified model has {found}"
        for what, meant, found in (
            ("the unified model", fusion.unified, unified.digest),
            ("method", manifest.method, theirs.method),
            ("backbone", manifest.backbone.fingerprint, theirs.backbone.fingerprint),
            ("elements", fusion.elements, unified.elements),
        )
        if meant != found
    ]
    if problems:
        raise BundleError(problems, code="unified_mismatch")


def _parse_manifest(text: str) -> UnifiedManifest:
    try:
        raw = sealed.parse_json(text)
        if not isinstance(raw, dict) or raw.get("kind") != "unified":
            raise BundleError(["this is not a unified model"], code="not_unified")
        if isinstance(raw.get("format"), int) and raw["format"] != 1:
            problem = f"this is unified model format {raw['format']}, only 1 can be read"
            raise BundleError([problem], code="unsupported_format")
        return UnifiedManifest.model_validate_json(text, strict=True)
    except ValidationError as error:
        problems = [
            f"manifest: {'.'.join(map(str, one['loc'])) or 'whole'}: {one['msg']}"
            for one in error.errors(include_url=False)
        ]
        raise BundleError(problems[:50], code="unified_invalid") from error
    except ValueError as error:
        raise BundleError([f"manifest: {error}"], code="unified_invalid") from error


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _misfits(manifest: UnifiedManifest, deltas: Deltas, start: Mapping[str, Tensor]) -> list[str]:
    problems = [] if deltas else ["there is no unified tensor"]
    problems += [f"unified.{n} is {t.dtype}" for n, t in deltas.items() if t.dtype != torch.float32]
    for prefix, tensors in (("unified.", deltas), ("start.", start)):
        problems += [
            f"{prefix}{name} has values that are not finite"
            for name, tensor in sorted(tensors.items())
            if not tensor.isfinite().all()
        ]
    if manifest.method == "lora":
        return problems + _low_rank_misfits(manifest, deltas, start)
    if start or manifest.rank is not None or manifest.scale is not None:
        problems.append("only low-rank updates have a start, a rank and a scale")
    return problems


def _low_rank_misfits(
    manifest: UnifiedManifest, deltas: Deltas, start: Mapping[str, Tensor]
) -> list[str]:
    if manifest.rank is None or manifest.scale is None:
        return ["low-rank updates need a rank and a scale"]
    problems = [f"unified.{n} is no low-rank factor" for n in deltas if not _LOW_RANK.fullmatch(n)]
    blocks: dict[str, set[str]] = defaultdict(set)
    for name, tensor in deltas.items():
        place, _, part = name.replace(".", "/", 1).partition(".")
        blocks[place.replace("/", ".")].add(part)
        if tensor.ndim != 2 or len(tensor) != manifest.rank:
            shape = tuple(tensor.shape)
            problems.append(f"unified.{name} has shape {shape}, expected ({manifest.rank}, ..)")
    problems += [f"block {at} lacks a factor" for at, has in blocks.items() if has != _PARTS]
    downs = {name: tensor.shape for name, tensor in deltas.items() if name.endswith(".down")}
    if downs != {name: tensor.shape for name, tensor in start.items()}:
        problems.append("the starts are not those of the down factors")
    return problems
