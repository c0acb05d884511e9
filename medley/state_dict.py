"""A file of tensors by name that somebody else wrote: read, never executed.

Not a bundle (`medley/bundle.py`) and not our own weights: a PyTorch state dict or safetensors, of
which nothing is believed but that it holds tensors.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from medley.errors import BackboneError

__all__ = ["read_state_dict"]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a `.safetensors` file, or of what `torch.save` wrote, onto the CPU.

    A state dict may lie under the key "state_dict", and its names may begin with "module.", as a
    model in `DataParallel` saves them; both are taken away.

    Raises:
        BackboneError: with code `weights`: no such file, cut short, or it holds anything that is
            not a tensor (such a file could run code when it is loaded, so it is not loaded).
    """
    try:
        loaded: Any = _load(path)
    except OSError as error:
        raise _refused(path, f"cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise _refused(path, "holds something else than tensors, or is damaged") from error
    except (RuntimeError, EOFError, ValueError, KeyError, SafetensorError) as error:
        raise _refused(path, "is damaged, cut short or no state dict") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not loaded:
        raise _refused(path, "is no state dict")
    if strangers := [name for name, value in loaded.items() if not _is_plain(value)]:
        raise _refused(path, f"holds something else than tensors: {strangers[0]!r:.80}")
    return _without_module(loaded)


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor whose numbers are all there: not sparse, quantised or on "meta"."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_quantized
        and value.device.type == "cpu"
    )


def _without_module(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wrapped = all(name.startswith("module.") for name in tensors)
    return {name.removeprefix("module.") if wrapped else name: t for name, t in tensors.items()}


def _refused(path: Path, why: str) -> BackboneError:
    return BackboneError(f"{path.name} {why}", code="weights")
