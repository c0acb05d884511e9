"""The manifest: what a bundle says about itself, as JSON in its header.

Only the schema, without a byte of file handling: that is `medley/bundle.py`. Whether the bundle
suits a backbone is not decided here either, but at admission.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "FORMAT",
    "BackboneRef",
    "Calibration",
    "LevelSpec",
    "Manifest",
    "SelectorSpec",
    "SelfTest",
    "TowerExperts",
    "Training",
]

FORMAT = 1
_UNSEALED = "0" * 64


def _one_pair_of_braces(template: str) -> str:
    if template.count("{}") != 1:
        raise ValueError("a template has exactly one {}")
    return template


def _all_different(names: tuple[str, ...]) -> tuple[str, ...]:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"class names must be unique, {repeated[0]!r} is repeated")
    return names


Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Text = Annotated[str, Field(min_length=1, max_length=200)]
ClassName = Annotated[Text, Field(pattern=r"\S")]
Template = Annotated[Text, AfterValidator(_one_pair_of_braces)]
Feature = Annotated[
    str, Field(pattern=r"^(embedding|(stem|block[1-9][0-9]{0,2}):(mean|mean_std|cls))$")
]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Dim = Annotated[int, Field(ge=1, le=1_000_000)]
Block = Annotated[int, Field(ge=0, le=999)]
Scalar = bool | int | float | Annotated[str, Field(max_length=1000)] | None


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BackboneRef(_Part):
    """The one backbone this was learnt on; `image_size` is height, width."""

    name: Text
    fingerprint: Digest
    image_size: tuple[Dim, Dim]
    embed_dim: Dim


class TowerExperts(_Part):
    """Experts of one tower: by block (0-based), the digest of each; `width` is D."""

    width: Dim
    blocks: dict[Block, Annotated[tuple[Digest, ...], Field(min_length=1, max_length=1024)]]


class LevelSpec(_Part):
    """One autoencoder: feature (width F), code size C, and the scale of its log-error."""

    feature: Feature
    width: Dim
    code_size: Dim
    center: float
    spread: Annotated[float, Field(gt=0)]


class Calibration(_Part):
    """How the threshold was found, and what it gave on held-out images."""

    method: Text
    images: Count
    false_reject_rate: Annotated[float, Field(ge=0, le=1)]


class SelectorSpec(_Part):
    """DDAS of this task.

    `threshold` null accepts every image; `alpha`, the share of its own images that the task may
    refuse, is null where nothing was calibrated.
    """

    levels: Annotated[tuple[LevelSpec, ...], Field(min_length=1, max_length=16)]
    alpha: Annotated[float, Field(gt=0, lt=1)] | None
    threshold: float | None
    calibration: Calibration


class Training(_Part):
    """Where the task comes from; `after` are the bundles whose experts it could reuse."""

    data_digest: Digest
    seed: Count
    settings: dict[Text, Scalar]
    metrics: dict[Text, float]
    after: tuple[Digest, ...] = ()


class SelfTest(_Part):
    """How many inputs with known answers are inside, and how far a device may be off."""

    images: Annotated[int, Field(ge=1, le=1024)]
    tolerance: Annotated[float, Field(gt=0)]


class Manifest(_Part):
    """Everything about one version of a task but its tensors.

    `seal` is filled in when the bundle is written and identifies it; see `docs/bundle-format.md`.
    """

    seal: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = _UNSEALED
    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)] = FORMAT
    task: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
    version: Annotated[str, Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z._-]{0,30}$")]
    class_names: Annotated[
        tuple[ClassName, ...],
        Field(min_length=1, max_length=10_000),
        AfterValidator(_all_different),
    ]
    templates: Annotated[tuple[Template, ...], Field(min_length=1, max_length=1_000)]
    backbone: BackboneRef
    method: Literal["moe_adapter"] = "moe_adapter"
    first_expert_block: Block
    bottleneck: Dim
    top_k: Annotated[int, Field(ge=1, le=1024)]
    scale: Annotated[float, Field(gt=0)]
    vision: TowerExperts
    text: TowerExperts
    selector: SelectorSpec
    training: Training
    licence: Text
    self_test: SelfTest

    @model_validator(mode="after")
    def _experts_after_the_trunk(self) -> Self:
        early = [block for block in self.vision.blocks if block < self.first_expert_block]
        if early:
            raise ValueError(
                f"vision experts in blocks {early}, before first_expert_block "
                f"{self.first_expert_block}"
            )
        return self
