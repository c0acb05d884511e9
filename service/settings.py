"""What a server can be told, read once from `MEDLEY_*`, or files of secrets, and passed on.

No other module reads the environment. `docs/settings.md` has the same table for people; a test
compares the two.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import (
    BaseSettings,
    NestedSecretsSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from medley.aggregation import Weighting
from medley.classifier import check_buckets
from medley.precision import Precision
from service.bundles.sources import check_prefix
from service.signals.logs import LogFormat, LogLevel
from service.wire.schemas import MAX_NEIGHBOURS, Unclaimed

__all__ = ["Settings", "is_loopback"]

KIB, MIB = 1024, 1024 * 1024
SECRETS = Path("/run/secrets")  # where containers find theirs, one file each


def _several(value: object) -> object:
    """The parts between commas; of an empty text none."""
    return [part for part in value.split(",") if part] if isinstance(value, str) else value


def _batch_sizes(buckets: tuple[int, ...]) -> tuple[int, ...]:
    check_buckets(buckets)
    return buckets


Buckets = Annotated[
    tuple[int, ...], NoDecode, BeforeValidator(_several), AfterValidator(_batch_sizes)
]

Networks = Annotated[
    tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...], NoDecode, BeforeValidator(_several)
]

Prefixes = Annotated[
    tuple[Annotated[str, AfterValidator(check_prefix)], ...], NoDecode, BeforeValidator(_several)
]


class Settings(BaseSettings):
    """Settings of one server process: one backbone, one device, one store folder."""

    model_config = SettingsConfigDict(
        env_prefix="MEDLEY_",
        frozen=True,
        extra="forbid",
        secrets_dir=SECRETS,
        secrets_dir_missing="ok",
    )

    host: str = Field(default="127.0.0.1", description="Address to listen on")
    port: int = Field(
        default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one"
    )
    store: Path = Field(
        default=Path("store"), description="Folder of the registry and the bundle files"
    )
    registry: SecretStr | None = Field(
        default=None,
        description="Redis URL of a registry that replicas share; without one it is in the store",
    )
    registry_password: SecretStr | None = Field(
        default=None, description="Password of that Redis, if its URL has none"
    )
    registry_prefix: str = Field(
        default="medley",
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="Of its keys there: clusters on one Redis have one each",
    )
    registry_timeout_s: float = Field(
        default=2.0, gt=0, description="Longest wait for one answer of that Redis"
    )
    registry_wait_s: float = Field(
        default=60.0, ge=0, description="How long a start waits for a registry that is away"
    )
    poll_s: float = Field(
        default=2.0, gt=0, description="How often a replica looks at the registry, unless told to"
    )
    replica_ttl_s: float = Field(
        default=10.0, gt=0, description="A replica that was not heard of for so long is gone"
    )
    generation_wait_s: float = Field(
        default=5.0, ge=0, description="Longest wait for the generation that a request asks for"
    )
    bundle_store: str = Field(
        default="",
        description="Folder or URL of the bundles that replicas share; needed with a registry",
    )
    bundle_store_timeout_s: float = Field(
        default=10.0, gt=0, description="Longest wait for it; a transfer has 1 s per MiB more"
    )
    keep_unused_s: float = Field(
        default=3600.0, ge=0, description="How long that store keeps bundles that nobody uses"
    )

    admin_key: SecretStr | None = Field(
        default=None,
        description="Bearer key that changes need; without one they work on a loopback host only",
    )
    read_key: SecretStr | None = Field(
        default=None,
        description="Bearer key that everything but probes needs; without one nobody is asked",
    )

    backbone: str = Field(default="medley-mini", description="Name of the frozen CLIP")
    weights: Path | None = Field(
        default=None, description="File of its weights, instead of its own"
    )
    alexnet_weights: Path | None = Field(
        default=None, description="File of torchvision's AlexNet, for imported tasks that need it"
    )
    device: str = Field(default="cpu", description="Torch device that computes")
    threads: int = Field(
        default=0, ge=0, description="Torch threads on a CPU; 0 leaves torch's choice"
    )
    precision: Precision = Field(
        default="exact", description="How the image tower computes: exact, fp32 or bf16"
    )
    paths: int = Field(default=64, ge=1, description="Task versions that may be on the device")
    slots: int = Field(default=128, ge=1, description="Expert slots per block and tower")
    max_experts: int = Field(default=32, ge=1, description="Experts of one task in one block")
    max_bottleneck: int = Field(default=64, ge=1, description="Widest expert bottleneck")
    low_rank_slots: int = Field(
        default=16, ge=0, description="Versions with low-rank updates that may be on the device"
    )
    max_rank: int = Field(default=64, ge=1, description="Largest rank of these updates")
    models: int = Field(
        default=2, ge=0, description="Versions with weights of their own that may be on the device"
    )
    host_bytes: int = Field(
        default=1024 * MIB, ge=0, description="Memory for versions that are ready to be loaded"
    )
    unload_s: float = Field(
        default=30.0, gt=0, description="Longest wait for requests to let a version leave"
    )
    max_top_k: int = Field(
        default=2, ge=1, description="Most experts that one image may take in a block"
    )

    buckets: Buckets = Field(
        default=(1,), description="Images per forward: ascending powers of two, with commas"
    )
    max_wait_ms: float = Field(
        default=5.0, ge=0, description="Longest wait for the largest bucket to fill, in ms"
    )
    queue_limit: int = Field(
        default=512, ge=1, description="Images that may wait; more are answered 429"
    )
    decode_threads: int = Field(default=2, ge=1, description="Threads that decode images")
    heartbeat_s: float = Field(
        default=10.0, gt=0, description="An idle engine proves itself with a forward this often"
    )
    request_timeout_s: float = Field(
        default=30.0, gt=0, description="Longest time for one request; clients may ask for less"
    )
    body_timeout_s: float = Field(
        default=20.0, gt=0, description="Longest time for the body of a request to arrive"
    )
    decode_timeout_s: float = Field(
        default=10.0, gt=0, description="Longest time for decoding one image"
    )
    drain_s: int = Field(
        default=20, ge=0, description="Longest wait for requests in flight at shutdown"
    )
    drain_delay_s: float = Field(
        default=0.0, ge=0, description="How long it takes new requests after it is not ready"
    )

    header_timeout_s: float = Field(
        default=10.0, gt=0, description="Longest time for a request's headers to arrive"
    )
    keep_alive_s: float = Field(
        default=75.0, gt=0, description="How long a connection may have nothing to ask"
    )
    max_header_bytes: int = Field(
        default=32 * KIB, ge=1024, description="Request line and headers together"
    )
    max_headers: int = Field(default=100, ge=8, description="Headers of one request")
    max_connections: int = Field(
        default=1000, ge=1, description="Connections; the longest idle one makes room"
    )

    max_request_bytes: int = Field(
        default=32 * MIB, ge=1, description="Largest body of a classification"
    )
    max_image_bytes: int = Field(default=16 * MIB, ge=1, description="Largest encoded image")
    max_image_pixels: int = Field(
        default=50_000_000, ge=1, description="Largest image, width x height"
    )
    max_inflight_bytes: int = Field(
        default=256 * MIB, ge=1, description="Bytes of bodies and fetched images held at once"
    )
    max_inflight_images: int = Field(
        default=1024, ge=1, description="Images taken in and not yet answered"
    )
    max_images: int = Field(default=64, ge=1, description="Images in one request")
    max_labels: int = Field(default=1000, ge=1, description="Labels in one request")
    max_prompts: int = Field(default=4000, ge=1, description="Labels x templates in one request")
    max_bundle_bytes: int = Field(
        default=512 * MIB, ge=1, description="Largest bundle that is taken in"
    )
    max_unified_bytes: int = Field(
        default=2048 * MIB, ge=1, description="Largest unified model that is taken in"
    )
    upload_timeout_s: float = Field(
        default=600.0, gt=0, description="Longest time for a bundle to arrive or to be fetched"
    )
    bundle_sources: Prefixes = Field(
        default=(), description="URLs or folders under which bundles may be fetched; none: off"
    )
    label_cache: int = Field(
        default=256, ge=1, description="Label sets whose text features are kept"
    )
    label_cache_bytes: int = Field(
        default=64 * MIB, ge=1, description="Most bytes of those text features"
    )
    unclaimed: Unclaimed = Field(
        default="zero_shot", description="Who answers what no task claims: zero_shot or aggregate"
    )
    neighbours: int = Field(
        default=4, ge=1, le=MAX_NEIGHBOURS, description="Tasks that answer beside zero-shot then"
    )
    aggregate_weights: Weighting = Field(
        default="uniform", description="How much each of them counts: uniform or similarity"
    )
    union_cache_bytes: int = Field(
        default=256 * MIB, ge=1, description="Most bytes of all classes as each task encodes them"
    )
    image_urls: bool = Field(
        default=False, description="Whether images may be given as http(s) URLs"
    )
    image_url_timeout_s: float = Field(
        default=5.0, gt=0, description="Longest time for fetching one image"
    )
    image_url_networks: Networks = Field(
        default=(), description="Networks that are fetched from although they are not public"
    )

    replica: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9._-]{0,128}$",
        description="Name of this server in the header X-Replica; none is sent if it is empty",
    )
    log_format: LogFormat = Field(
        default="text", description="Lines of the log: text for people, json for machines"
    )
    log_level: LogLevel = Field(
        default="info", description="Least that is logged: debug, info, warning or error"
    )
    tracing: Literal["off", "otlp"] = Field(
        default="off", description="Where spans go: off, or otlp, set up by OTEL_* variables"
    )
    task_series: int = Field(
        default=200, ge=0, description="Tasks that have metrics of their own; the rest is `other`"
    )
    reservoir: int = Field(
        default=0, ge=0, description="Images that no task claims to keep as a sample; 0 keeps none"
    )
    reservoir_bytes: int = Field(
        default=256 * MIB, ge=1, description="Most bytes of that sample on disk"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What is given, then the environment, then files of secrets."""
        return init_settings, env_settings, NestedSecretsSettingsSource(file_secret_settings)

    @model_validator(mode="after")
    def _registry_has_store(self) -> Settings:
        if (self.registry is None) != (not self.bundle_store):
            raise ValueError("registry and bundle_store go together: replicas share both or none")
        return self

    @model_validator(mode="after")
    def _numbers_fit(self) -> Settings:
        if self.max_top_k > self.max_experts:
            raise ValueError(f"max_top_k {self.max_top_k} > max_experts {self.max_experts}")
        if self.queue_limit < self.max_images:
            raise ValueError(f"queue_limit {self.queue_limit} < max_images {self.max_images}")
        if self.max_inflight_images < self.max_images:
            raise ValueError(
                f"max_inflight_images {self.max_inflight_images} < max_images {self.max_images}"
            )
        if self.max_inflight_bytes < self.max_request_bytes:
            raise ValueError(
                f"max_inflight_bytes {self.max_inflight_bytes} < "
                f"max_request_bytes {self.max_request_bytes}"
            )
        return self

    @property
    def max_wait_s(self) -> float:
        """`max_wait_ms` in seconds, which everything inside uses."""
        return self.max_wait_ms / 1000

    @property
    def replica_name(self) -> str:
        """`replica`, or where replicas share a registry and it is empty, the machine's name."""
        if self.replica or self.registry is None:
            return self.replica
        return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:128]

    @property
    def changes_allowed(self) -> bool:
        """Whether tasks may be changed at all: with a key, or from this machine only."""
        return self.admin_key is not None or is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine's own address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
