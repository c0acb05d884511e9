"""medley/unified.py, medley/decoupled.py: trigger bundles and the unified model that they name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medley import sealed
from medley.bundle import Bundle, read_bundle, write_bundle
from medley.decoupled import deltas_of, task_update
from medley.errors import BundleError
from medley.experts import TaskExperts, TaskLowRank, TaskWeights
from medley.fusion import unify
from medley.unified import (
    Unified,
    check_belongs,
    read_unified,
    unified_name,
    unified_of,
    write_unified,
)
from tests.fakes import tiny_bundle
from tests.fusions import low_rank_deltas, written_fusion

DELTAS = {"pets": low_rank_deltas(1), "birds": low_rank_deltas(2)}


@pytest.fixture
def fused(tmp_path: Path) -> tuple[Unified, dict[str, Bundle]]:
    return written_fusion(tmp_path, DELTAS)


def file_of(unified: Unified, folder: Path) -> Path:
    return folder / unified_name(unified.digest)


def forged(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> bytes:
    """The file with something changed, and sealed again."""
    file = sealed.unpack(path.read_bytes())
    body = json.loads(file.text)
    del body["seal"]
    change(body, file.tensors)
    return sealed.pack(json.dumps(body), file.tensors)


def test_a_unified_model_is_read_back_and_equal_content_gives_equal_bytes(
    fused: tuple[Unified, dict[str, Bundle]], tmp_path: Path
) -> None:
    unified, _ = fused
    path = file_of(unified, tmp_path)
    again = read_unified(path)
    assert again.digest == unified.digest
    assert (again.manifest.method, again.elements) == ("lora", 80)
    expected = unify(list(DELTAS.values())).unified
    assert all(torch.equal(again.deltas[name], expected[name]) for name in expected)
    first = path.read_bytes()
    path.unlink()
    write_unified(again.manifest, again.deltas, again.start, tmp_path)
    assert path.read_bytes() == first


def test_low_rank_updates_are_their_start_and_what_was_decoupled(
    fused: tuple[Unified, dict[str, Bundle]],
) -> None:
    unified, bundles = fused
    deltas = deltas_of(bundles["birds"], unified)
    update = task_update(bundles["birds"], unified)
    assert isinstance(update, TaskLowRank)
    assert (list(update.vision), list(update.text), update.scale) == ([1, 2], [], 0.5)
    fc, name = update.vision[2].fc, "vision.2.fc"
    down_RI = deltas[f"{name}.down"] + unified.start[f"{name}.down"].float()
    assert torch.equal(fc.down_RI, down_RI)
    assert torch.equal(fc.up_RO, deltas[f"{name}.up"])
    assert update.vision[1].proj.up_RO.shape == (2, 4)


def test_one_task_alone_comes_back_exactly(tmp_path: Path) -> None:
    unified, bundles = written_fusion(tmp_path, {"pets": DELTAS["pets"]})
    deltas = deltas_of(bundles["pets"], unified)
    assert all(torch.equal(deltas[name], DELTAS["pets"][name]) for name in deltas)


def test_whole_weights_are_what_was_decoupled(tmp_path: Path) -> None:
    given = {"visual.proj": torch.tensor([[1.0, 0.0, -2.0]]), "ln_final.bias": torch.ones(3)}
    unified, bundles = written_fusion(tmp_path, {"pets": given}, method="finetune")
    update = task_update(bundles["pets"], unified)
    assert isinstance(update, TaskWeights)
    assert update.first_block == 1
    assert all(torch.equal(update.deltas[name], given[name]) for name in given)


def test_a_bundle_of_experts_needs_no_unified_model(tmp_path: Path) -> None:
    bundle = write_bundle(*tiny_bundle(), tmp_path / "b.safetensors")
    assert isinstance(task_update(bundle), TaskExperts)
    assert unified_of(bundle.manifest, tmp_path) is None


def test_the_unified_model_is_found_beside_its_bundles(
    fused: tuple[Unified, dict[str, Bundle]], tmp_path: Path
) -> None:
    unified, bundles = fused
    found = unified_of(bundles["pets"].manifest, tmp_path)
    assert found is not None
    assert found.digest == unified.digest


def test_a_unified_model_that_is_missing_is_named(
    fused: tuple[Unified, dict[str, Bundle]], tmp_path: Path
) -> None:
    unified, bundles = fused
    file_of(unified, tmp_path).unlink()
    for look in (
        lambda: unified_of(bundles["pets"].manifest, tmp_path),
        lambda: task_update(bundles["pets"]),
    ):
        with pytest.raises(BundleError) as caught:
            look()
        assert caught.value.code == "unified_missing"
        assert unified.digest in str(caught.value)


def test_a_trigger_of_another_fusion_is_refused(
    fused: tuple[Unified, dict[str, Bundle]], tmp_path: Path
) -> None:
    unified, _ = fused
    (tmp_path / "other").mkdir()
    other, theirs = written_fusion(tmp_path / "other", {"pets": DELTAS["pets"]})
    with pytest.raises(BundleError, match=f"{other.digest}.*{unified.digest}") as caught:
        check_belongs(theirs["pets"].manifest, unified)
    assert caught.value.code == "unified_mismatch"
    file_of(unified, tmp_path).rename(tmp_path / "other" / unified_name(other.digest))
    with pytest.raises(BundleError) as caught:
        unified_of(theirs["pets"].manifest, tmp_path / "other")
    assert caught.value.code == "unified_mismatch"


def test_a_tampered_unified_model_is_damaged(
    fused: tuple[Unified, dict[str, Bundle]], tmp_path: Path
) -> None:
    path = file_of(fused[0], tmp_path)
    data = bytearray(path.read_bytes())
    for place in (-1, -40, 60):
        bad = bytearray(data)
        bad[place] ^= 1
        with pytest.raises(BundleError) as caught:
            read_unified(bytes(bad))
        assert caught.value.code == "damaged"
    for size in (0, 7, 300, len(data) - 1):
        with pytest.raises(BundleError) as caught:
            read_unified(bytes(data[:size]))
        assert caught.value.code in ("truncated", "not_safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m, t: t.pop("unified.vision.1.fc.up"), "block vision.1 lacks a factor"),
        (lambda m, t: t.pop("start.vision.1.fc.down"), "the starts are not those of"),
        (lambda m, t: t.update({"unified.x": torch.ones(2, 2)}), "unified.x is no low-rank"),
        (lambda m, t: t.update({"x": torch.ones(1)}), "tensor x is not expected"),
        (lambda m, t: t["unified.vision.1.fc.up"].fill_(torch.nan), "not finite"),
        (
            lambda m, t: t.update({"unified.vision.1.fc.up": torch.ones(2, 6).half()}),
            "unified.vision.1.fc.up is torch.float16",
        ),
        (lambda m, t: m.update(rank=3), r"expected \(3, ..\)"),
        (lambda m, t: m.update(rank=None), "need a rank"),
        (lambda m, t: m.update(method="finetune"), "only low-rank updates have a start"),
        (lambda m, t: m.update(method="magic"), "manifest: method"),
        (lambda m, t: t.clear(), "there is no unified tensor"),
    ],
)
def test_a_unified_model_whose_parts_do_not_fit_is_refused(
    fused: tuple[Unified, dict[str, Bundle]],
    tmp_path: Path,
    change: Callable[[dict[str, Any], dict[str, Tensor]], object],
    said: str,
) -> None:
    with pytest.raises(BundleError, match=said) as caught:
        read_unified(forged(file_of(fused[0], tmp_path), change))
    assert caught.value.code == "unified_invalid"


def test_bundles_and_unified_models_are_told_apart(
    fused: tuple[Unified, dict[str, Bundle]], tmp_path: Path
) -> None:
    with pytest.raises(BundleError) as caught:
        read_bundle(file_of(fused[0], tmp_path))
    assert caught.value.code == "not_a_bundle"
    with pytest.raises(BundleError) as caught:
        read_unified(tmp_path / "pets-1.safetensors")
    assert caught.value.code == "not_unified"
    with pytest.raises(BundleError) as caught:
        read_unified(tmp_path / "pets-1.safetensors", max_bytes=100)
    assert caught.value.code == "too_large"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m, t: m.update(fusion=None), "method lora needs a fusion"),
        (lambda m, t: m.update(method="moe_adapter"), "method moe_adapter has no fusion"),
        (lambda m, t: m.update(format=2), "format 2 has no fusion"),
        (lambda m, t: m["fusion"].update(elements=81), "trigger has shape"),
        (lambda m, t: m["fusion"].update(rescaler=-1), "manifest: fusion.rescaler"),
        (lambda m, t: m["fusion"].update(elements=77), "bits beyond its 77 elements"),
        (lambda m, t: t.pop("trigger"), "tensor trigger is missing"),
        (lambda m, t: t.pop("prototypes"), "tensor prototypes is missing"),
        (lambda m, t: m.update(prototypes=False), "tensor prototypes is not expected"),
        (lambda m, t: t["prototypes"][1].zero_(), "prototypes has rows that are not of unit"),
        (lambda m, t: t["prototypes"][1].fill_(torch.nan), "prototypes has values that are not"),
    ],
)
def test_a_trigger_bundle_whose_parts_do_not_fit_is_refused(
    fused: tuple[Unified, dict[str, Bundle]],
    tmp_path: Path,
    change: Callable[[dict[str, Any], dict[str, Tensor]], object],
    said: str,
) -> None:
    with pytest.raises(BundleError, match=said):
        read_bundle(forged(tmp_path / "pets-1.safetensors", change))
