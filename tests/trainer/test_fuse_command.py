"""`medley fuse` as people meet it: two tasks fused and measured, and one line for every mistake."""

import json
import shutil
from pathlib import Path

import pytest

from medley.bundle import read_bundle
from medley.unified import unified_of
from tests.models import tiny_backbone
from tests.trainer.test_commands import FAST, assert_one_line, medley
from tests.trainer.test_fuse import learnt
from tests.trainer.test_training import SETTINGS
from tests.trainer.tiny import folder_of, pictures
from trainer.commands import _settings
from trainer.fuse_command import _members
from trainer.options import Preset
from trainer.settings import LEARNING_RATES


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of lora on a backbone that no command loads, and one of experts."""
    folder = tmp_path_factory.mktemp("tiny")
    learnt(tiny_backbone(), folder, "warm")
    learnt(tiny_backbone(), folder, "cold", SETTINGS)
    return folder


def test_tasks_are_learnt_fused_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for task, colours in {"warm": ["red", "yellow"], "cold": ["green", "blue"]}.items():
        data = folder_of(pictures(colours, 10), tmp_path / task)
        train = ("train", data, "--task", task, "--out", run, "--method", "lora", *FAST)
        assert medley(monkeypatch, *train) == 0
    files = sorted(run.glob("*.safetensors"))
    assert [file.name[:5] for file in files] == ["cold-", "unifi", "unifi", "warm-"]
    assert medley(monkeypatch, "fuse", *files, "--out", tmp_path / "fused") == 0
    assert "elements kept" in capsys.readouterr().out
    fused = tmp_path / "fused"
    warm, cold = (next(fused.glob(f"{task}-*.safetensors")) for task in ("warm", "cold"))
    words = ("evaluate", "--bundle", warm, "--bundle", cold, "--data", f"warm={tmp_path / 'warm'}")
    assert medley(monkeypatch, *words, "--no-probe", "--out", tmp_path / "evaluation") == 0
    result = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert result["scores"][0]["told"] is not None


def test_a_folder_stands_for_the_bundles_in_it(tiny: Path) -> None:
    """Which a unified model is not: `fused/*.safetensors` has one among its files, too."""
    folder = tiny / "warm"
    by_folder, by_files = _members([folder]), _members(sorted(folder.glob("*.safetensors")))
    assert [member.name for member in by_folder] == ["warm@1"]
    assert [member.bundle.digest for member in by_files] == [by_folder[0].bundle.digest]
    assert by_files[0].unified is not None


def test_what_cannot_be_fused_is_one_line(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lora, experts = tiny / "warm" / "warm-1.safetensors", tiny / "cold" / "cold-1.safetensors"
    unified = unified_of(read_bundle(lora).manifest, lora.parent)
    assert unified is not None
    name = next(lora.parent.glob("unified-*")).name
    damaged = tmp_path / "damaged"
    shutil.copytree(lora.parent, damaged, ignore=shutil.ignore_patterns("warm-1"))
    data = bytearray((damaged / name).read_bytes())
    data[-1] ^= 1
    (damaged / name).write_bytes(data)
    lone = shutil.copy(lora, tmp_path / "lone.safetensors")
    for words, line in (
        ([lora], "was learnt on another backbone (tiny), not this"),
        ([experts], "cold@1 was learnt by moe_adapter, which has nothing to fuse"),
        ([lone], f"needs the unified model {unified.digest}, which is not here"),
        ([damaged], "the seal is broken"),
        ([lora.with_name(name)], "there is no bundle to fuse"),
        ([tmp_path / "nowhere.safetensors"], "cannot read nowhere.safetensors"),
    ):
        assert medley(monkeypatch, "fuse", *words, "--out", tmp_path / "out") == 2
        assert_one_line(capsys, line)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lora", "finetune"])
def test_settings_not_given_suit_the_method(method: str) -> None:
    for preset in Preset:
        settings = _settings(preset, method=method)
        assert settings.lr == LEARNING_RATES[settings.method]
    assert _settings(Preset.SMALL, method="lora").bottleneck == 64
    assert _settings(Preset.SMALL, method="lora", bottleneck=8, lr=0.5).bottleneck == 8
