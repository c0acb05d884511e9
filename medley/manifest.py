"""The manifest: what a bundle says about itself, as JSON in its header.

Only the schema, without a byte of file handling: that is `medley/bundle.py`. Whether the bundle
suits a backbone is not decided here either, but at admission.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

__all__ = [
    "FORMAT",
    "READABLE_FORMATS",
    "AutoencoderSpec",
    "BackboneRef",
    "Calibration",
    "FusionRef",
    "GaussianSpec",
    "LevelSpec",
    "Manifest",
    "Method",
    "PrototypeSpec",
    "SelectorSpec",
    "SelfTest",
    "TowerExperts",
    "Training",
]

FORMAT = 3  # that is written
READABLE_FORMATS = (1, 2, 3)
_FOREIGN = "alexnet:"  # how a feature begins that is not the backbone's
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
    str,
    Field(pattern=r"^(embedding|alexnet:conv5|(stem|block[1-9][0-9]{0,2}):(mean|mean_std|cls))$"),
]
Count = Annotated[int, Field(ge=0, lt=2**63)]
MAX_FLOAT32 = 3.4028234663852886e38
Float32 = Annotated[float, Field(ge=-MAX_FLOAT32, le=MAX_FLOAT32)]  # what tensors compute with
Dim = Annotated[int, Field(ge=1, le=1_000_000)]
Block = Annotated[int, Field(ge=0, le=999)]
Method = Literal["moe_adapter", "lora", "finetune"]
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


class _LevelSpec(_Part):
    feature: Feature
    width: Dim
    center: Float32
    spread: Annotated[float, Field(gt=0, le=MAX_FLOAT32)]


class AutoencoderSpec(_LevelSpec):
    """One autoencoder: feature (width F), code size C, and the scale of its log-error."""

    kind: Literal["autoencoder"] = "autoencoder"
    code_size: Dim
    output: Literal["linear", "sigmoid"] = "linear"


class GaussianSpec(_LevelSpec):
    """Gaussians of one covariance: K classes, whitened to W (`rank`) dimensions."""

    kind: Literal["gaussian"]
    classes: Dim
    rank: Dim
    scale: Literal["log", "linear"] = "log"


class PrototypeSpec(_LevelSpec):
    """K prototypes of unit length."""

    kind: Literal["prototype"]
    prototypes: Dim


def _kind(level: Any) -> str | None:
    """The kind that a level calls itself; format 1 knew one and had no name for it."""
    if isinstance(level, dict):
        level = level.get("kind", "autoencoder")
    else:
        level = getattr(level, "kind", None)
    return level if isinstance(level, str) else None


LevelSpec = Annotated[
    Annotated[AutoencoderSpec, Tag("autoencoder")]
    | Annotated[GaussianSpec, Tag("gaussian")]
    | Annotated[PrototypeSpec, Tag("prototype")],
    Discriminator(_kind),
]


class Calibration(_Part):
    """How the threshold was found, and what it gave on held-out images."""

    method: Text
    images: Count
    false_reject_rate: Annotated[float, Field(ge=0, le=1)]


class SelectorSpec(_Part):
    """What decides which images are this task's.

    `threshold` null accepts every image; `alpha`, the share of its own images that the task may
    refuse, is null where nothing was calibrated. With a `reference`, an image's score must also be
    within `margin` of its score there. `extractors` has the digest of the weights behind every
    feature that is not the backbone's.
    """

    levels: Annotated[tuple[LevelSpec, ...], Field(min_length=1, max_length=16)]
    alpha: Annotated[float, Field(gt=0, lt=1)] | None
    threshold: Float32 | None
    reference: Annotated[tuple[LevelSpec, ...], Field(max_length=16)] = ()
    margin: Float32 | None = None
    extractors: dict[Feature, Digest] = {}
    calibration: Calibration

    @model_validator(mode="after")
    def _every_foreign_feature_with_its_extractor(self) -> Self:
        levels = (*self.levels, *self.reference)
        foreign = {f for level in levels if (f := level.feature).startswith(_FOREIGN)}
        if foreign != self.extractors.keys():
            raise ValueError(
                f"extractors of {sorted(self.extractors)}, but features {sorted(foreign)}"
            )
        return self

    @model_validator(mode="after")
    def _reference_with_margin(self) -> Self:
        if bool(self.reference) == (self.margin is None):
            raise ValueError("a reference needs a margin, and a margin a reference")
        return self

    def fits_format_1(self) -> bool:
        """Whether format 1 has every field and value of this."""
        levels = [level for level in self.levels if isinstance(level, AutoencoderSpec)]
        return (
            len(levels) == len(self.levels)
            and not self.model_fields_set & {"reference", "margin", "extractors"}
            and not any(level.model_fields_set & {"kind", "output"} for level in levels)
        )


class FusionRef(_Part):
    """The unified model that this task's delta was fused into, and how to have it back.

    `unified` is its digest, `elements` how many it has, of which the tensor `trigger` holds a bit
    each; `tasks` are those that were fused together, as `task@version`.
    """

    unified: Digest
    elements: Annotated[int, Field(ge=1, lt=2**40)]
    rescaler: Annotated[float, Field(ge=0, le=MAX_FLOAT32)]
    tasks: Annotated[tuple[Text, ...], Field(min_length=1, max_length=10_000)]


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
    format: Annotated[int, Field(ge=READABLE_FORMATS[0], le=READABLE_FORMATS[-1])] = FORMAT
    task: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
    version: Annotated[str, Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z._-]{0,30}$")]
    class_names: Annotated[
        tuple[ClassName, ...],
        Field(min_length=1, max_length=10_000),
        AfterValidator(_all_different),
    ]
    templates: Annotated[tuple[Template, ...], Field(min_length=1, max_length=1_000)]
    backbone: BackboneRef
    method: Method = "moe_adapter"
    first_expert_block: Block
    bottleneck: Dim
    top_k: Annotated[int, Field(ge=1, le=1024)]
    scale: Annotated[float, Field(gt=0, le=MAX_FLOAT32)]
    vision: TowerExperts
    text: TowerExperts
    fusion: FusionRef | None = None
    prototypes: bool = False
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

    @model_validator(mode="after")
    def _experts_or_a_fusion(self) -> Self:
        fused = self.method != "moe_adapter"
        if fused != (self.fusion is not None):
            raise ValueError(f"method {self.method} {'needs a' if fused else 'has no'} fusion")
        if fused and (self.vision.blocks or self.text.blocks):
            raise ValueError(f"method {self.method} has no experts")
        return self

    @model_validator(mode="after")
    def _nothing_newer_than_its_format(self) -> Self:
        if self.format < 3 and self.model_fields_set & {"fusion", "prototypes"}:
            raise ValueError(f"format {self.format} has no fusion and no prototypes")
        if self.format == 1 and not self.selector.fits_format_1():
            raise ValueError("format 1 has only linear autoencoders, without kind and reference")
        return self
