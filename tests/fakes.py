"""Stand-ins that tests of all packages share: real objects, tiny, filled with random numbers.

Legend: E experts, R bottleneck, D width, F feature width, C code size or classes, N images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from medley.bundle import expert_tensors, selector_spec, selector_tensors, tower_spec
from medley.experts import BlockExperts
from medley.levels import AutoencoderLevel, GaussianLevel, Level, PrototypeLevel
from medley.manifest import BackboneRef, Calibration, Manifest, SelfTest, Training
from medley.selector import TaskSelector

__all__ = [
    "LEVEL_KINDS",
    "TINY_BACKBONE",
    "random_experts",
    "random_level",
    "random_selector",
    "tiny_bundle",
]

TINY_BACKBONE = BackboneRef(
    name="tiny", fingerprint="sha256:" + "ab" * 32, image_size=(4, 6), embed_dim=5
)


def random_experts(
    width: int,
    bottleneck: int,
    *,
    experts: int = 2,
    dtype: torch.dtype = torch.float32,
    random: torch.Generator,
) -> BlockExperts:
    """Build one block's experts and router."""
    E, R, D = experts, bottleneck, width
    shapes = [(E, R, D), (E, R), (E, R, D), (E, D), (D, E)]
    return BlockExperts(*(torch.randn(shape, generator=random).to(dtype) for shape in shapes))


def random_selector(
    widths: Mapping[str, int], *, code_size: int = 2, random: torch.Generator
) -> TaskSelector:
    """Build a selector with one level for each feature, given with its width."""
    return TaskSelector(
        levels=tuple(_random_level(f, F, code_size, random) for f, F in widths.items()),
        threshold=2.5,
        alpha=0.02,
    )


LEVEL_KINDS = ("autoencoder", "sigmoid", "gaussian", "prototype")


def random_level(
    kind: str, feature: str, F: int, *, size: int = 3, random: torch.Generator
) -> Level:
    """Build a level of one of `LEVEL_KINDS`; `size` is its code size, classes or prototypes."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    scale: dict[str, Any] = {"feature": feature, "center": float(normal(1)), "spread": 0.7}
    if kind == "gaussian":
        return GaussianLevel(means_KF=normal(size, F), whitening_FW=normal(F, F - 1), **scale)
    if kind == "prototype":
        return PrototypeLevel(prototypes_KF=normalize(normal(size, F), dim=1), **scale)
    return AutoencoderLevel(
        mean_F=normal(F),
        std_F=normal(F).abs() + 0.5,
        encoder_FC=normal(F, size) / F**0.5,
        encoder_bias_C=normal(size),
        decoder_CF=normal(size, F) / size**0.5,
        decoder_bias_F=normal(F),
        output="sigmoid" if kind == "sigmoid" else "linear",
        **scale,
    )


def tiny_bundle(
    *,
    seed: int = 0,
    backbone: BackboneRef = TINY_BACKBONE,
    vision: Mapping[int, BlockExperts] | None = None,
    text: Mapping[int, BlockExperts] | None = None,
    selector: TaskSelector | None = None,
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> tuple[Manifest, dict[str, Tensor]]:
    """Build what `write_bundle` takes: a valid manifest and its tensors, equal for equal seeds.

    Args:
        seed: of every number in it.
        backbone: the one it claims to be learnt on.
        vision: experts by block; by default two blocks of width 4, bottleneck 3.
        text: experts by block; by default one block of width 3, bottleneck 3.
        selector: by default one level on "stem:mean_std".
        dtype: of the default experts.
        fields: anything in the manifest to set otherwise, such as `task` or `class_names`.
    """
    random = torch.Generator().manual_seed(seed)
    if vision is None:
        vision = {b: random_experts(4, 3, dtype=dtype, random=random) for b in (1, 2)}
    if text is None:
        text = {0: random_experts(3, 3, dtype=dtype, random=random)}
    selector = selector or random_selector({"stem:mean_std": 8}, random=random)
    values: dict[str, Any] = {
        "task": "pets",
        "version": "1",
        "class_names": ("cat", "dog", "hamster"),
        "templates": ("a photo of a {}.",),
        "backbone": backbone,
        "first_expert_block": 1,
        "bottleneck": _bottleneck(vision),
        "top_k": 2,
        "scale": 0.1,
        "vision": tower_spec(_width(vision), vision),
        "text": tower_spec(_width(text), text),
        "selector": selector_spec(
            selector, Calibration(method="split conformal", images=99, false_reject_rate=0.01)
        ),
        "training": Training(
            data_digest="sha256:" + "cd" * 32,
            seed=seed,
            settings={"steps": 10, "learning_rate": 1e-3, "few_shot": False},
            metrics={"accuracy": 0.5},
        ),
        "licence": "CC0-1.0",
        "self_test": SelfTest(images=2, tolerance=1e-4),
    } | fields
    manifest = Manifest(**values)
    C, N = len(manifest.class_names), manifest.self_test.images
    height, width = backbone.image_size
    tensors = {
        **expert_tensors("vision", vision),
        **expert_tensors("text", text),
        **selector_tensors(selector),
        "class_text_features": torch.randn(C, backbone.embed_dim, generator=random),
        "self_test.pixels": torch.randint(
            0, 256, (N, 3, height, width), dtype=torch.uint8, generator=random
        ),
        "self_test.logits": torch.randn(N, C, generator=random),
        "self_test.scores": torch.randn(N, generator=random),
    }
    return manifest, tensors


def _random_level(feature: str, F: int, C: int, random: torch.Generator) -> AutoencoderLevel:
    return AutoencoderLevel(
        feature=feature,
        mean_F=torch.randn(F, generator=random),
        std_F=torch.rand(F, generator=random) + 0.5,
        encoder_FC=torch.randn(F, C, generator=random),
        encoder_bias_C=torch.randn(C, generator=random),
        decoder_CF=torch.randn(C, F, generator=random),
        decoder_bias_F=torch.randn(F, generator=random),
        center=-1.5,
        spread=0.25,
    )


def _bottleneck(experts: Mapping[int, BlockExperts]) -> int:
    return next(iter(experts.values())).down_ERD.shape[1] if experts else 1


def _width(experts: Mapping[int, BlockExperts]) -> int:
    return next(iter(experts.values())).down_ERD.shape[2] if experts else 1
