"""A trained model to the embedded weights: float16 safetensors of at most 25 MB."""

from __future__ import annotations

from pathlib import Path

import torch
from open_clip.model import CLIP
from safetensors.torch import save_file

from medley.errors import DataError
from trainer.pretrain.files import write_whole

MOST_BYTES = 25_000_000


def export(model: CLIP, path: Path, *, recipe: str) -> None:
    """Write the weights; ``recipe`` is the digest of the configuration that made them.

    Raises:
        DataError: a value is not finite in float16, or the file would be too large.
    """
    tensors = {
        name: tensor.half().contiguous()
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")  # never read in evaluation
    }
    damaged = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if damaged:
        raise DataError(f"not finite in float16: {', '.join(damaged)}", code="weights")
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    if size_bytes > MOST_BYTES:
        raise DataError(f"{size_bytes} bytes of weights, at most {MOST_BYTES}", code="weights")
    metadata = {"format": "pt", "model": "medley-mini", "recipe": recipe}

    def write(scratch: Path) -> None:
        save_file(tensors, scratch, metadata=metadata)
        scratch.chmod(0o644)  # safetensors lets only the owner read

    write_whole(path, write)
