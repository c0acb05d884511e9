"""The file of MoE-Adapters4CL's selector: one autoencoder for each task, and one for none of them.

Number 0 is the reference, learnt on TinyImageNet; number t + 1 belongs to task t. Those of tasks
not learnt yet are in the file too, untrained.

Legend: F feature width, C code width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from medley.errors import BundleError
from medley.extractor import ALEXNET_CONV5
from medley.levels import AutoencoderLevel
from medley.selector import STRICTLY_LESS, TaskSelector
from medley.state_dict import read_state_dict

__all__ = ["THRESHOLD", "Autochooser", "read_autochooser"]

THRESHOLD = 0.0655  # of the full-shot checkpoints; the few-shot ones were tested with 0.06


@dataclass(frozen=True, eq=False)
class Autochooser:
    """The reference and the level of each task, all on AlexNet's features."""

    reference: AutoencoderLevel
    levels: tuple[AutoencoderLevel, ...]

    def selector(self, task: int, *, threshold: float = THRESHOLD) -> TaskSelector:
        """Return the authors' rule for one task, applied to each image instead of to a batch.

        The image is the task's if its error is less than the reference's and at most `threshold`.
        """
        return TaskSelector(
            levels=(self.levels[task],),
            threshold=math.log(threshold),
            alpha=None,
            reference=(self.reference,),
            margin=STRICTLY_LESS,
        )


def read_autochooser(path: Path, *, tasks: int, width: int) -> Autochooser:
    """Read the autoencoders of the first `tasks` tasks and the reference.

    Args:
        path: `{"state_dict": ...}` with `<number>.encoder.0` and `<number>.decoder.0`.
        tasks: how many.
        width: F of AlexNet's feature at the backbone's image size.

    Raises:
        BackboneError: with code `weights`: see `read_state_dict`.
        BundleError: with code `checkpoint`: an autoencoder is missing or has another shape.
    """
    tensors = read_state_dict(path)
    found = len({name.partition(".")[0] for name in tensors})
    if found < tasks + 1:
        raise BundleError(
            [f"{path.name}: {found} autoencoders, {tasks} tasks and a reference need {tasks + 1}"],
            code="checkpoint",
        )
    reference, *levels = [_level(tensors, n, width, path.name) for n in range(tasks + 1)]
    return Autochooser(reference, tuple(levels))


def _level(tensors: Mapping[str, Tensor], number: int, F: int, file: str) -> AutoencoderLevel:
    def take(name: str, *shape: int) -> Tensor:
        tensor = tensors.get(f"{number}.{name}")
        found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
        if tensor is None or tensor.shape != shape:
            problem = f"{file}: {number}.{name} {found}, expected {shape}"
            raise BundleError([problem], code="checkpoint")
        return tensor

    bias = tensors.get(f"{number}.encoder.0.bias")
    C = 1 if bias is None else bias.numel()
    return AutoencoderLevel(
        feature=ALEXNET_CONV5,
        center=0.0,
        spread=1.0,
        mean_F=torch.zeros(F),
        std_F=torch.ones(F),
        encoder_FC=take("encoder.0.weight", C, F).T.contiguous(),
        encoder_bias_C=take("encoder.0.bias", C),
        decoder_CF=take("decoder.0.weight", F, C).T.contiguous(),
        decoder_bias_F=take("decoder.0.bias", F),
        output="sigmoid",
    )
