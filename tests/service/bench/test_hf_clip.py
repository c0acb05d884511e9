"""The exported folder against a forward pass written from transformers' names alone."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from medley.errors import BackboneError
from service.bench.hf_clip import write_hf_clip

ARCHITECTURE = "ViT-S-32-alt"  # the smallest plain ViT that open_clip has


@pytest.fixture(scope="module")
def model() -> CLIP:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = CLIP(**open_clip.get_model_config(ARCHITECTURE))
    with torch.no_grad():  # biases are zero in a new model, and would hide a mistake
        for parameter in made.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    return made.eval()


@pytest.fixture(scope="module")
def folder(model: CLIP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "model"
    write_hf_clip(ARCHITECTURE, model.state_dict(), path)
    return path


def test_the_same_numbers_give_the_same_image_features(model: CLIP, folder: Path) -> None:
    config, weights = read(folder)
    pixels_BCHW = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        expected_BE = model.encode_image(pixels_BCHW)
        found_BE = image_features(config["vision_config"], weights, pixels_BCHW)
    assert torch.allclose(found_BE, expected_BE, atol=1e-4)


def test_the_same_numbers_give_the_same_text_features(model: CLIP, folder: Path) -> None:
    config, weights = read(folder)
    ids_BL = open_clip.get_tokenizer(ARCHITECTURE)(["a cat", "two dogs in the snow"])
    with torch.inference_mode():
        expected_BE = model.encode_text(ids_BL)
        found_BE = text_features(config["text_config"], weights, ids_BL)
    assert torch.allclose(found_BE, expected_BE, atol=1e-4)


def test_nothing_is_left_out_and_nothing_is_written_twice(model: CLIP, folder: Path) -> None:
    _, weights = read(folder)
    assert sum(t.numel() for t in weights.values()) == sum(p.numel() for p in model.parameters())


def test_the_tokenizer_has_every_word_and_merge_that_open_clip_has(folder: Path) -> None:
    ours = open_clip.get_tokenizer(ARCHITECTURE)
    words = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert words["cat</w>"] == ours.encoder["cat</w>"]
    assert words["<|endoftext|>"] == ours.eot_token_id
    assert len(words) == ours.vocab_size
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert len(merges) == 1 + len(ours.bpe_ranks)


@pytest.mark.parametrize("architecture", ["ViT-B-16-SigLIP", "no such model"])
def test_what_has_no_such_form_is_refused(architecture: str, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="no form"):
        write_hf_clip(architecture, {}, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def read(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def image_features(
    config: dict[str, Any], weights: dict[str, Tensor], pixels_BCHW: Tensor
) -> Tensor:
    at = "vision_model.embeddings"
    kernel = weights[f"{at}.patch_embedding.weight"]
    patches_BLD = F.conv2d(pixels_BCHW, kernel, stride=config["patch_size"]).flatten(2).mT
    first_BLD = weights[f"{at}.class_embedding"].expand(len(pixels_BCHW), 1, -1)
    x_BLD = torch.cat([first_BLD, patches_BLD], 1) + weights[f"{at}.position_embedding.weight"]
    x_BLD = norm(weights, "vision_model.pre_layrnorm", x_BLD)
    x_BLD = encoder(config, weights, "vision_model", x_BLD, causal=False)
    x_BD = norm(weights, "vision_model.post_layernorm", x_BLD[:, 0])
    return x_BD @ weights["visual_projection.weight"].T


def text_features(config: dict[str, Any], weights: dict[str, Tensor], ids_BL: Tensor) -> Tensor:
    at = "text_model.embeddings"
    x_BLD = weights[f"{at}.token_embedding.weight"][ids_BL]
    x_BLD = x_BLD + weights[f"{at}.position_embedding.weight"]
    x_BLD = encoder(config, weights, "text_model", x_BLD, causal=True)
    x_BLD = norm(weights, "text_model.final_layer_norm", x_BLD)
    x_BD = x_BLD[torch.arange(len(ids_BL)), ids_BL.argmax(-1)]
    return x_BD @ weights["text_projection.weight"].T


def encoder(
    config: dict[str, Any], weights: dict[str, Tensor], tower: str, x_BLD: Tensor, *, causal: bool
) -> Tensor:
    assert config["hidden_act"] == "gelu"
    for number in range(config["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{number}"
        z_BLD = norm(weights, f"{layer}.layer_norm1", x_BLD)
        query, key, value = (
            linear(weights, f"{layer}.self_attn.{one}_proj", z_BLD)
            .unflatten(-1, (config["num_attention_heads"], -1))
            .transpose(1, 2)
            for one in "qkv"
        )
        mixed_BLD = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        mixed_BLD = mixed_BLD.transpose(1, 2).flatten(2)
        x_BLD = x_BLD + linear(weights, f"{layer}.self_attn.out_proj", mixed_BLD)
        z_BLD = norm(weights, f"{layer}.layer_norm2", x_BLD)
        hidden_BLH = F.gelu(linear(weights, f"{layer}.mlp.fc1", z_BLD))
        assert hidden_BLH.shape[-1] == config["intermediate_size"]
        x_BLD = x_BLD + linear(weights, f"{layer}.mlp.fc2", hidden_BLH)
    return x_BLD


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])
