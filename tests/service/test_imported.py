"""A server takes an imported task whose selector looks at AlexNet if it was given AlexNet."""

from pathlib import Path

import pytest
import torch

from medley.backbone import Backbone
from medley.errors import BackboneError
from medley.extractor import load_alexnet
from tests.models import tiny_backbone
from tests.service.conftest import OpenApp
from tests.service.routes.test_classify import classify
from tests.service.versions.test_tasks import put
from tests.trainer.imports import authors
from trainer.imports.autochooser import read_autochooser
from trainer.imports.bundles import Source, write_bundles
from trainer.imports.checkpoint import read_checkpoint
from trainer.imports.tasks import TaskText


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """The tiny backbone with the activation that imported checkpoints have."""
    return tiny_backbone(quick_gelu=True)


@pytest.fixture(scope="module")
def folder(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imported task that knows every picture, and AlexNet's weights."""
    folder = tmp_path_factory.mktemp("imported")
    authors.alexnet(folder / "alexnet.pth")
    extractor = load_alexnet(folder / "alexnet.pth")
    path = authors.autochooser(folder / "chooser.pth", [torch.full((256,), b) for b in (5.0, 0.0)])
    authors.checkpoint(folder / "pets.pth", backbone, tasks=1, learnt=1)
    source = Source(
        checkpoint=read_checkpoint(folder / "pets.pth"),
        tasks=[TaskText(task="pets", class_names=("cat", "dog"), templates=("a {}",))],
        autochooser=read_autochooser(path, tasks=1, width=256),
    )
    assert len(list(write_bundles(source, backbone, folder, extractors=[extractor]))) == 1
    return folder


def test_with_alexnet_the_task_answers_and_is_there_again_after_a_restart(
    folder: Path, open_app: OpenApp, image: bytes
) -> None:
    data = (folder / "pets-1.safetensors").read_bytes()
    settings = {"alexnet_weights": folder / "alexnet.pth"}
    with open_app(**settings) as http:
        assert put(http, data).status_code == 201
        (before,) = classify(http, image, labels=None).json()["results"]
        assert before["path"]["task"] == "pets"
    with open_app(**settings) as http:
        (after,) = classify(http, image, labels=None).json()["results"]
        assert after == before


def test_without_alexnet_the_task_is_refused_and_the_reason_is_said(
    folder: Path, open_app: OpenApp
) -> None:
    with open_app() as http:
        refused = put(http, (folder / "pets-1.safetensors").read_bytes())
        assert (refused.status_code, refused.json()["code"]) == (422, "wrong_backbone")
        assert "alexnet:conv5, whose network is not loaded here" in refused.text
        assert http.get("/v1/tasks").json()["tasks"] == []


def test_alexnet_that_cannot_be_loaded_stops_the_server_before_it_starts(
    open_app: OpenApp, tmp_path: Path
) -> None:
    with (
        pytest.raises(BackboneError, match=r"none.pth cannot be read"),
        open_app(alexnet_weights=tmp_path / "none.pth"),
    ):
        pass
