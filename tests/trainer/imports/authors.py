"""Files as the authors of MoE-Adapters4CL write them, with random numbers in them.

Legend: E experts, R bottleneck, D width, F feature width, C code width.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import AlexNet

from medley.backbone import Backbone


def alexnet(path: Path, *, gain: float = 1.0) -> dict[str, Tensor]:
    """Save AlexNet's convolutions under torchvision's names; `gain` makes features differ more."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = AlexNet(num_classes=1).features
    tensors = {f"features.{n}": t.detach() * gain for n, t in layers.state_dict().items()}
    torch.save(tensors, path)
    return tensors


def autochooser(path: Path, biases_NF: Sequence[Tensor], *, code_size: int = 100) -> Path:
    """Save autoencoders whose output lies around the sigmoid of their decoder's bias."""
    random = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for number, bias_F in enumerate(biases_NF):
        F, C = len(bias_F), code_size
        tensors |= {
            f"{number}.encoder.0.weight": torch.randn(C, F, generator=random) / F,
            f"{number}.encoder.0.bias": torch.randn(C, generator=random) * 0.1,
            f"{number}.decoder.0.weight": torch.randn(F, C, generator=random) * 0.05,
            f"{number}.decoder.0.bias": bias_F,
        }
    torch.save({"state_dict": tensors}, path)
    return path


def checkpoint(
    path: Path, backbone: Backbone, *, tasks: int, learnt: int, E: int = 4, R: int = 64
) -> Path:
    """Save a backbone with random experts, and routers of which the first `learnt` are trained."""
    random = torch.Generator().manual_seed(2)
    assert backbone.text is not None
    state: dict[str, Tensor] = dict(backbone.model.state_dict())
    for prefix, tower in (("visual.transformer", backbone.image), ("transformer", backbone.text)):
        D = tower.width
        for block in range(len(tower.blocks)):
            place = f"{prefix}.resblocks.{block}"
            state |= {f"{place}.ln_3.weight": torch.ones(D), f"{place}.ln_3.bias": torch.zeros(D)}
            state |= {f"{place}.mean": torch.zeros(1), f"{place}.std": torch.ones(1)}
            for expert in range(E):
                for name, shape in (("down_proj", (R, D)), ("up_proj", (D, R))):
                    linear = f"{place}.adaptmlp_list.{expert}.{name}"
                    state[f"{linear}.weight"] = torch.randn(shape, generator=random) * 0.1
                    state[f"{linear}.bias"] = torch.randn(shape[0], generator=random) * 0.1
            for task in range(tasks):
                router_DE = torch.randn(D, E, generator=random) if task < learnt else None
                state[f"{place}.router_list.{task}"] = (
                    torch.zeros(D, E) if router_DE is None else router_DE
                )
                state[f"{place}.w_noise_list.{task}"] = torch.zeros(D, E)
    torch.save({"state_dict": state}, path)
    return path
