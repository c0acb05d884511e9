"""An example of each route for the OpenAPI document: a body that works, and an answer.

A task `flowers` with two versions, and a picture of one pixel. A test checks every example against
its schema, and asks a server those that need no bundle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["EXAMPLES", "Example"]


@dataclass(frozen=True)
class Example:
    """What is sent as JSON and what comes back, unless it is nothing or a file."""

    answer: Any = None
    body: Any = None
    status: int = 200


_PIXEL = "R0lGODdhAQABAIAAAP///////ywAAAAAAQABAAACAkQBADs="
_DIGEST = "sha256:5f1ed3c1d5a1b1a7f5f2f0b2a44d1d21ab3f1d2d7e0f6c9c4f52a0c7e1b3a9d8"
_FINGERPRINT = "sha256:0c2a94b1d3a3f5f7a6f5b8d0d9a3c8b7e6f1a2b3c4d5e6f708192a3b4c5d6e7f"
_TIME = "2026-11-22T10:15:33+00:00"
_ROSE = [{"label": "rose", "probability": 0.93}, {"label": "tulip", "probability": 0.07}]
_PATH = {"kind": "task", "task": "flowers", "version": "1", "digest": _DIGEST}
_SCORE = {"score": -0.4, "threshold": 2.1, "accepted": True}
_VERSION = {
    "version": "1",
    "digest": _DIGEST,
    "created_at": _TIME,
    "state": "live",
    "reason": None,
    "tier": "device",
    "pinned": False,
    "aliases": ["live"],
    "size_bytes": 4_194_304,
    "method": "moe_adapter",
    "unified": None,
}
_TASK = {
    "task": "flowers",
    "live": "1",
    "aliases": {"live": "1"},
    "versions": [_VERSION],
    "class_names": ["rose", "tulip"],
    "templates": ["a photo of a {}, a flower."],
    "changed": 3,
    "generation": 3,
}
_UNIFIED = {
    "digest": "sha256:" + 64 * "2",
    "method": "lora",
    "here": True,
    "size_bytes": 39_845_888,
    "versions": ["birds@1", "cars@3"],
}
_REPLICA = {
    "id": "5f0c2f6f7f1d4c0a9d3c1f6a7b8e9d00",
    "name": "replica-1",
    "this": True,
    "phase": "ready",
    "ready": True,
    "generation": 7,
    "version": "0.1.0",
    "fingerprint": "sha256:" + 64 * "0",
    "since": _TIME,
    "versions": {
        "flowers@1": {
            "digest": "sha256:" + 64 * "1",
            "state": "live",
            "tier": "device",
            "reason": None,
            "attempts": 0,
            "retry_s": None,
        }
    },
    "lacking": [],
}
_OPERATION: dict[str, Any] = {
    "id": "1f8a6b0e5d6c4f0fa8d3f1c2b3a49586",
    "kind": "register",
    "task": "flowers",
    "version": "1",
    "state": "succeeded",
    "created_at": _TIME,
    "finished_at": _TIME,
    "error": None,
    "warnings": [],
}
_ROLLOUT = {
    "version": "2",
    "mode": "canary",
    "share": 0.05,
    "min_images": 500,
    "max_disagreement": 0.02,
    "max_errors": 0,
}
_ROLLOUT_ANSWER = {
    "task": "flowers",
    "live": "1",
    "rollout": _ROLLOUT,
    "stopped": None,
    "same": 812,
    "different": 3,
    "errors": 0,
    "generation": 7,
}
_MODEL = {
    "id": "flowers",
    "object": "model",
    "created": 1795342533,
    "owned_by": "medley",
    "parent": "base",
    "root": _DIGEST,
}
_BASE = _MODEL | {"id": "base", "created": 0, "parent": None, "root": _FINGERPRINT}
_METADATA = {
    "name": "flowers",
    "versions": ["1", "2"],
    "platform": "medley_bundle",
    "inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1]}],
    "outputs": [
        {"name": "label", "datatype": "BYTES", "shape": [-1]},
        {"name": "probability", "datatype": "FP32", "shape": [-1]},
        {"name": "task", "datatype": "BYTES", "shape": [-1]},
        {"name": "version", "datatype": "BYTES", "shape": [-1]},
    ],
}
_INFER_BODY = {
    "id": "42",
    "parameters": {"labels": ["rose", "tulip"]},
    "inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [_PIXEL]}],
    "outputs": [{"name": "label"}, {"name": "probability"}],
}
_INFER = {
    "model_name": "flowers",
    "model_version": "1",
    "id": "42",
    "parameters": {"generation": 3},
    "outputs": [
        {"name": "label", "datatype": "BYTES", "shape": [1], "data": ["rose"]},
        {"name": "probability", "datatype": "FP32", "shape": [1], "data": [0.93]},
    ],
}
_READY = {"name": "flowers", "ready": True}

EXAMPLES: dict[tuple[str, str], Example] = {
    ("GET", "/startupz"): Example({"started": True}),
    ("GET", "/livez"): Example({"live": True}),
    ("GET", "/readyz"): Example(
        {
            "ready": True,
            "generation": 3,
            "backbone": "medley-mini",
            "fingerprint": _FINGERPRINT,
            "last_forward_age_s": 0.512,
            "live_tasks": 1,
            "failed_versions": [],
        }
    ),
    ("GET", "/metrics"): Example("medley_queue_depth 0.0\n"),
    ("POST", "/v1/classify"): Example(
        {
            "generation": 3,
            "results": [
                {
                    "label": "rose",
                    "probability": 0.93,
                    "top_k": _ROSE,
                    "path": _PATH,
                    "routed_by": "auto",
                    "label_set": "request",
                    "scores": {"flowers": _SCORE},
                }
            ],
        },
        {"image": {"bytes_b64": _PIXEL}, "labels": ["rose", "tulip"], "explain": True},
    ),
    ("POST", "/v1/route"): Example(
        {
            "generation": 3,
            "results": [
                {
                    "path": _PATH,
                    "routed_by": "auto",
                    "scores": {"flowers": _SCORE | {"margin": 2.5, "eligible": True}},
                }
            ],
        },
        {"image": {"data_uri": f"data:image/gif;base64,{_PIXEL}"}},
    ),
    ("POST", "/v1/embeddings"): Example(
        {
            "object": "list",
            "data": [{"object": "embedding", "index": 0, "embedding": [0.6, -0.8, 0.0]}],
            "model": "base",
            "usage": {"prompt_tokens": 0, "total_tokens": 0},
        },
        {"model": "base", "input": ["a photo of a rose"]},
    ),
    ("GET", "/v1/models"): Example({"object": "list", "data": [_BASE, _MODEL]}),
    ("GET", "/v1/models/{model}"): Example(_MODEL),
    ("GET", "/v1/tasks"): Example({"generation": 3, "tasks": [_TASK]}),
    ("GET", "/v1/tasks/{task}"): Example(_TASK),
    ("DELETE", "/v1/tasks/{task}"): Example(status=204),
    ("POST", "/v1/tasks/{task}:rollback"): Example(_TASK),
    ("PUT", "/v1/tasks/{task}/aliases/{alias}"): Example(_TASK, {"version": "1"}),
    ("DELETE", "/v1/tasks/{task}/aliases/{alias}"): Example(_TASK),
    ("PUT", "/v1/tasks/{task}/versions/{version}"): Example(
        _TASK | {"warnings": []}, {"source": "s3://bundles/flowers-1.safetensors"}, 201
    ),
    ("DELETE", "/v1/tasks/{task}/versions/{version}"): Example(status=204),
    ("PUT", "/v1/tasks/{task}/versions/{version}/pin"): Example(_TASK),
    ("DELETE", "/v1/tasks/{task}/versions/{version}/pin"): Example(_TASK),
    ("GET", "/v1/tasks/{task}/rollout"): Example(_ROLLOUT_ANSWER),
    ("PUT", "/v1/tasks/{task}/rollout"): Example(_ROLLOUT_ANSWER, _ROLLOUT),
    ("DELETE", "/v1/tasks/{task}/rollout"): Example(status=204),
    ("POST", "/v1/tasks/{task}/rollout:promote"): Example(_ROLLOUT_ANSWER | {"live": "2"}),
    ("GET", "/v1/tasks/{task}/usage"): Example(
        {
            "task": "flowers",
            "since": _TIME,
            "images": 1200,
            "forward_s": 14.2,
            "forward_share": 0.31,
            "resident_bytes": 5_242_880,
            "bundle_bytes": 4_194_304,
        }
    ),
    ("GET", "/v1/unclaimed"): Example(
        {
            "limit": 100,
            "seen": 5210,
            "images": [{"id": "17", "size_bytes": 48_213, "taken_at": _TIME}],
        }
    ),
    ("GET", "/v1/unclaimed/{image}"): Example(),
    ("DELETE", "/v1/unclaimed/{image}"): Example(status=204),
    ("DELETE", "/v1/unclaimed"): Example(status=204),
    ("GET", "/v1/unified"): Example({"generation": 7, "unified": [_UNIFIED]}),
    ("PUT", "/v1/unified/{digest}"): Example(_UNIFIED | {"versions": []}, status=201),
    ("GET", "/v1/replicas"): Example({"generation": 7, "replicas": [_REPLICA]}),
    ("GET", "/v1/operations"): Example({"operations": [_OPERATION]}),
    ("GET", "/v1/operations/{operation}"): Example(_OPERATION),
    ("GET", "/v2"): Example(
        {
            "name": "medley",
            "version": "0.1.0",
            "extensions": ["binary_tensor_data", "model_repository", "parameters"],
        }
    ),
    ("GET", "/v2/health/live"): Example({"live": True}),
    ("GET", "/v2/health/ready"): Example({"ready": True, "live": True}),
    ("GET", "/v2/models/{model}"): Example(_METADATA),
    ("GET", "/v2/models/{model}/versions/{version}"): Example(_METADATA),
    ("GET", "/v2/models/{model}/ready"): Example(_READY),
    ("GET", "/v2/models/{model}/versions/{version}/ready"): Example(_READY),
    ("POST", "/v2/models/{model}/infer"): Example(_INFER, _INFER_BODY),
    ("POST", "/v2/models/{model}/versions/{version}/infer"): Example(_INFER, _INFER_BODY),
    ("POST", "/v2/repository/index"): Example(
        [{"name": "flowers", "version": "1", "state": "READY", "reason": ""}], {"ready": True}
    ),
    ("POST", "/v2/repository/models/{model}/load"): Example({}, {"parameters": {}}),
    ("POST", "/v2/repository/models/{model}/unload"): Example(
        {}, {"parameters": {"unload_dependents": False}}
    ),
}
