"""From class names and prompt templates to class text features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from medley.routed import ZERO_SHOT, RoutedModel

__all__ = ["DEFAULT_TEMPLATES", "class_text_features", "prompts"]

DEFAULT_TEMPLATES = ("a photo of a {}.",)


def prompts(class_names: Sequence[str], template: str) -> list[str]:
    """Put each class name in the template's one pair of braces."""
    return [template.replace("{}", name) for name in class_names]


@torch.inference_mode()
def class_text_features(
    model: RoutedModel,
    class_names: Sequence[str],
    templates: Sequence[str],
    path: int = ZERO_SHOT,
    *,
    chunk: int = 256,
) -> Tensor:
    """Average each class's normalised text features over the templates and normalise again.

    Args:
        model: the routed model.
        class_names: C names.
        templates: each with one "{}".
        path: whose text experts encode; ZERO_SHOT for the untouched tower.
        chunk: how many prompts are encoded at once.

    Returns:
        (C, E) float32, unit length.

    Source: CLIP, arXiv:2103.00020, section 3.1.4 (ensembling in embedding space).
    """
    total_CE = sum(
        F.normalize(_encode(model, prompts(class_names, template), path, chunk), dim=-1)
        for template in templates
    )
    assert isinstance(total_CE, Tensor)
    return F.normalize(total_CE, dim=-1)


def _encode(model: RoutedModel, texts: list[str], path: int, chunk: int) -> Tensor:
    tokens_NL = model.backbone.tokenize(texts)
    return torch.cat([model.encode_text(part, path).float() for part in tokens_NL.split(chunk)])
