"""An open_clip ViT written as a folder that `transformers` reads as a CLIPModel.

The same numbers under other names, so that a server which knows only that format computes the same
embeddings. Only plain ViTs with GELU; preprocessing is open_clip's usual (shortest side, centre
crop, bicubic). Names checked against transformers 4.57, `models/clip/modeling_clip.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from torch import Tensor

from medley.errors import BackboneError

__all__ = ["write_hf_clip"]

_TOP = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # transformers' own spelling
    "visual.ln_post": "vision_model.post_layernorm",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "logit_scale": "logit_scale",
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TOWERS = {"visual.transformer.resblocks.": "vision_model", "transformer.resblocks.": "text_model"}


def write_hf_clip(architecture: str, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write config, weights, tokenizer and preprocessing of a model into a new folder.

    Args:
        architecture: open_clip's name of it, such as "ViT-B-32".
        state: its weights under open_clip's names.
        folder: where to.

    Raises:
        BackboneError: not a plain ViT with a plain text tower.
    """
    config = open_clip.get_model_config(architecture)
    if config is None or "timm_model_name" in config["vision_cfg"] or "custom_text" in config:
        raise BackboneError(f"{architecture} is not a plain ViT, so it has no form as a CLIPModel")
    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        tensors |= _renamed(name, tensor)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "model.safetensors")
    _write_json(folder / "config.json", _config(config))
    _write_json(folder / "preprocessor_config.json", _preprocessor(config))
    _write_tokenizer(folder, config["text_cfg"]["context_length"])


def _renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor of ours as one or three of theirs."""
    if name == "visual.proj":
        return {"visual_projection.weight": tensor.T}
    if name == "text_projection":
        return {"text_projection.weight": tensor.T}
    for prefix, tower in _TOWERS.items():
        if name.startswith(prefix):
            number, _, part = name.removeprefix(prefix).partition(".")
            return _block(f"{tower}.encoder.layers.{number}", part, tensor)
    head, _, last = name.rpartition(".")
    return {_TOP[name] if name in _TOP else f"{_TOP[head]}.{last}": tensor}


def _block(layer: str, part: str, tensor: Tensor) -> dict[str, Tensor]:
    head, _, last = part.rpartition(".")
    if head == "attn":  # in_proj_weight, in_proj_bias: query, key and value in one
        kind = last.removeprefix("in_proj_")
        return {
            f"{layer}.self_attn.{one}_proj.{kind}": third
            for one, third in zip("qkv", tensor.chunk(3), strict=True)
        }
    return {f"{layer}.{_BLOCK[head]}.{last}": tensor}


def _config(config: Mapping[str, Any]) -> dict[str, Any]:
    vision, text = config["vision_cfg"], config["text_cfg"]
    common = {"hidden_act": "gelu", "projection_dim": config["embed_dim"]}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config["embed_dim"],
        "vision_config": common
        | _tower(vision, heads=vision["width"] // vision.get("head_width", 64))
        | {"image_size": vision["image_size"], "patch_size": vision["patch_size"]},
        "text_config": common
        | _tower(text, heads=text["heads"])
        | {
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
        },
    }


def _tower(tower: Mapping[str, Any], *, heads: int) -> dict[str, Any]:
    width = tower["width"]
    return {
        "hidden_size": width,
        "intermediate_size": int(width * tower.get("mlp_ratio", 4)),
        "num_hidden_layers": tower["layers"],
        "num_attention_heads": heads,
    }


def _preprocessor(config: Mapping[str, Any]) -> dict[str, Any]:
    size = config["vision_cfg"]["image_size"]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "resample": 3,  # bicubic
        "image_mean": list(open_clip.OPENAI_DATASET_MEAN),
        "image_std": list(open_clip.OPENAI_DATASET_STD),
    }


def _write_tokenizer(folder: Path, context_length: int) -> None:
    tokenizer = SimpleTokenizer(context_length=context_length)
    start, end = "<|startoftext|>", "<|endoftext|>"
    words = {
        start if word == "<start_of_text>" else end if word == "<end_of_text>" else word: number
        for word, number in tokenizer.encoder.items()
    }
    _write_json(folder / "vocab.json", words)
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.bpe_ranks)]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": context_length,
            "bos_token": start,
            "eos_token": end,
            "unk_token": end,
            "pad_token": end,
        },
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
