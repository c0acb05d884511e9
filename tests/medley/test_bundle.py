"""medley/bundle.py: what is written is read back, the same bytes each time, whole or not at all."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medley.bundle import (
    Bundle,
    expert_tensors,
    read_bundle,
    selector_tensors,
    tower_spec,
    write_bundle,
)
from medley.errors import BundleError
from medley.manifest import Manifest
from medley.selector import TaskSelector
from tests.fakes import random_experts, random_selector, tiny_bundle

ROOT = Path(__file__).parents[2]


def written(path: Path, **fields: object) -> Bundle:
    return write_bundle(*tiny_bundle(**fields), path)  # type: ignore[arg-type]


def test_a_written_bundle_is_read_back_tensor_by_tensor(tmp_path: Path) -> None:
    manifest, tensors = tiny_bundle()
    write_bundle(manifest, tensors, tmp_path / "b.safetensors")
    bundle = read_bundle(tmp_path / "b.safetensors")
    assert bundle.manifest.model_copy(update={"seal": manifest.seal}) == manifest
    assert bundle.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert bundle.tensors[name].dtype == tensor.dtype
        assert torch.equal(bundle.tensors[name], tensor)


def test_writing_returns_what_reading_returns(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    bundle = written(path)
    for again in (read_bundle(path), read_bundle(path.read_bytes())):
        assert again.manifest == bundle.manifest
        assert again.digest == bundle.digest
    assert re.fullmatch("sha256:[0-9a-f]{64}", bundle.digest)


def test_experts_and_routers_come_back_by_tower_and_block(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(1)
    vision = {b: random_experts(6, 4, experts=b, random=random) for b in (2, 11)}
    bundle = written(tmp_path / "b.safetensors", vision=vision, text={}, bottleneck=4)
    assert bundle.experts("text") == {}
    assert list(bundle.experts("vision")) == [2, 11]
    for block, experts in bundle.experts("vision").items():
        assert experts.num_experts == block
        assert torch.equal(experts.router_DE, vision[block].router_DE)
        assert [experts.digest(i) for i in range(block)] == [
            vision[block].digest(i) for i in range(block)
        ]
    both = bundle.task_experts()
    assert (both.top_k, both.scale) == (bundle.manifest.top_k, bundle.manifest.scale)
    assert (list(both.vision), list(both.text)) == ([2, 11], [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_experts_may_be_stored_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    bundle = written(tmp_path / "b.safetensors", dtype=dtype)
    assert bundle.experts("vision")[1].down_ERD.dtype == dtype


def test_an_expert_that_two_bundles_share_has_the_same_digest_in_both(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(1)
    shared = {3: random_experts(4, 3, dtype=torch.bfloat16, random=random)}
    first = written(tmp_path / "a.safetensors", vision=shared)
    second = written(tmp_path / "b.safetensors", vision=first.experts("vision"), task="birds")
    assert second.manifest.vision.blocks == first.manifest.vision.blocks
    assert second.digest != first.digest


def test_the_selector_comes_back_and_scores_the_same(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(1)
    widths = {"stem:mean_std": 8, "block7:cls": 4, "embedding": 5}
    selector = random_selector(widths, random=random)
    bundle = written(tmp_path / "b.safetensors", selector=selector)
    taps = {feature: torch.randn(3, F, generator=random) for feature, F in widths.items()}
    assert torch.equal(bundle.selector().scores(taps), selector.scores(taps))
    assert (bundle.selector().threshold, bundle.selector().alpha) == (2.5, 0.02)


def test_a_selector_that_accepts_every_image_is_null_in_the_manifest(tmp_path: Path) -> None:
    levels = random_selector({"embedding": 5}, random=torch.Generator()).levels
    bundle = written(
        tmp_path / "b.safetensors",
        selector=TaskSelector(levels=levels, threshold=math.inf, alpha=None),
    )
    assert bundle.manifest.selector.threshold is None
    assert bundle.manifest.selector.alpha is None
    assert bundle.selector().threshold == math.inf
    assert bundle.selector().alpha is None


def test_names_of_tensors_are_those_of_the_specification() -> None:
    random = torch.Generator().manual_seed(1)
    experts = {7: random_experts(4, 3, random=random)}
    assert list(expert_tensors("vision", experts)) == [
        "vision.7.experts.down",
        "vision.7.experts.down_bias",
        "vision.7.experts.up",
        "vision.7.experts.up_bias",
        "vision.7.router",
    ]
    assert list(selector_tensors(random_selector({"embedding": 5}, random=random))) == [
        f"ddas.0.{name}"
        for name in ("mean", "std", "encoder", "encoder_bias", "decoder", "decoder_bias")
    ]
    assert tower_spec(4, experts).blocks[7] == (experts[7].digest(0), experts[7].digest(1))


def test_the_same_content_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.fakes import tiny_bundle; "
        "from medley.bundle import write_bundle; "
        "write_bundle(*tiny_bundle(seed=5), Path(sys.argv[1]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-c", program, str(tmp_path / "theirs")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    written(tmp_path / "ours", seed=5)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_the_order_of_names_does_not_change_the_bytes(tmp_path: Path) -> None:
    manifest, tensors = tiny_bundle()
    settings = dict(reversed(manifest.training.settings.items()))
    turned = manifest.model_copy(
        update={"training": manifest.training.model_copy(update={"settings": settings})}
    )
    first = write_bundle(manifest, tensors, tmp_path / "a")
    second = write_bundle(turned, dict(reversed(tensors.items())), tmp_path / "b")
    assert second.digest == first.digest
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_another_number_anywhere_gives_another_digest(tmp_path: Path) -> None:
    digests = {written(tmp_path / "b", seed=seed).digest for seed in range(5)}
    digests |= {written(tmp_path / "b", scale=scale).digest for scale in (0.2, 0.3)}
    assert len(digests) == 7


def test_writing_a_bundle_again_keeps_its_digest(tmp_path: Path) -> None:
    bundle = written(tmp_path / "a")
    again = write_bundle(bundle.manifest, bundle.tensors, tmp_path / "b")
    assert again.digest == bundle.digest


def test_views_and_shared_memory_are_written_as_what_they_show(tmp_path: Path) -> None:
    manifest, tensors = tiny_bundle()
    tensors["self_test.logits"] = torch.arange(3.0).expand(2, 3)
    tensors["vision.2.router"] = tensors["vision.1.router"]
    bundle = write_bundle(manifest, tensors, tmp_path / "b")
    assert bundle.tensors["self_test.logits"].tolist() == [[0, 1, 2], [0, 1, 2]]


@settings(max_examples=25)
@given(names=st.lists(st.text(min_size=1, max_size=200).filter(str.strip), unique=True, min_size=1))
def test_any_text_can_be_a_class_name(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    bundle = written(tmp_path_factory.getbasetemp() / "b", class_names=tuple(names))
    assert bundle.manifest.class_names == tuple(names)


def test_ten_thousand_long_class_names_fit(tmp_path: Path) -> None:
    names = tuple(f"{i:05d}" + '"' * 195 for i in range(10_000))
    assert written(tmp_path / "b", class_names=names).manifest.class_names == names


def test_an_invalid_bundle_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    path.write_bytes(b"older")
    manifest, tensors = tiny_bundle()
    del tensors["class_text_features"]
    with pytest.raises(BundleError, match="class_text_features is missing"):
        write_bundle(manifest, tensors, path)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_an_older_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    path.write_bytes(b"older")
    bundle = written(path)
    assert read_bundle(path).digest == bundle.digest
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"^cannot write b\.safetensors: No such file") as caught:
        written(tmp_path / "absent" / "b.safetensors")
    assert caught.value.code == "not_written"


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """Let writes of this process fail beyond a size, where they would fail on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_clear_error_and_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    path.write_bytes(b"older")
    with file_size_limit(1000), pytest.raises(BundleError) as caught:
        written(path)
    assert str(caught.value) == "cannot write b.safetensors: File too large"
    assert caught.value.code == "not_written"
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_any_safetensors_reader_can_open_a_bundle(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    bundle = written(path)
    with safetensors.safe_open(path, framework="pt") as file:
        manifest = json.loads(file.metadata()["medley"])
        assert set(file.keys()) == bundle.tensors.keys()
    assert next(iter(manifest)) == "seal"
    assert manifest["task"] == "pets"


def test_the_schema_in_docs_is_that_of_the_code() -> None:
    schema = json.loads((ROOT / "docs" / "bundle-manifest.schema.json").read_text())
    assert schema == Manifest.model_json_schema()


def test_the_reader_in_docs_runs_without_medley(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "bundle-format.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert "medley" not in re.findall(r"^(?:import|from) (\w+)", program, re.MULTILINE)
    bundle = written(tmp_path / "pets-1.safetensors")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert bundle.digest in done.stdout
    assert "hamster" in done.stdout
