"""`/v1/unified`, and versions that are loaded from it: taken in, refused, healed; over HTTP."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest

from medley.backbone import Backbone
from medley.bundle import Bundle, write_bundle
from tests.models import tiny_backbone
from tests.service.conftest import MakeBundle, OpenApp
from tests.service.fused import Made, made_fusion
from tests.service.routes.test_classify import classify

NOWHERE = "sha256:" + 64 * "0"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def lora(folder: Path, backbone: Backbone) -> Made:
    """Two tasks with low-rank updates, `birds` and `cars`."""
    return made_fusion(folder / "lora", backbone)


@pytest.fixture(scope="module")
def whole(folder: Path, backbone: Backbone) -> Made:
    """Two tasks with weights of their own, `boats` and `trains`."""
    return made_fusion(folder / "whole", backbone, ("boats", "trains"), method="finetune")


def put_unified(http: httpx.Client, made: Made, *, digest: str = "") -> httpx.Response:
    return http.put(f"/v1/unified/{digest or made.digest}", content=made.path.read_bytes())


def put(http: httpx.Client, made: Made, task: str) -> httpx.Response:
    return http.put(f"/v1/tasks/{task}/versions/1", content=made.file(task).read_bytes())


def label(http: httpx.Client, image: bytes, task: str) -> tuple[str, dict[str, object]]:
    (result,) = classify(http, image, model=task, labels=None).json()["results"]
    return result["path"]["task"], result["top_k"]


def state(http: httpx.Client, task: str) -> str:
    (version,) = http.get(f"/v1/tasks/{task}").json()["versions"]
    return str(version["state"])


def listed(http: httpx.Client) -> dict[str, dict[str, object]]:
    return {one["digest"]: one for one in http.get("/v1/unified").json()["unified"]}


def files(store: Path) -> set[str]:
    return {f"sha256:{path.stem}" for path in (store / "bundles").iterdir()}


def test_tasks_of_two_fusions_and_one_with_experts_are_served_together_and_after_a_restart(
    open_app: OpenApp, make: MakeBundle, image: bytes, lora: Made, whole: Made
) -> None:
    tasks = ("birds", "cars", "boats", "trains", "pets")
    with open_app() as http:
        for made in (lora, whole):
            assert put_unified(http, made).status_code == 201
            assert put_unified(http, made).status_code == 200
            for task in made.bundles:
                assert put(http, made, task).status_code == 201
        http.put("/v1/tasks/pets/versions/1", content=make()[1])
        answers = {task: label(http, image, task) for task in tasks}
        (version,) = http.get("/v1/tasks/cars").json()["versions"]
        (other,) = http.get("/v1/tasks/pets").json()["versions"]
        unified = listed(http)

    assert {task: answer[0] for task, answer in answers.items()} == {task: task for task in tasks}
    assert len({str(scores) for _, scores in answers.values()}) == len(tasks)
    assert (version["method"], version["unified"]) == ("lora", lora.digest)
    assert (other["method"], other["unified"]) == ("moe_adapter", None)
    assert unified[whole.digest] == {
        "digest": whole.digest,
        "method": "finetune",
        "here": True,
        "size_bytes": whole.path.stat().st_size,
        "versions": ["boats@1", "trains@1"],
    }
    with open_app() as http:
        assert {task: label(http, image, task) for task in tasks} == answers


def test_a_unified_model_goes_with_the_last_version_that_names_it(
    open_app: OpenApp, tmp_path: Path, image: bytes, lora: Made, whole: Made
) -> None:
    store = tmp_path / "store"
    with open_app() as http:
        put_unified(http, lora)
        put(http, lora, "birds")
        put(http, lora, "cars")
        http.delete("/v1/tasks/birds")
        assert files(store) == {lora.digest, lora.bundles["cars"].digest}
        put_unified(http, whole)
        assert listed(http)[whole.digest]["versions"] == []
    with open_app() as http:
        assert files(store) == {lora.digest, lora.bundles["cars"].digest}  # nobody came for it
        assert label(http, image, "cars")[0] == "cars"
        http.delete("/v1/tasks/cars")

        assert files(store) == set()
        assert listed(http) == {}


def test_a_bundle_whose_unified_model_is_not_here_is_refused_with_what_to_do(
    open_app: OpenApp, tmp_path: Path, lora: Made
) -> None:
    with open_app() as http:
        refused = put(http, lora, "birds")

        assert refused.status_code == 422
        problem = refused.json()
        assert problem["code"] == "unified_missing"
        assert lora.digest in problem["detail"]
        assert "medley task register" in problem["detail"]
        assert http.get("/v1/tasks").json()["tasks"] == []
        assert files(tmp_path / "store") == set()


def test_what_is_no_unified_model_of_this_server_is_refused_and_leaves_nothing(
    open_app: OpenApp, tmp_path: Path, folder: Path, make: MakeBundle, lora: Made
) -> None:
    bundle, data = make()
    whole, foreign = lora.path.read_bytes(), made_fusion(folder / "foreign", tiny_backbone(seed=7))
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    cases = {
        (lora.digest, b""): (422, "not_safetensors"),
        (lora.digest, b"GIF89a" * 100): (422, "not_safetensors"),
        (lora.digest, whole[:-9]): (422, "truncated"),
        (lora.digest, bytes(flipped)): (422, "damaged"),
        (bundle.digest, data): (422, "not_unified"),
        (NOWHERE, whole): (422, "name_mismatch"),
        (foreign.digest, foreign.path.read_bytes()): (422, "wrong_backbone"),
        (lora.digest, whole + bytes(10**6)): (413, "too_large"),
        ("sha256:..%2F..%2Fregistry", whole): (404, "not_found"),
        ("birds", whole): (422, "invalid_request"),
    }
    with open_app(max_unified_bytes=500_000) as http:
        for (digest, body), expected in cases.items():
            answer = http.put(f"/v1/unified/{digest}", content=body)
            assert (answer.status_code, answer.json()["code"]) == expected
        typed = http.put(
            f"/v1/unified/{lora.digest}",
            content=b"{}",
            headers={"Content-Type": "application/json"},
        )
        assert typed.json()["code"] == "unsupported_media_type"
        assert listed(http) == {}
    assert files(tmp_path / "store") == set()
    assert list((tmp_path / "store" / "incoming").iterdir()) == []


def test_a_trigger_that_belongs_to_another_unified_model_is_refused(
    open_app: OpenApp, folder: Path, backbone: Backbone, lora: Made
) -> None:
    """By its size, or if that is the same by the answers that it promises."""
    larger = made_fusion(folder / "larger", backbone, seed=1, rank=3)
    other = made_fusion(folder / "other", backbone, seed=2)
    with open_app() as http:
        for made, code in ((larger, "unified_mismatch"), (other, "self_test_failed")):
            put_unified(http, made)
            misled = _naming(lora.bundles["birds"], made.digest, folder / "misled.safetensors")
            answer = http.put("/v1/tasks/birds/versions/1", content=misled.read_bytes())
            assert (answer.status_code, answer.json()["code"]) == (422, code)
        assert http.get("/v1/tasks").json()["tasks"] == []


def _naming(bundle: Bundle, digest: str, path: Path) -> Path:
    fusion = bundle.manifest.fusion
    assert fusion is not None
    named = fusion.model_copy(update={"unified": digest})
    write_bundle(bundle.manifest.model_copy(update={"fusion": named}), bundle.tensors, path)
    return path


def test_versions_whose_unified_model_was_tampered_with_fail_and_are_healed_by_another_copy(
    open_app: OpenApp, tmp_path: Path, image: bytes, make: MakeBundle, lora: Made
) -> None:
    with open_app() as http:
        put_unified(http, lora)
        put(http, lora, "birds")
        put(http, lora, "cars")
        http.put("/v1/tasks/pets/versions/1", content=make()[1])
        before = label(http, image, "birds")
    at_rest = tmp_path / "store" / "bundles" / f"{lora.digest.removeprefix('sha256:')}.safetensors"
    flipped = bytearray(at_rest.read_bytes())
    flipped[-1] ^= 128
    at_rest.write_bytes(flipped)

    with open_app() as http:
        assert [state(http, task) for task in ("birds", "cars", "pets")] == [
            *("failed", "failed", "live")
        ]
        (version,) = http.get("/v1/tasks/birds").json()["versions"]
        assert lora.digest in version["reason"]
        assert listed(http)[lora.digest]["here"] is False
        assert label(http, image, "pets")[0] == "pets"

        healed = put_unified(http, lora)

        assert (healed.status_code, healed.json()["here"]) == (201, True)
        assert [state(http, task) for task in ("birds", "cars")] == ["live", "live"]
        assert label(http, image, "birds") == before


def test_a_task_that_finds_no_slot_and_no_model_disturbs_nothing(
    open_app: OpenApp, image: bytes, lora: Made, whole: Made
) -> None:
    with open_app(low_rank_slots=1, models=1, max_rank=2) as http:
        for made in (lora, whole):
            put_unified(http, made)
            first, second = made.bundles
            assert put(http, made, first).status_code == 201
            before = label(http, image, first)

            refused = put(http, made, second)

            assert (refused.status_code, refused.json()["code"]) == (507, "no_slot")
            assert label(http, image, first) == before
        assert sorted(t["task"] for t in http.get("/v1/tasks").json()["tasks"]) == [
            *("birds", "boats")
        ]
        http.delete("/v1/tasks/boats")
        put_unified(http, whole)  # it went with the only version that named it
        assert put(http, whole, "trains").status_code == 201
    with open_app(low_rank_slots=1, models=1, max_rank=1) as http:
        assert state(http, "birds") == "failed"  # its rank is 2
        assert state(http, "trains") == "live"


def test_only_the_admin_key_takes_a_unified_model_in(open_app: OpenApp, lora: Made) -> None:
    with open_app(admin_key="sesame") as http:
        assert put_unified(http, lora).status_code == 401
        assert http.get("/v1/unified").status_code == 200
        keyed = {"Authorization": "Bearer sesame"}
        answer = http.put(
            f"/v1/unified/{lora.digest}", content=lora.path.read_bytes(), headers=keyed
        )
        assert answer.status_code == 201
