from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.transform import image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file

from medley.errors import BackboneError
from medley.mini import (
    MINI_PREPROCESS,
    WEIGHTS,
    Mixer,
    Stem,
    build_mini,
    load_mini,
    mini_tokenizer,
    stack_levels,
)


def test_stem_has_the_contract_of_conv1() -> None:
    assert Stem(256)(torch.zeros(2, 3, 128, 128)).shape == (2, 256, 8, 8)


def test_stem_is_its_levels_stacked_and_mixed() -> None:
    stem = Stem(256)
    pixels = torch.rand(1, 3, 128, 128)
    fine, coarse = stem.levels(pixels)
    stacked = stack_levels(fine, coarse)
    assert torch.equal(stacked[:, :112], fine)
    assert torch.equal(stacked[:, 112:, 1::2, ::2], coarse)
    assert torch.equal(stem(pixels), stem.mix(stacked))


def test_mixer_standardises_by_its_frozen_statistics() -> None:
    mixer = Mixer(8)
    sample = 5 + 3 * torch.randn(16, 432, 4, 4)
    plain = mixer.proj((sample - 5) / 3)
    mixer.mean.fill_(5)
    mixer.std.fill_(3)
    torch.testing.assert_close(mixer(sample), plain)


def test_training_changes_neither_the_trunk_nor_its_statistics() -> None:
    model = build_mini(patch_dropout=0.5).train()
    trunk = model.visual.conv1.trunk
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    model.visual(torch.rand(2, 3, 128, 128)).sum().backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in trunk.state_dict().items())
    assert all(parameter.grad is None for parameter in trunk.parameters())
    assert model.visual.conv1.mix.proj.weight.grad is not None


def test_vocabulary_is_the_models() -> None:
    assert len(mini_tokenizer().encoder) == build_mini().vocab_size


@given(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=12))
def test_any_word_survives_the_tokenizer(word: str) -> None:
    tokenizer = mini_tokenizer()
    assert tokenizer.decode(tokenizer.encode(word)).replace(" ", "") == word.lower()


def test_long_text_is_cut_and_still_ends() -> None:
    tokenizer = mini_tokenizer()
    tokens = tokenizer(["a very long text " * 20])
    assert tokens.shape == (1, 24)
    assert tokens[0, -1] == tokenizer.eot_token_id


def test_preprocessing_gives_what_the_stem_takes() -> None:
    transform = image_transform_v2(MINI_PREPROCESS, is_train=False)
    pixels = transform(Image.new("RGB", (300, 200), "white"))
    torch.testing.assert_close(pixels, torch.ones(3, 128, 128))


def test_embedded_weights_are_small_float16_and_finite() -> None:
    assert WEIGHTS.stat().st_size <= 25_000_000
    for name, tensor in load_file(WEIGHTS).items():
        assert tensor.dtype == torch.float16, name
        assert torch.isfinite(tensor).all(), name


def test_loading_twice_gives_the_same_finite_features() -> None:
    pixels, tokens = torch.rand(2, 3, 128, 128), mini_tokenizer()(["a cat", "a truck"])
    first, second = load_mini(), load_mini()
    with torch.inference_mode():
        assert not first.training
        assert torch.isfinite(first.encode_image(pixels)).all()
        assert torch.equal(first.encode_image(pixels), second.encode_image(pixels))
        assert torch.equal(first.encode_text(tokens), second.encode_text(tokens))


def test_shipped_text_tower_knows_what_words_mean() -> None:
    model = load_mini()
    with torch.inference_mode():
        wolf, hound, spanner = model.encode_text(
            mini_tokenizer()(["wolf", "an icon of a dog", "wrench"]), normalize=True
        )
    assert wolf @ hound > wolf @ spanner + 0.1


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="nothing-here"):
        load_mini(tmp_path / "nothing-here.safetensors")


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"logit_scale": torch.zeros(())}, path)
    with pytest.raises(BackboneError, match="does not hold medley-mini"):
        load_mini(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(BackboneError, match="does not hold medley-mini"):
        load_mini(path)
