"""The errors are the formula's, and no image or task changes another's by a bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.autoencoder_errors import Output, autoencoder_errors

OUTPUTS: tuple[Output, ...] = ("linear", "sigmoid")


def _weights(T: int, F: int, C: int, *, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(T, F, generator=g),
        torch.rand(T, F, generator=g) + 0.5,
        torch.randn(T, F, C, generator=g) / F**0.5,
        torch.randn(T, C, generator=g),
        torch.randn(T, C, F, generator=g) / C**0.5,
        torch.randn(T, F, generator=g),
    )


def _features(B: int, F: int, *, seed: int = 1) -> Tensor:
    return torch.randn(B, F, generator=torch.Generator().manual_seed(seed))


def _by_hand(x_F: Tensor, task: list[Tensor], output: Output) -> Tensor:
    """One image and one task in float64, one code and one output at a time."""
    mean, std, encoder, encoder_bias, decoder, decoder_bias = (w.double() for w in task)
    z = (x_F.double() - mean) / std
    code = [
        torch.clamp((z * encoder[:, c]).sum() + encoder_bias[c], min=0)
        for c in range(len(encoder_bias))
    ]
    decoded = decoder_bias.clone()
    for c, value in enumerate(code):
        decoded += value * decoder[c]
    if output == "sigmoid":
        decoded = 1 / (1 + (-decoded).exp())
    return ((decoded - z) ** 2).sum() / len(z)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(("B", "T", "F", "C"), [(4, 3, 32, 8), (7, 2, 41, 5), (1, 1, 1, 1)])
def test_errors_are_those_of_the_formula(B: int, T: int, F: int, C: int, output: Output) -> None:
    weights, x_BF = _weights(T, F, C), _features(B, F)
    expected = torch.stack(
        [
            torch.stack([_by_hand(x, [w[t] for w in weights], output) for t in range(T)])
            for x in x_BF
        ]
    )
    torch.testing.assert_close(autoencoder_errors(x_BF, *weights, output=output), expected.float())


def test_the_output_is_linear_unless_asked_otherwise() -> None:
    weights, x_BF = _weights(3, 32, 8), _features(4, 32)
    linear, sigmoid = (autoencoder_errors(x_BF, *weights, output=output) for output in OUTPUTS)
    assert torch.equal(autoencoder_errors(x_BF, *weights), linear)
    assert not torch.equal(linear, sigmoid)


def test_a_perfect_autoencoder_has_no_error() -> None:
    F = 6
    identity = torch.eye(F)
    both_signs_TFC = torch.cat([identity, -identity], 1)[None]
    weights = (
        torch.zeros(1, F),
        torch.ones(1, F),
        both_signs_TFC,
        torch.zeros(1, 2 * F),
        both_signs_TFC.mT,
        torch.zeros(1, F),
    )
    assert autoencoder_errors(_features(5, F), *weights).tolist() == [[0.0]] * 5


@settings(max_examples=30, deadline=None)
@given(
    B=st.integers(2, 40),
    F=st.sampled_from([31, 112, 224, 384]),
    seed=st.integers(0, 1000),
    output=st.sampled_from(OUTPUTS),
)
def test_neighbours_do_not_change_an_image_by_a_bit(
    B: int, F: int, seed: int, output: Output
) -> None:
    weights, x_BF = _weights(3, F, 16, seed=seed), _features(B, F, seed=seed + 1)
    alone = autoencoder_errors(x_BF, *weights, output=output)
    crowd_BF = x_BF * 100
    row = seed % B
    crowd_BF[row] = x_BF[row]
    assert torch.equal(autoencoder_errors(crowd_BF, *weights, output=output)[row], alone[row])


def test_neighbours_do_not_change_an_image_of_alexnets_width() -> None:
    F = 43_264
    weights, x_BF = _weights(1, F, 100), _features(4, F).sigmoid()
    crowd_BF = x_BF.roll(1, 1)
    crowd_BF[2] = x_BF[2]
    alone, crowd = (autoencoder_errors(x, *weights, output="sigmoid") for x in (x_BF, crowd_BF))
    assert torch.equal(alone[2], crowd[2])
    assert not torch.equal(alone[1], crowd[1])


@settings(max_examples=30, deadline=None)
@given(
    B=st.integers(1, 40),
    T=st.integers(1, 24),
    F=st.sampled_from([16, 41, 112, 224, 256, 768]),
    seed=st.integers(0, 1000),
    output=st.sampled_from(OUTPUTS),
)
def test_other_tasks_do_not_change_a_task_by_a_bit(
    B: int, T: int, F: int, seed: int, output: Output
) -> None:
    weights, x_BF = _weights(T, F, 32, seed=seed), _features(B, F, seed=seed + 1)
    together = autoencoder_errors(x_BF, *weights, output=output)
    for t in range(T):
        single = autoencoder_errors(x_BF, *(w[t : t + 1] for w in weights), output=output)
        assert torch.equal(single[:, 0], together[:, t])


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("B", [1, 2, 8, 32])
def test_other_tasks_do_not_change_a_task_with_any_number_of_threads(B: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weights, x_BF = _weights(11, 256, 32), _features(B, 256)
        together = autoencoder_errors(x_BF, *weights)
        some = autoencoder_errors(x_BF, *(w[3:6] for w in weights))
        alone = autoencoder_errors(x_BF, *(w[4:5].clone() for w in weights))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(some, together[:, 3:6])
    assert torch.equal(alone, together[:, 4:5])


@pytest.mark.parametrize(("B", "T"), [(0, 3), (4, 0), (0, 0)])
def test_nothing_in_gives_an_empty_table(B: int, T: int) -> None:
    assert autoencoder_errors(_features(B, 16), *_weights(T, 16, 4)).shape == (B, T)


def test_half_precision_features_give_float32_errors() -> None:
    weights, x_BF = _weights(2, 32, 8), _features(4, 32).half()
    errors = autoencoder_errors(x_BF, *weights)
    assert errors.dtype == torch.float32
    assert torch.equal(errors, autoencoder_errors(x_BF.float(), *weights))


@pytest.mark.parametrize("wrong", range(6))
def test_a_wrong_shape_is_refused(wrong: int) -> None:
    weights = list(_weights(2, 32, 8))
    weights[wrong] = weights[wrong][..., :-1]
    with pytest.raises(ValueError, match="has shape"):
        autoencoder_errors(_features(4, 32), *weights)


@pytest.mark.parametrize("wrong", range(6))
def test_weights_that_are_not_float32_are_refused(wrong: int) -> None:
    weights = list(_weights(2, 32, 8))
    weights[wrong] = weights[wrong].double()
    with pytest.raises(ValueError, match=r"is torch\.float64, expected torch\.float32"):
        autoencoder_errors(_features(4, 32), *weights)


@pytest.mark.parametrize("wrong", range(6))
def test_weights_on_another_device_are_refused(wrong: int) -> None:
    weights = list(_weights(2, 32, 8))
    weights[wrong] = weights[wrong].to("meta")
    with pytest.raises(ValueError, match="is on meta, the features on cpu"):
        autoencoder_errors(_features(4, 32), *weights)


def test_what_is_no_number_stays_in_its_image() -> None:
    weights, x_BF = _weights(3, 32, 8), _features(4, 32)
    clean = autoencoder_errors(x_BF, *weights)
    x_BF[1, 5] = float("nan")
    errors = autoencoder_errors(x_BF, *weights)
    assert torch.equal(errors[[0, 2, 3]], clean[[0, 2, 3]])
    assert errors[1].isnan().all()


def test_a_flat_encoder_is_refused() -> None:
    weights = list(_weights(2, 32, 8))
    weights[2] = weights[2][0]
    with pytest.raises(ValueError, match="encoder has shape"):
        autoencoder_errors(_features(4, 32), *weights)
