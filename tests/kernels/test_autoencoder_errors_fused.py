"""The fused kernel, interpreted: the formula's errors, and every mutant of it is caught."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.autoencoder_errors import Output, autoencoder_errors
from kernels.autoencoder_errors.table import MAX_CODES, find
from tests.kernels.interpreter import Interpreter
from tests.kernels.scoring_cases import Edit, score
from tests.tolerances import SCORED, SCORED_ON_TENSOR_CORES

OUTPUTS: tuple[Output, ...] = ("linear", "sigmoid")


@dataclass(frozen=True)
class Problem:
    """Features and weights; every task is its own."""

    features_BF: Tensor
    weights: tuple[Tensor, ...]
    output: Output

    def expected(self) -> Tensor:
        """The formula in float64, an image and a task at a time."""
        mean, std, encoder, encoder_bias, decoder, decoder_bias = (w.double() for w in self.weights)
        errors_BT = torch.empty(len(self.features_BF), len(mean), dtype=torch.float64)
        for b, x_F in enumerate(self.features_BF.double()):
            for t in range(len(mean)):
                z_F = (x_F - mean[t]) / std[t]
                code_C = encoder_bias[t].clone()
                for f, z in enumerate(z_F):
                    code_C += z * encoder[t, f]
                decoded_F = decoder_bias[t] + (code_C.clamp(min=0)[:, None] * decoder[t]).sum(0)
                if self.output == "sigmoid":
                    decoded_F = 1 / (1 + (-decoded_F).exp())
                errors_BT[b, t] = ((decoded_F - z_F) ** 2).mean()
        return errors_BT


def problem(
    B: int,
    T: int,
    F: int,
    C: int,
    *,
    output: Output = "linear",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    g = torch.Generator().manual_seed(seed)
    weights = (
        torch.randn(T, F, generator=g) * 2,
        torch.rand(T, F, generator=g) + 0.5,
        torch.randn(T, F, C, generator=g) / F**0.5,
        torch.randn(T, C, generator=g),
        torch.randn(T, C, F, generator=g) / C**0.5,
        torch.randn(T, F, generator=g),
    )
    return Problem(torch.randn(B, F, generator=g).to(dtype), weights, output)


def run(interpreter: Interpreter, p: Problem, *edits: Edit) -> Tensor:
    return interpreter.call(score, p.features_BF, p.weights, p.output, edits=edits)


def assert_right(errors_BT: Tensor, p: Problem) -> None:
    torch.testing.assert_close(errors_BT.double(), p.expected(), rtol=SCORED, atol=0)


SHAPES = [
    (1, 1, 1, 1),
    (4, 3, 32, 8),
    (7, 2, 41, 5),  # nothing is a multiple of anything
    (17, 3, 65, 33),  # one more than a tile, a step, a power of two
    (16, 1, 128, 16),
    (65, 2, 48, 20),
    (130, 1, 33, 3),
    (3, 2, 70, 100),  # the paper's codes
    (20, 2, 40, 128),
    (2, 40, 16, 4),  # more tasks than images
]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_are_those_of_the_formula(
    interpreter: Interpreter, shape: tuple[int, int, int, int], output: Output
) -> None:
    p = problem(*shape, output=output)
    assert_right(run(interpreter, p), p)


@pytest.mark.parametrize("width", [256, 768, 1024])
def test_errors_at_the_widths_that_are_served(interpreter: Interpreter, width: int) -> None:
    p = problem(2, 3, width, 32)
    assert_right(run(interpreter, p), p)


@pytest.mark.slow
def test_errors_at_alexnets_width(interpreter: Interpreter) -> None:
    p = problem(2, 1, 43_264, 100, output="sigmoid")
    # A sum of 676 steps of 64: twice the drift of one at the widths that are served.
    torch.testing.assert_close(run(interpreter, p).double(), p.expected(), rtol=2 * SCORED, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_features_of_any_dtype_are_read_as_float32(
    interpreter: Interpreter, dtype: torch.dtype
) -> None:
    p = problem(5, 2, 41, 7, dtype=dtype)
    assert_right(run(interpreter, p), p)


@pytest.mark.parametrize(("B", "T"), [(0, 3), (4, 0), (0, 0)])
def test_nothing_in_gives_an_empty_table(interpreter: Interpreter, B: int, T: int) -> None:
    assert run(interpreter, problem(B, T, 16, 4)).shape == (B, T)


def test_neighbours_do_not_change_an_image_by_a_bit(interpreter: Interpreter) -> None:
    p = problem(33, 2, 41, 5)
    crowd_BF = p.features_BF * 100
    crowd_BF[20] = p.features_BF[20]
    crowd = run(interpreter, Problem(crowd_BF, p.weights, p.output))
    assert torch.equal(crowd[20], run(interpreter, p)[20])


def test_other_tasks_do_not_change_a_task_by_a_bit(interpreter: Interpreter) -> None:
    p = problem(20, 3, 41, 5)
    together = run(interpreter, p)
    for t in range(3):
        weights = tuple(w[t : t + 1] for w in p.weights)
        assert torch.equal(
            run(interpreter, Problem(p.features_BF, weights, p.output))[:, 0], together[:, t]
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("output", OUTPUTS)
def test_what_is_no_number_stays_in_its_image(
    interpreter: Interpreter, output: Output, value: float
) -> None:
    p = problem(18, 2, 41, 5, output=output)
    clean = run(interpreter, p)
    p.features_BF[3, 7] = value
    errors = run(interpreter, p)
    others = torch.arange(18) != 3
    assert torch.equal(errors[others], clean[others])
    assert not errors[3].isfinite().any()


def test_a_device_is_traced_by_shapes_alone() -> None:
    with FakeTensorMode():
        p = problem(4, 3, 16, 2, dtype=torch.bfloat16)
        errors = autoencoder_errors(p.features_BF.cuda(), *(w.cuda() for w in p.weights))
        assert (errors.shape, errors.dtype, errors.device.type) == ((4, 3), torch.float32, "cuda")


def test_a_device_refuses_weights_that_are_not_contiguous() -> None:
    with FakeTensorMode():
        p = problem(4, 3, 16, 2)
        mean, std, encoder, *rest = (w.cuda() for w in p.weights)
        with pytest.raises(ValueError, match="encoder is not contiguous"):
            autoencoder_errors(p.features_BF.cuda(), mean, std, encoder.mT.contiguous().mT, *rest)


def test_codes_too_wide_for_the_kernel_are_scored_by_the_definition() -> None:
    with pytest.raises(ValueError, match="129 codes are more than 128"):
        find(1, MAX_CODES + 1)
    with FakeTensorMode():
        p = problem(4, 3, 16, MAX_CODES + 1)
        errors = autoencoder_errors(p.features_BF.cuda(), *(w.cuda() for w in p.weights))
        assert (errors.shape, errors.device.type) == ((4, 3), "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shape", [*SHAPES, (8, 10, 768, 32), (256, 12, 768, 100)])
def test_a_device_agrees_with_the_formula(shape: tuple[int, int, int, int]) -> None:
    p = problem(*shape, output="sigmoid")
    errors = autoencoder_errors(
        p.features_BF.cuda(), *(w.cuda() for w in p.weights), output="sigmoid"
    )
    torch.testing.assert_close(
        errors.cpu().double(), p.expected(), rtol=SCORED_ON_TENSOR_CORES, atol=0
    )


MUTANTS: dict[str, Edit] = {
    "no sigmoid": ("if SIGMOID:", "if False:"),
    "always a sigmoid": ("if SIGMOID:", "if True:"),
    "mean not subtracted": ("(x_MN - mean_N[None, :]) /", "x_MN /"),
    "multiplied by std": (") / std_N[None, :]", ") * std_N[None, :]"),
    "mean of the first task": ("mean_ptr += task * F", "mean_ptr += 0"),
    "decoder of the first task": ("decoder_ptr += task * F * C", "decoder_ptr += 0"),
    "rows of another tile": ("row_M = program % tiles *", "row_M = program // tiles *"),
    "no ReLU": (
        "tl.maximum(code_MC + bias_C[None, :], 0.0, propagate_nan=tl.PropagateNan.ALL)",
        "code_MC + bias_C[None, :]",
    ),
    "encoder bias dropped": ("code_MC + bias_C[None, :]", "code_MC"),
    "decoder bias dropped": ("decoded_MN += bias_N[None, :]", "decoded_MN += 0.0"),
    "only the last step's code": (
        "code_MC = tl.dot(z_MN, encoder_NC, code_MC,",
        "code_MC = tl.dot(z_MN, encoder_NC,",
    ),
    "only the last step's error": ("error_M += tl.sum(", "error_M = tl.sum("),
    "absolute differences": ("tl.sum(apart_MN * apart_MN,", "tl.sum(tl.abs(apart_MN),"),
    "F tail counted": (
        "apart_MN = tl.where((n_N < F)[None, :], apart_MN, 0.0)",
        "apart_MN = apart_MN",
    ),
    "F tail of the features unmasked": ("within_N = n_N < F", "within_N = n_N >= 0"),
    "F tail of the encoder unmasked": (
        "mask=(n_N < F)[:, None] & within_C[None, :]",
        "mask=within_C[None, :]",
    ),
    "C padding of the decoder unmasked": (
        "mask=within_C[:, None] & (n_N < F)[None, :]",
        "mask=(n_N < F)[None, :]",
    ),
    "C padding unmasked": ("within_C = c_C < C", "within_C = c_C >= 0"),
    "mean over the padded features": ("error_M / F", "error_M / (tl.cdiv(F, BLOCK_N) * BLOCK_N)"),
    "errors of images that are not there": ("mask=row_M < B)", "mask=row_M >= 0)"),
    "errors transposed": ("row_M.to(tl.int64) * T + task", "row_M.to(tl.int64) + task * B"),
    "a NaN hidden by the ReLU and the sigmoid": (
        "apart_MN = tl.where((n_N < F)[None, :], apart_MN, 0.0)",
        "apart_MN = tl.where((n_N < F)[None, :] & (apart_MN == apart_MN), apart_MN, 0.0)",
    ),
}


def caught(interpreter: Interpreter, edit: Edit) -> bool:
    for output in OUTPUTS:
        p = problem(19, 3, 69, 21, output=output)
        sick = problem(2, 1, 16, 2, output=output)
        sick.features_BF[1, 3] = float("nan")
        try:
            assert_right(run(interpreter, p, edit), p)
            assert run(interpreter, sick, edit)[1].isnan().all()
        except (AssertionError, IndexError):
            return True
    return False


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_the_kernel_is_caught(interpreter: Interpreter, name: str) -> None:
    assert caught(interpreter, MUTANTS[name])


def test_the_kernel_itself_is_not_caught(interpreter: Interpreter) -> None:
    assert not caught(interpreter, ("if SIGMOID:", "if SIGMOID == True:"))
