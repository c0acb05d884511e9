from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medley.backbone import Backbone
from medley.errors import DataError
from medley.experts import TaskExperts
from medley.prompts import class_text_features
from medley.routed import RoutedModel
from tests.models import random_experts, tiny_backbone
from tests.trainer.test_training import LABEL, Watch
from tests.trainer.tiny import pictures
from trainer.capacity import capacity_for
from trainer.datasets import ImageSet
from trainer.evaluation import Case, evaluate, served
from trainer.freezing import Usage, keep
from trainer.methods import (
    Finetune,
    FrozenExperts,
    Learner,
    Lora,
    MoeAdapter,
    ParameterCounts,
    make_learner,
)
from trainer.pixels import pixels_of
from trainer.run import learn
from trainer.settings import LEARNING_RATES, Method, TrainSettings
from trainer.training import Trained, train
from trainer.trunk import image_hidden

METHODS: tuple[Method, ...] = ("moe_adapter", "lora", "finetune")
SETTINGS = TrainSettings(
    iterations=24,
    batch_size=16,
    bottleneck=4,
    first_expert_block=1,
    alpha=0.2,
    ddas_iterations=20,
)
RATES: dict[Method, float] = {"moe_adapter": 2e-2, "lora": 2e-2, "finetune": 2e-3}
BRIGHT, GREY = ("red", "green", "blue"), ("yellow", "white", "black")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


def settings_for(method: Method, **changed: Any) -> TrainSettings:
    return replace(SETTINGS, method=method, lr=RATES[method], **changed)


def trained(
    backbone: Backbone, images: ImageSet, settings: TrainSettings, folder: Path, **more: Any
) -> Trained:
    options: dict[str, Any] = {"resume": False, "checkpoint_every_s": 1e9, "watcher": Watch()}
    checkpoint = folder / "checkpoint.pt"
    return train(
        backbone, images, None, settings, checkpoint=checkpoint, identity="x", **options | more
    )


def features(learner: Learner, images: ImageSet) -> Tensor:
    pixels_BCHW = pixels_of(learner.backbone, images, range(len(images)))
    return learner.image_features_of(
        image_hidden(learner.backbone, pixels_BCHW, learner.first_image_block)
    )


def accuracy(learner: Learner, images: ImageSet) -> float:
    text_CE = learner.text_features_of(images.class_names, images.templates)
    guess_N = (features(learner, images) @ text_CE.T).argmax(1).numpy()
    return float((guess_N == images.labels).mean())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("image_block", "text_block"), [(0, 0), (1, 1), (2, 2)])
def test_a_fresh_learner_of_any_method_is_the_zero_shot_model(
    backbone: Backbone, method: Method, image_block: int, text_block: int
) -> None:
    settings = settings_for(method, first_expert_block=image_block, first_text_block=text_block)
    learner = make_learner(backbone, ["a red"], settings, FrozenExperts())
    images, names = pictures(BRIGHT, 2), ["red", "green"]
    pixels_BCHW = pixels_of(backbone, images, range(6))
    model = backbone.model
    plain_BE = model.encode_image(backbone.normalise(pixels_BCHW), normalize=True)
    plain_CE = model.encode_text(backbone.tokenize([f"a {n}" for n in names]), normalize=True)
    torch.testing.assert_close(features(learner, images), plain_BE)
    torch.testing.assert_close(learner.text_features_of(names, ["a {}"]), plain_CE)
    torch.testing.assert_close(learner.text_features()[0], plain_CE[:1])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_leaves_the_backbone_as_it_was(
    backbone: Backbone, method: Method, tmp_path: Path
) -> None:
    before = {name: t.clone() for name, t in backbone.model.state_dict().items()}
    images = pictures(BRIGHT, 20)
    fresh = make_learner(backbone, ["a red"], settings_for(method), FrozenExperts())
    learner = trained(backbone, images, settings_for(method), tmp_path).learner
    test = pictures(BRIGHT, 10, seed=9)
    assert accuracy(learner, test) > 0.9 > accuracy(fresh, test)
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(p.requires_grad or p.grad is not None for p in backbone.model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_every_parameter_and_nothing_else_is_registered(
    backbone: Backbone, method: Method
) -> None:
    torch.manual_seed(0)
    learner = make_learner(
        backbone, ["a red", "a blue"], settings_for(method, scale=1.0), FrozenExperts()
    )
    with torch.no_grad():  # away from the zeros that hide other parameters' gradients
        for parameter in learner.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    hidden_BLD = image_hidden(backbone, pixels_of(backbone, pictures(BRIGHT, 4), range(12)), 1)
    image_BE, _ = learner.train().image_features(learner.enter(hidden_BLD))
    (image_BE @ learner.text_features()[0].T)[:, 0].sum().backward()
    for name, parameter in learner.named_parameters():
        assert parameter.grad is not None, name
    shared = {p.data_ptr() for p in backbone.model.parameters()}
    assert not shared & {p.data_ptr() for p in learner.parameters()}


def test_fine_tuning_keeps_stem_embeddings_and_logit_scale(backbone: Backbone) -> None:
    settings = settings_for("finetune", first_expert_block=0)
    names = set(Finetune(backbone, ["a red"], settings).trained)
    every = {name.replace(".", "/") for name, _ in backbone.model.named_parameters()}
    assert every - names == {
        "logit_scale",
        "positional_embedding",
        "token_embedding/weight",
        "visual/class_embedding",
        "visual/conv1/weight",
        "visual/ln_pre/bias",
        "visual/ln_pre/weight",
        "visual/positional_embedding",
    }


def test_later_first_blocks_leave_the_earlier_ones_frozen(backbone: Backbone) -> None:
    settings = settings_for("finetune", first_expert_block=2, first_text_block=1)
    blocks = {
        name.rpartition("resblocks/")[2][0] + name[0]
        for name in Finetune(backbone, ["a red"], settings).trained
        if "resblocks" in name
    }
    assert blocks == {"2v", "1t"}


@pytest.mark.parametrize("method", METHODS)
def test_a_text_tower_without_trained_blocks_stays_what_it_is(
    backbone: Backbone, method: Method, tmp_path: Path
) -> None:
    settings = settings_for(method, first_text_block=2)
    learner = trained(backbone, pictures(BRIGHT, 20), settings, tmp_path).learner
    names, templates = ("red", "white"), ("a {}", "the {}")
    zero_shot_CE = class_text_features(RoutedModel(backbone), names, templates)
    torch.testing.assert_close(learner.text_features_of(names, templates), zero_shot_CE)
    assert not any("text" in name for name, _ in learner.named_parameters())
    assert accuracy(learner, pictures(BRIGHT, 10, seed=9)) > 0.8


def test_a_learner_and_the_server_encode_any_class_list_alike(backbone: Backbone) -> None:
    settings = settings_for("moe_adapter", freeze_mass=1.0)
    learner = MoeAdapter(backbone, ["a red"], settings, FrozenExperts())
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.normal_(std=0.3)
    even_E = torch.full((4,), 0.25)
    usage: Usage = {
        "vision": dict.fromkeys((1, 2), even_E),
        "text": dict.fromkeys((0, 1), even_E),
    }
    experts = keep(learner, FrozenExperts(), usage, settings)
    model = RoutedModel(backbone, first_expert_block=1, capacity=capacity_for([experts]))
    names, templates = ("red", "yellow", "white"), ("a {}", "the {}")
    served_CE = class_text_features(model, names, templates, model.load(experts))
    # Rounding the experts to bfloat16 costs 2^-9 a weight.
    agreement_C = torch.cosine_similarity(learner.text_features_of(names, templates), served_CE)
    assert agreement_C.min() > 0.999


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_of_any_method_resumes_to_the_same_bits(
    backbone: Backbone, method: Method, tmp_path: Path
) -> None:
    images, settings = pictures(BRIGHT, 20), settings_for(method)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = trained(backbone, images, settings, tmp_path / "whole")
    cut: dict[str, Any] = {"checkpoint_every_s": 0, "watcher": Watch(stop_after=17)}
    with pytest.raises(KeyboardInterrupt):
        trained(backbone, images, settings, tmp_path / "cut", **cut)
    watch = Watch()
    resumed = trained(backbone, images, settings, tmp_path / "cut", resume=True, watcher=watch)
    assert watch.started_at == 17
    assert resumed.history == whole.history
    for name, tensor in whole.learner.state_dict().items():
        assert torch.equal(tensor, resumed.learner.state_dict()[name]), name


def test_sequential_fine_tuning_forgets_and_bundles_do_not(
    backbone: Backbone, tmp_path: Path
) -> None:
    tests = [pictures(colours, 15, seed=9) for colours in (BRIGHT, GREY)]
    settings = settings_for("finetune")
    first = trained(backbone, pictures(BRIGHT, 20), settings, tmp_path).learner
    state = {name: t.clone() for name, t in first.state_dict().items()}
    second = trained(
        backbone, pictures(GREY, 20), settings, tmp_path, initial=first.state_dict()
    ).learner
    assert accuracy(second, tests[1]) > 0.9
    assert accuracy(second, tests[0]) < accuracy(first, tests[0]) - 0.1
    for name, tensor in first.state_dict().items():  # started from, not trained on
        assert torch.equal(tensor, state[name]), name

    bundles = [
        learn(
            backbone,
            pictures(colours, 20),
            settings_for("moe_adapter"),
            label=replace(LABEL, task=task),
            folder=tmp_path,
            watcher=Watch(),
        ).bundle
        for task, colours in (("bright", BRIGHT), ("grey", GREY))
    ]
    case = Case(name="bright", test=tests[0], task="bright")
    alone, together = (
        evaluate(*served(some, backbone), [case], alphas={}).scores[0].told
        for some in (bundles[:1], bundles)
    )
    assert alone == together
    assert together is not None
    assert together > 0.9


def test_a_run_starts_from_the_state_it_is_given(backbone: Backbone, tmp_path: Path) -> None:
    images = pictures(BRIGHT, 20)
    for method in METHODS:
        first = trained(backbone, images, settings_for(method), tmp_path).learner
        still = replace(settings_for(method), iterations=1, lr=1e-12)
        second = trained(
            backbone, pictures(GREY, 20), still, tmp_path, initial=first.state_dict()
        ).learner
        assert not torch.equal(
            features(first, images),
            features(
                make_learner(backbone, ["a red"], settings_for(method), FrozenExperts()), images
            ),
        )
        torch.testing.assert_close(features(second, images), features(first, images))


def test_parameters_of_experts_are_counted_by_hand(backbone: Backbone) -> None:
    settings = settings_for("moe_adapter", num_experts=3, top_k=2, first_text_block=1)
    learner = MoeAdapter(backbone, ["a red"], settings, FrozenExperts())
    image_expert, text_expert = 2 * 4 * 64 + 4 + 64, 2 * 4 * 32 + 4 + 32
    image_router, text_router = 64 * 3, 32 * 3
    stored = 2 * (3 * image_expert + image_router) + 3 * text_expert + text_router
    assert learner.counts() == ParameterCounts(
        trained=stored + 2 * image_router + text_router,  # as much again for the noise
        stored=stored,
        active=2 * (2 * image_expert + image_router),
    )


def test_parameters_of_a_bundle_are_those_that_were_kept(backbone: Backbone) -> None:
    learner = MoeAdapter(backbone, ["a red"], settings_for("moe_adapter"), FrozenExperts())
    whole = random_experts(first_expert_block=1, num_experts=3, bottleneck=4)
    kept = TaskExperts(vision={2: whole.vision[2]}, text={}, top_k=2, scale=0.1)
    expert, router = 2 * 4 * 64 + 4 + 64, 64 * 3
    counts = learner.counts(kept)
    assert counts.trained == learner.counts().trained
    assert (counts.stored, counts.active) == (3 * expert + router, 2 * expert + router)


def test_parameters_of_the_baselines_are_counted_by_hand(backbone: Backbone) -> None:
    update = 4 * (64 + 256) * 2  # both linears of an MLP, rank 4
    text_update = 4 * (32 + 128) * 2
    lora = Lora(backbone, ["a red"], settings_for("lora"))
    total = 2 * update + 2 * text_update
    assert lora.counts() == ParameterCounts(trained=total, stored=total, active=2 * update)

    def block(width: int) -> int:
        return 12 * width**2 + 13 * width

    settings = settings_for("finetune", first_expert_block=2, first_text_block=1)
    after = 2 * 64 + 64 * 24 + 2 * 32 + 32 * 24  # norms and projections
    total = block(64) + block(32) + after
    finetune = Finetune(backbone, ["a red"], settings)
    assert finetune.counts() == ParameterCounts(trained=total, stored=total, active=0)


def test_what_no_bundle_can_hold_is_refused_before_training(
    backbone: Backbone, tmp_path: Path
) -> None:
    watch = Watch()
    with pytest.raises(DataError, match="bundle"):
        learn(
            backbone,
            pictures(BRIGHT, 5),
            replace(SETTINGS, relu=False),
            label=LABEL,
            folder=tmp_path / "run",
            watcher=watch,
        )
    assert watch.steps == 0
    assert not (tmp_path / "run").exists()


def test_only_moe_adapter_can_use_earlier_experts(backbone: Backbone) -> None:
    earlier = FrozenExperts(vision=random_experts().vision)
    with pytest.raises(DataError, match="lora cannot use experts"):
        make_learner(backbone, ["a red"], settings_for("lora"), earlier)


def test_the_same_budget_for_another_method_changes_its_learning_rate_only() -> None:
    for method in METHODS:
        other = SETTINGS.for_method(method)
        assert other == replace(SETTINGS, method=method, lr=LEARNING_RATES[method])


def test_experts_without_relu_learn_too(backbone: Backbone, tmp_path: Path) -> None:
    settings = settings_for("moe_adapter", relu=False)
    learner = trained(backbone, pictures(BRIGHT, 20), settings, tmp_path).learner
    assert accuracy(learner, pictures(BRIGHT, 10, seed=9)) > 0.9


def names_of(sets: Sequence[ImageSet]) -> list[str]:
    return [name for images in sets for name in images.class_names]


def test_a_learner_answers_among_classes_that_it_never_saw(
    backbone: Backbone, tmp_path: Path
) -> None:
    sets = [pictures(BRIGHT, 20), pictures(GREY, 4)]
    for method in METHODS:
        learner = trained(backbone, sets[0], settings_for(method), tmp_path).learner
        text_CE = learner.text_features_of(names_of(sets), ("a {}", "one {}"))
        assert text_CE.shape == (6, backbone.embed_dim)
        guess_N = (features(learner, sets[0]) @ text_CE[:3].T).argmax(1).numpy()
        assert np.mean(guess_N == sets[0].labels) > 0.8
