"""How a selector lies in a bundle: tensors by name, and their description in the manifest.

Only the mapping; files are `medley/bundle.py`, scores are `medley/levels.py`.

Legend: F feature width, C code width, K classes or prototypes, W width of what is whitened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from medley.levels import AutoencoderLevel, GaussianLevel, Level, PrototypeLevel
from medley.manifest import (
    AutoencoderSpec,
    Calibration,
    GaussianSpec,
    LevelSpec,
    PrototypeSpec,
    SelectorSpec,
)
from medley.selector import TaskSelector

__all__ = [
    "bad_selector_values",
    "selector_shapes",
    "selector_spec",
    "selector_tensors",
    "stored_selector",
    "unit_rows",
]

# How far from 1 a prototype may be long: half precision does not keep a length.
LENGTH_TOLERANCE = 0.01

_REFERENCE = "reference"
_L = TypeVar("_L", Level, LevelSpec)

# Where a tensor lies within a level, and the field of the level that it becomes.
_FIELDS: dict[type[Level], dict[str, str]] = {
    AutoencoderLevel: {
        "mean": "mean_F",
        "std": "std_F",
        "encoder": "encoder_FC",
        "encoder_bias": "encoder_bias_C",
        "decoder": "decoder_CF",
        "decoder_bias": "decoder_bias_F",
    },
    GaussianLevel: {"means": "means_KF", "whitening": "whitening_FW"},
    PrototypeLevel: {"prototypes": "prototypes_KF"},
}
_KINDS: dict[str, type[Level]] = {
    "autoencoder": AutoencoderLevel,
    "gaussian": GaussianLevel,
    "prototype": PrototypeLevel,
}


def selector_tensors(selector: TaskSelector) -> dict[str, Tensor]:
    """Name what a selector was fitted to as it lies in a bundle."""
    return {
        f"ddas.{place}.{name}": getattr(level, field)
        for place, level in _places(selector.levels, selector.reference).items()
        for name, field in _FIELDS[type(level)].items()
    }


def selector_spec(
    selector: TaskSelector, calibration: Calibration, *, extractors: Mapping[str, str] | None = None
) -> SelectorSpec:
    """Describe a selector for the manifest, with the digests of the extractors it looks at."""
    return SelectorSpec(
        levels=tuple(_level_spec(level) for level in selector.levels),
        alpha=selector.alpha,
        threshold=None if selector.threshold == math.inf else selector.threshold,
        reference=tuple(_level_spec(level) for level in selector.reference),
        margin=selector.margin,
        extractors=dict(extractors or {}),
        calibration=calibration,
    )


def stored_selector(spec: SelectorSpec, tensors: Mapping[str, Tensor]) -> TaskSelector:
    """Build the selector that `spec` describes from a bundle's tensors, which must be there."""
    places = _places(spec.levels, spec.reference)
    levels = [_level(place, level, tensors) for place, level in places.items()]
    own = len(spec.levels)
    return TaskSelector(
        levels=tuple(levels[:own]),
        threshold=math.inf if spec.threshold is None else spec.threshold,
        alpha=spec.alpha,
        reference=tuple(levels[own:]),
        margin=spec.margin,
    )


def selector_shapes(spec: SelectorSpec) -> dict[str, tuple[int, ...]]:
    """Name every tensor that `spec` promises, with its shape."""
    return {
        f"ddas.{place}.{name}": shape
        for place, level in _places(spec.levels, spec.reference).items()
        for name, shape in zip(_FIELDS[_KINDS[level.kind]], _shapes(level), strict=True)
    }


def bad_selector_values(tensors: Mapping[str, Tensor]) -> list[str]:
    """Tell which finite numbers of a bundle's tensors make no selector."""
    problems = []
    for name, tensor in sorted(tensors.items()):
        place, _, field = name.rpartition(".")
        if not place.startswith("ddas."):
            continue
        if field == "std" and not (tensor > 0).all():
            problems.append(f"tensor {name} has values that are not positive")
        if field == "prototypes" and not unit_rows(tensor):
            problems.append(f"tensor {name} has rows that are not of unit length")
    return problems


def _places(levels: Sequence[_L], reference: Sequence[_L]) -> dict[str, _L]:
    """Levels by where they lie in a bundle."""
    own = {str(i): level for i, level in enumerate(levels)}
    return own | {f"{_REFERENCE}.{i}": level for i, level in enumerate(reference)}


def _level_spec(level: Level) -> LevelSpec:
    common: dict[str, Any] = {
        "feature": level.feature,
        "center": level.center,
        "spread": level.spread,
    }
    if isinstance(level, AutoencoderLevel):
        F, C = level.encoder_FC.shape
        return AutoencoderSpec(**common, width=F, code_size=C, output=level.output)
    if isinstance(level, GaussianLevel):
        (K, F), W = level.means_KF.shape, level.whitening_FW.shape[1]
        return GaussianSpec(
            **common, kind="gaussian", width=F, classes=K, rank=W, scale=level.scale
        )
    K, F = level.prototypes_KF.shape
    return PrototypeSpec(**common, kind="prototype", width=F, prototypes=K)


def _level(place: str, spec: LevelSpec, tensors: Mapping[str, Tensor]) -> Level:
    kind = _KINDS[spec.kind]
    fields: dict[str, Any] = {
        field: tensors[f"ddas.{place}.{name}"] for name, field in _FIELDS[kind].items()
    }
    if isinstance(spec, AutoencoderSpec):
        fields["output"] = spec.output
    if isinstance(spec, GaussianSpec):
        fields["scale"] = spec.scale
    return kind(feature=spec.feature, center=spec.center, spread=spec.spread, **fields)


def _shapes(spec: LevelSpec) -> tuple[tuple[int, ...], ...]:
    F = spec.width
    if isinstance(spec, AutoencoderSpec):
        C = spec.code_size
        return (F,), (F,), (F, C), (C,), (C, F), (F,)
    if isinstance(spec, GaussianSpec):
        return (spec.classes, F), (F, spec.rank)
    return ((spec.prototypes, F),)


def unit_rows(tensor: Tensor) -> bool:
    """Whether all rows are of unit length, but for rounding."""
    lengths = tensor.double().square().sum(-1).sqrt()
    return bool(((lengths - 1).abs() <= LENGTH_TOLERANCE).all())
