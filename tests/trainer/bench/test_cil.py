import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medley.backbone import Backbone
from medley.errors import DataError
from tests.models import tiny_backbone
from tests.trainer.test_training import Watch
from tests.trainer.tiny import COLOURS, pictures
from trainer.bench.cil import run_cil
from trainer.bench.cil_plan import (
    CIL_METHODS,
    CilMethod,
    CilPlan,
    CilResult,
    cil_settings,
    class_steps,
    markdown,
)
from trainer.settings import PRESETS, TrainSettings

NAMES = tuple(COLOURS)
STEPS = (("blue", "white"), ("red", "black"), ("yellow", "green"))
TRAIN, TEST = pictures(NAMES, 12), pictures(NAMES, 6, seed=9)
RATES = {"moe_adapter": 5e-2, "finetune": 2e-3, "bundles": 5e-2}
BASE = TrainSettings(bottleneck=4, first_expert_block=1, alpha=0.2, ddas_iterations=20)


class Watches:
    """Makes a watcher a step, of which one may pull the plug."""

    def __init__(self, stop: tuple[int, int] | None = None) -> None:
        self.names: list[str] = []
        self.watches: list[Watch] = []
        self._stop = stop

    def __call__(self, name: str) -> Watch:
        self.names.append(name)
        stopped = self._stop is not None and len(self.watches) == self._stop[0]
        self.watches.append(Watch(self._stop[1] if stopped and self._stop else None))
        return self.watches[-1]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


def plan(method: CilMethod, **changed: Any) -> CilPlan:
    settings = replace(cil_settings(method, BASE), batch_size=8, lr=RATES.get(method, 1e-2))
    return replace(CilPlan(steps=STEPS, settings=settings, epochs=6, template="a {}"), **changed)


def result(
    backbone: Backbone, folder: Path, method: CilMethod = "moe_adapter", **more: Any
) -> CilResult:
    options: dict[str, Any] = {"watch": Watches(), "plan": plan(method), **more}
    return run_cil(backbone, TRAIN, TEST, method=method, folder=folder, **options)


def test_the_paper_preset_gives_the_papers_parameters() -> None:
    """4,027,392 of two experts and one router in all blocks of ViT-B/16 (MoE-Adapters)."""
    settings = cil_settings("moe_adapter", TrainSettings(**PRESETS["paper"]))
    widths = (768, 512)
    expert = sum(2 * settings.bottleneck * width + settings.bottleneck + width for width in widths)
    router = sum(2 * width * settings.num_experts for width in widths)
    assert 12 * (settings.num_experts * expert + router) == 4_027_392
    assert (settings.lr, settings.batch_size, settings.label_smoothing) == (1e-3, 128, 0)
    assert (settings.top_k, settings.first_expert_block, settings.first_text_block) == (2, 0, 0)


def test_steps_keep_the_order_that_is_given_and_seeds_shuffle_it() -> None:
    assert class_steps("abcdef", 3) == (("a", "b"), ("c", "d"), ("e", "f"))
    assert class_steps("abcdef", 2, base=2) == (("a", "b"), ("c", "d"), ("e", "f"))
    shuffled = class_steps("abcdef", 3, seed=1)
    assert shuffled != class_steps("abcdef", 3)
    assert shuffled == class_steps("abcdef", 3, seed=1) != class_steps("abcdef", 3, seed=2)
    assert sorted(name for names in shuffled for name in names) == list("abcdef")


@pytest.mark.parametrize(("count", "base"), [(4, 0), (0, 0), (7, 0), (2, 1), (2, -2), (3, 6)])
def test_classes_that_cannot_be_cut_into_equal_steps_are_refused(count: int, base: int) -> None:
    with pytest.raises(DataError, match="cannot be cut into"):
        class_steps("abcdef", count, base=base)


@pytest.mark.parametrize("method", CIL_METHODS)
def test_every_method_goes_through_all_steps(
    backbone: Backbone, tmp_path: Path, method: CilMethod
) -> None:
    found = result(backbone, tmp_path, method)
    assert len(found.accuracy_S) == 3
    assert all(0 <= share <= 1 for share in found.accuracy_S)
    assert found.metrics.average == pytest.approx(np.mean(found.accuracy_S))
    assert found.metrics.last == found.accuracy_S[-1]
    assert (found.stored_parameters > 0) == (method not in ("zero-shot", "linear-probe"))
    if method != "zero-shot":
        assert found.accuracy_S[0] > 0.9  # two classes, none to forget


def test_a_step_learns_from_its_own_classes_in_their_order_against_their_names(
    backbone: Backbone, tmp_path: Path
) -> None:
    watches, asked = Watches(), []
    tokenizer = backbone.tokenizer

    def heard(texts: Any) -> Tensor:
        asked.append(list(texts))
        return tokenizer(texts)

    result(replace(backbone, tokenizer=heard), tmp_path, watch=watches)
    assert watches.names == [f"moe_adapter: step {step} of 3" for step in (1, 2, 3)]
    assert [watch.steps for watch in watches.watches] == [18, 18, 18]  # 6 epochs of 24 images
    # Before a step its own classes are tokenized, after it all that were seen.
    seen = [name for names in STEPS for name in names]
    assert asked == [
        [f"a {name}" for name in names]
        for step in range(3)
        for names in (STEPS[step], seen[: 2 * step + 2])
    ]


def test_upper_bound_keeps_what_sequential_learning_forgets(
    backbone: Backbone, tmp_path: Path
) -> None:
    joint = result(backbone, tmp_path / "joint", "linear-probe").metrics.last
    sequential = result(backbone, tmp_path / "finetune", "finetune").metrics.last
    assert joint > 0.95
    assert sequential < joint - 0.2


def test_accuracy_is_measured_without_router_noise_and_dropout(
    backbone: Backbone, tmp_path: Path
) -> None:
    class Listener(Watch):
        def on_step(self, step: int, loss: float, accuracy: float) -> None:
            self.generator = torch.get_rng_state()

    listener = Listener()
    result(backbone, tmp_path, watch=lambda _: listener)
    # Noise or dropout after the last step would have drawn from it.
    assert torch.equal(torch.get_rng_state(), listener.generator)


@pytest.mark.parametrize("method", ["moe_adapter", "finetune", "bundles"])
@pytest.mark.parametrize("stop", [(1, 7), (2, 1)])
def test_a_run_that_was_killed_ends_in_the_same_numbers(
    backbone: Backbone, tmp_path: Path, method: CilMethod, stop: tuple[int, int]
) -> None:
    whole = result(backbone, tmp_path / "whole", method)
    with pytest.raises(KeyboardInterrupt):
        result(backbone, tmp_path / "cut", method, watch=Watches(stop), checkpoint_every_s=0)
    watches = Watches()
    resumed = result(backbone, tmp_path / "cut", method, watch=watches)
    assert replace(resumed, seconds=whole.seconds) == whole
    assert len(watches.names) == 3 - stop[0]
    assert watches.watches[0].started_at == stop[1]


def test_a_finished_run_is_read_and_not_learnt_again(backbone: Backbone, tmp_path: Path) -> None:
    first, watches = result(backbone, tmp_path), Watches()
    assert result(backbone, tmp_path, watch=watches) == first
    assert watches.names == []
    written = json.loads((tmp_path / "result.json").read_bytes())
    assert written["last"] == first.metrics.last
    assert written["accuracy_S"] == list(first.accuracy_S)
    assert {file.name for file in tmp_path.iterdir()} == {"progress.pt", "result.json"}


def test_another_runs_folder_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    result(backbone, tmp_path, "zero-shot")
    with pytest.raises(DataError, match="holds another run"):
        result(backbone, tmp_path, "linear-probe")
    with pytest.raises(DataError, match="holds another run"):
        result(backbone, tmp_path, "zero-shot", plan=plan("zero-shot", steps=STEPS[:2]))


def test_classes_that_are_unknown_or_twice_are_named(backbone: Backbone, tmp_path: Path) -> None:
    unknown = plan("zero-shot", steps=(("red", "pink"),))
    with pytest.raises(DataError, match="no images of pink"):
        result(backbone, tmp_path, "zero-shot", plan=unknown)
    twice = plan("zero-shot", steps=(("red", "blue"), ("Blue",)))
    with pytest.raises(DataError, match="in two steps"):
        result(backbone, tmp_path, "zero-shot", plan=twice)
    with pytest.raises(DataError, match="epochs is 0"):
        plan("zero-shot", epochs=0)


def test_the_table_has_a_line_a_method_and_spreads_over_seeds(
    backbone: Backbone, tmp_path: Path
) -> None:
    zero = result(backbone, tmp_path, "zero-shot")
    one = replace(zero, method="finetune", accuracy_S=(0.9, 0.5, 0.4))
    two = replace(one, seed=1, accuracy_S=(0.7, 0.5, 0.2))
    lines = markdown([zero, one, two]).splitlines()
    assert lines[0] == "|  | Avg | Last | step 1 | step 2 | step 3 |"
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["zero-shot", "finetune"]
    assert "| 53.3 +- 9.4 | 30.0 +- 14.1 | 80.0 +- 14.1 | 50.0 +- 0.0 |" in lines[3]
