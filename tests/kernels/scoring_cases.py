"""What the interpreter's process does for tests of the autoencoder kernel.

Whatever the kernel reads lies between numbers that are none, and so does what it writes: what it
reads or writes outside of its tensors shows.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import torch
from torch import Tensor

from kernels.autoencoder_errors.table import Launch
from kernels.launching import Call
from kernels.problems import Scoring

__all__ = ["Edit", "IdleScoring", "score"]

Edit = tuple[str, str]  # what the source of the kernel says, and what it shall say instead

_FOLDERS: list[TemporaryDirectory[str]] = []  # the interpreter reads a kernel's source as it runs
_MARGIN = 2**16  # numbers; more than a tile of any test reaches over


@dataclass(frozen=True, kw_only=True)
class IdleScoring(Scoring):
    """A launch of no programs."""

    def call(self, launch: Launch | None = None) -> Call:
        """Prepare it."""
        return replace(super().call(launch), grid=(0,))


def score(
    features_BF: Tensor, weights: Sequence[Tensor], output: str, *, edits: tuple[Edit, ...] = ()
) -> Tensor:
    """Run the kernel, or what some edits make of it, in this process.

    Raises:
        IndexError: it wrote outside of its errors.
    """
    B, T = len(features_BF), len(weights[0])
    memory = torch.full((B * T + 2 * _MARGIN,), torch.nan)
    errors_BT = memory[_MARGIN : _MARGIN + B * T].view(B, T)
    inputs = [_amid_nan(t) for t in (features_BF, *weights)]
    _fused(edits).prepare(errors_BT, *inputs, output=output).run()
    if not (memory[:_MARGIN].isnan().all() and memory[-_MARGIN:].isnan().all()):
        raise IndexError("the kernel wrote outside of its errors")
    return errors_BT.clone()


def _amid_nan(tensor: Tensor) -> Tensor:
    memory = torch.full((tensor.numel() + 2 * _MARGIN,), torch.nan, dtype=tensor.dtype)
    inside = memory[_MARGIN : _MARGIN + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor)


@cache
def _fused(edits: tuple[Edit, ...]) -> ModuleType:
    from kernels.autoencoder_errors import fused

    if not edits:
        return fused
    source = Path(fused.__file__).read_text()
    for old, new in edits:
        if source.count(old) != 1:
            raise ValueError(f"{old!r} is {source.count(old)} times in the kernel, expected once")
        source = source.replace(old, new)
    return _imported(source)


def _imported(source: str) -> ModuleType:
    folder = TemporaryDirectory()
    file = Path(folder.name, f"mutant_{len(_FOLDERS)}.py")
    file.write_text(source)
    _FOLDERS.append(folder)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if not (spec and spec.loader):
        raise ImportError(str(file))
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
