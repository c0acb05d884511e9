from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medley.backbone import Backbone
from medley.errors import DataError
from tests.models import tiny_backbone
from tests.trainer.tiny import NoLargeFiles, pictures
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.export import Label
from trainer.methods import FrozenExperts, MoeAdapter
from trainer.pixels import pixels_of
from trainer.run import Outcome, learn
from trainer.settings import PRESETS, TrainSettings
from trainer.training import learning_rate
from trainer.trunk import ImageTrunk, image_hidden

LABEL = Label(task="colours", version="1", licence="CC0-1.0")
SETTINGS = TrainSettings(
    iterations=24,
    batch_size=16,
    lr=2e-2,
    bottleneck=4,
    first_expert_block=1,
    alpha=0.2,
    ddas_iterations=20,
    augmented_copies=2,
)
IMAGES = pictures(["red", "green", "blue"], 20)


class Watch:
    """Remembers what a run said, and may pull the plug after some step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.started_at, self.steps, self.trunk = -1, 0, 0
        self._stop_after = stop_after

    def on_start(self, step: int, steps: int) -> None:
        self.started_at = step

    def on_trunk(self, images: int) -> None:
        self.trunk += images

    def on_step(self, step: int, loss: float, accuracy: float) -> None:
        self.steps = step
        if step == self._stop_after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


def run(
    backbone: Backbone, folder: Path, settings: TrainSettings = SETTINGS, **more: Any
) -> Outcome:
    options: dict[str, Any] = {"watcher": Watch(), "label": LABEL, **more}
    return learn(backbone, IMAGES, settings, folder=folder, **options)


def test_a_task_is_learnt_and_the_backbone_stays_what_it_was(
    backbone: Backbone, tmp_path: Path
) -> None:
    before = {name: t.clone() for name, t in backbone.model.state_dict().items()}
    outcome = run(backbone, tmp_path)
    metrics = outcome.report["metrics"]
    assert metrics["held_out_accuracy"] > 0.9 > metrics["held_out_accuracy_zero_shot"]
    losses = outcome.report["history"]["losses"]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_equal_seeds_give_equal_bytes_and_others_do_not(backbone: Backbone, tmp_path: Path) -> None:
    first = run(backbone, tmp_path / "a").path.read_bytes()
    assert run(backbone, tmp_path / "b").path.read_bytes() == first
    assert run(backbone, tmp_path / "c", replace(SETTINGS, seed=1)).path.read_bytes() != first


@pytest.mark.parametrize("copies", [0, 2])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    backbone: Backbone, tmp_path: Path, copies: int
) -> None:
    settings = replace(SETTINGS, augmented_copies=copies)
    whole = run(backbone, tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        run(backbone, tmp_path / "cut", settings, watcher=Watch(17), checkpoint_every_s=0)
    watch = Watch()
    resumed = run(backbone, tmp_path / "cut", settings, watcher=watch, resume=True)
    assert watch.started_at == 17
    assert resumed.path.read_bytes() == whole.path.read_bytes()
    assert resumed.report["history"] == whole.report["history"]


def test_a_finished_run_resumes_to_the_same_bytes_without_a_step(
    backbone: Backbone, tmp_path: Path
) -> None:
    data = run(backbone, tmp_path).path.read_bytes()
    watch = Watch()
    assert run(backbone, tmp_path, watcher=watch, resume=True).path.read_bytes() == data
    assert (watch.started_at, watch.steps, watch.trunk) == (24, 0, 0)


def test_another_runs_checkpoint_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    run(backbone, tmp_path, replace(SETTINGS, iterations=2))
    with pytest.raises(DataError, match="another run"):
        run(backbone, tmp_path, replace(SETTINGS, iterations=3), resume=True)


def test_nothing_to_resume_is_an_error(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no checkpoint"):
        run(backbone, tmp_path, resume=True)


@pytest.mark.parametrize("data", [b"", b"not a checkpoint", b"\x80\x02cos\nsystem\n."])
def test_a_broken_or_hostile_checkpoint_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(data)
    with pytest.raises(DataError, match="not a readable checkpoint"):
        load_checkpoint(path)


def test_a_checkpoint_that_cannot_be_written_leaves_the_older_one(
    tmp_path: Path, no_large_files: NoLargeFiles
) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})
    with no_large_files(), pytest.raises(DataError, match="cannot write"):
        save_checkpoint(path, {"step": 2, "weights": torch.zeros(100_000)})
    assert load_checkpoint(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    settings = TrainSettings(iterations=1000, lr=1e-3)
    rates = [learning_rate(settings, step) for step in range(1001)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[99] == rates[100] == max(rates) == 1e-3
    assert rates[1000] == pytest.approx(0, abs=1e-12)
    assert all(a >= b for a, b in pairwise(rates[100:]))


def test_cached_and_recomputed_trunks_agree(backbone: Backbone) -> None:
    index_B = np.array([3, 50, 7])
    learner = MoeAdapter(backbone, ["a red"], SETTINGS, FrozenExperts())
    trunks = [
        ImageTrunk(backbone, IMAGES, 1, learner.enter, augment=True, copies=copies, seed=5)
        for copies in (0, 2)
    ]
    for epoch in (0, 1):
        recomputed, cached = (trunk.batch(index_B, epoch) for trunk in trunks)
        torch.testing.assert_close(recomputed.tensors, cached.tensors)


def test_random_crops_differ_by_epoch_and_repeat_by_seed(backbone: Backbone) -> None:
    crops = [pixels_of(backbone, IMAGES, [0], crop_seed=(0, epoch)) for epoch in (0, 1, 0)]
    assert not torch.equal(crops[0], crops[1])
    assert torch.equal(crops[0], crops[2])
    assert crops[0].shape == (1, 3, 32, 32)


def test_a_fresh_learner_is_the_zero_shot_model(backbone: Backbone) -> None:
    learner = MoeAdapter(backbone, ["a red", "yellow"], SETTINGS, FrozenExperts()).eval()
    pixels_BCHW = pixels_of(backbone, IMAGES, range(5))
    image_BE = learner.image_features_of(image_hidden(backbone, pixels_BCHW, 1))
    text_CE, _ = learner.text_features()
    model = backbone.model
    plain_BE = model.encode_image(backbone.normalise(pixels_BCHW), normalize=True)
    # The prompts are cut to the longest of them: exact in a causal tower.
    plain_CE = model.encode_text(backbone.tokenize(["a red", "yellow"]), normalize=True)
    torch.testing.assert_close(image_BE, plain_BE)
    torch.testing.assert_close(text_CE, plain_CE)


def test_a_task_may_go_without_text_experts(backbone: Backbone, tmp_path: Path) -> None:
    outcome = run(backbone, tmp_path, replace(SETTINGS, first_text_block=2))
    assert outcome.bundle.manifest.text.blocks == {}
    assert outcome.report["usage"]["text"] == {}
    assert outcome.report["metrics"]["held_out_accuracy"] > 0.8
    with pytest.raises(DataError, match="only the blocks 0 to 1; 2 means none"):
        run(backbone, tmp_path, replace(SETTINGS, first_text_block=3))


def test_a_backbone_without_text_experts_learns_by_its_images(
    backbone: Backbone, tmp_path: Path
) -> None:
    outcome = run(replace(backbone, text=None), tmp_path)
    assert outcome.bundle.manifest.text.blocks == {}
    assert outcome.report["metrics"]["held_out_accuracy"] > 0.8


def test_few_shots_use_so_many_images_and_hold_out_none(backbone: Backbone, tmp_path: Path) -> None:
    outcome = run(backbone, tmp_path, replace(SETTINGS, shots=5))
    calibration = outcome.bundle.manifest.selector.calibration
    assert (calibration.method, calibration.images) == ("cross-fitted conformal", 15)
    assert outcome.report["metrics"] == {}


@pytest.mark.parametrize("changed", [{"precision": "bf16"}, {"balance": 0.01}, {"freeze": "count"}])
def test_the_options_learn_too(backbone: Backbone, tmp_path: Path, changed: dict[str, Any]) -> None:
    outcome = run(backbone, tmp_path, replace(SETTINGS, **changed))
    assert outcome.report["metrics"]["held_out_accuracy"] > 0.9


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("iterations", 0, "at least 1"),
        ("lr", 0.0, "more than 0"),
        ("lr", float("nan"), "more than 0"),
        ("hold_out", 1.0, "less than 1"),
        ("freeze_mass", 1.5, "at most 1"),
        ("first_expert_block", -1, "at least 0"),
        ("shots", 0, "at least 1"),
    ],
)
def test_a_number_out_of_range_names_itself_and_its_limit(
    name: str, value: float, limit: str
) -> None:
    with pytest.raises(DataError, match=f"{name} is .*{limit}"):
        TrainSettings(**{name: value})  # type: ignore[arg-type]


def test_a_first_expert_block_beyond_the_tower_is_refused(
    backbone: Backbone, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="only the blocks 0 to 2"):
        run(backbone, tmp_path, replace(SETTINGS, first_expert_block=3))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_a_set_of_settings(name: str) -> None:
    settings = TrainSettings(**PRESETS[name])
    assert PRESETS[name].items() <= settings.as_dict().items()
