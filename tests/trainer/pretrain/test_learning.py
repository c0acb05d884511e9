"""An interrupted run ends with the same numbers as one that was not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medley.errors import DataError
from medley.mini import build_mini, mini_tokenizer
from trainer.pretrain.cache import ROW, CachePlan, FeatureCache
from trainer.pretrain.files import save_array
from trainer.pretrain.image import ImageLearner, SoftLabels, load_tower
from trainer.pretrain.loop import Learner, Schedule, finished, learn
from trainer.pretrain.progress import Progress
from trainer.pretrain.text import TextLearner, TextTable, embed, encode

NAMES = ["cat", "dog", "steam locomotive", "hammer", "guitar"]
BATCH = 4


def names() -> torch.Tensor:
    return F.normalize(torch.randn(5, 384, generator=torch.Generator().manual_seed(0)), dim=-1)


@pytest.fixture
def image_learner(tmp_path: Path) -> Callable[[], ImageLearner]:
    rows = np.random.default_rng(0).normal(size=(12, ROW)).astype(np.float16)
    save_array(tmp_path / "features" / "00000.npy", rows)
    cache = FeatureCache(CachePlan([], np.arange(12), 12, 0), tmp_path / "features")

    def make() -> ImageLearner:
        torch.manual_seed(3)
        return ImageLearner(
            build_mini(patch_dropout=0.5),
            cache,
            np.arange(12) % 5,
            rows=np.arange(12),
            names_NE=names(),
            soft_labels=SoftLabels(names(), nearest=3, temperature=0.05),
            cosine_weight=1.0,
            batch=BATCH,
            seed=0,
        )

    return make


def text_learner() -> TextLearner:
    torch.manual_seed(3)
    table = TextTable.build(NAMES, names(), tokenizer=mini_tokenizer(), weights_N=np.ones(5))
    return TextLearner(build_mini(), table, batch=BATCH, seed=0)


def run(learner: Learner, checkpoint: Path, steps: range) -> dict[str, Any]:
    schedule = Schedule(1e-3, warmup=2, decay_from=4, steps=6)
    with Progress().task("test", len(steps) * BATCH) as task:
        learn(learner, schedule, checkpoint, task, steps=steps, batch=BATCH, every_s=0.0)
    return learner.state_dict()


def assert_same(one: object, other: object) -> None:
    if isinstance(one, dict):
        assert isinstance(other, dict)
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        assert torch.equal(one, other)
    elif isinstance(one, list):
        assert isinstance(other, list)
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


def test_image_stage_resumes_exactly(
    image_learner: Callable[[], ImageLearner], tmp_path: Path
) -> None:
    whole = run(image_learner(), tmp_path / "whole.pt", range(6))
    run(image_learner(), tmp_path / "cut.pt", range(3))
    assert_same(run(image_learner(), tmp_path / "cut.pt", range(6)), whole)


def test_text_stage_resumes_exactly(tmp_path: Path) -> None:
    whole = run(text_learner(), tmp_path / "whole.pt", range(4))
    run(text_learner(), tmp_path / "cut.pt", range(2))
    assert_same(run(text_learner(), tmp_path / "cut.pt", range(4)), whole)


def test_a_finished_stage_is_known_and_an_overrun_one_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "text.pt"
    assert not finished(checkpoint, range(1))
    run(text_learner(), checkpoint, range(1))
    assert finished(checkpoint, range(1))
    assert not finished(checkpoint, range(2))
    with pytest.raises(DataError, match="has made 1 steps"):
        finished(checkpoint, range(0))


def test_text_stage_learns() -> None:
    learner = text_learner()
    first, *_, last = (learner.step(index, 1e-3)["cosine"] for index in range(12))
    assert last > first + 0.2


def test_image_stage_learns(image_learner: Callable[[], ImageLearner]) -> None:
    learner = image_learner()
    first, *_, last = (learner.step(index, 1e-3)["loss"] for index in range(12))
    assert last < first


def test_a_trained_tower_fits_under_a_whole_stem(
    image_learner: Callable[[], ImageLearner],
) -> None:
    learner = image_learner()
    learner.step(0, 1e-3)
    state = learner.state_dict()["tower"]
    model = build_mini()
    load_tower(model, state)
    assert torch.equal(model.visual.conv1.mix.proj.weight, state["conv1.proj.weight"])
    assert torch.equal(model.visual.proj, state["proj"])


def test_schedule_rises_stays_and_falls_to_zero() -> None:
    schedule = Schedule(1.0, warmup=2, decay_from=6, steps=10)
    assert [schedule(step) for step in range(11)] == [
        0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0,
    ]  # fmt: skip


def test_soft_labels_share_an_image_among_near_names() -> None:
    near = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), dim=-1)
    labels = SoftLabels(near, nearest=2, temperature=0.05)
    shared = labels.loss(torch.tensor([[5.0, 5.0, 0.0]]), torch.tensor([0]))
    alone = labels.loss(torch.tensor([[10.0, 0.0, 0.0]]), torch.tensor([0]))
    assert shared < alone


def test_cut_texts_read_as_open_clip_reads_them() -> None:
    model, tokens = build_mini(), mini_tokenizer()(NAMES)
    with torch.inference_mode():
        expected = model.encode_text(tokens)
        torch.testing.assert_close(encode(model, tokens[:, :8]), expected)
        torch.testing.assert_close(embed(model, tokens), F.normalize(expected, dim=-1))


def test_texts_beyond_the_context_are_never_drawn() -> None:
    table = TextTable.build(
        ["cat", "cat " * 40], names()[:2], tokenizer=mini_tokenizer(), weights_N=np.ones(2)
    )
    assert table.weights.tolist() == [1.0, 0.0]
