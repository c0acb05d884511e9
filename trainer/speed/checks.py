"""Every kernel against float64 at the real shapes, on the device that is about to be timed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from kernels.autoencoder_errors import autoencoder_errors
from kernels.expert_mixing import expert_mixing
from medley.journal import Conditions, Journal, Measurement
from trainer.speed.baselines import oracle
from trainer.speed.baselines.oracle import relative_error
from trainer.speed.block import Block, Shape, make_block
from trainer.speed.low_rank import check_low_rank
from trainer.speed.norm import EPS, random_norm, within
from trainer.speed.timing import reason

__all__ = ["LIMITS", "check_kernels", "right"]

BATCH, MIXES = 8, ("11 tasks", "half null")
# Relative, of whole results: two products summed in float32, inputs and hidden units in the dtype.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
TASKS, WIDTH, CODE = 64, 768, 32  # of the autoencoders


def check_kernels(
    journal: Journal,
    device: torch.device,
    shapes: tuple[Shape, ...],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Write a line for each kernel, shape, dtype and mix: its error, or what it failed of."""
    for dtype, shape, mix in product(dtypes, shapes, MIXES):
        block = make_block(shape, batch=BATCH, mix=mix, dtype=dtype, device=device, seed=7)
        name = str(dtype).removeprefix("torch.")
        at: Conditions = {"shape": shape.name, "dtype": name, "batch": BATCH, "mix": mix}
        _write(journal, at, _mixing(block), LIMITS[dtype])
        _write_errors(journal, at, check_low_rank(shape, BATCH, mix, dtype, device), LIMITS[dtype])
    at = {"shape": f"feature {WIDTH}", "dtype": "float32", "batch": BATCH, "mix": f"{TASKS} tasks"}
    _write(journal, at, _autoencoders(device), LIMITS[torch.float32])


def right(line: Measurement) -> bool:
    """Whether an error is within its limit; what failed is not right."""
    return line.failure is None and line.values["error"] <= line.values["limit"]


def _write(
    journal: Journal,
    at: Conditions,
    results: Iterator[tuple[str, Tensor, Tensor]],
    limit: float,
) -> None:
    errors = ((name, relative_error(got, exact)) for name, got, exact in results)
    _write_errors(journal, at, errors, limit)


def _write_errors(
    journal: Journal, at: Conditions, errors: Iterator[tuple[str, float]], limit: float
) -> None:
    try:
        for name, error in errors:
            journal.add("check", at, name, values={"error": error, "limit": limit})
    except Exception as failure:  # a kernel that does not even start is a result of the run
        journal.add("check", at, "stopped", values={"limit": limit}, failure=reason(failure))


def _mixing(block: Block) -> Iterator[tuple[str, Tensor, Tensor]]:
    x_BLD = block.random_x(1)
    y_BLD = oracle(block, x_BLD)
    got_BLD = expert_mixing(x_BLD, *block.tables, max_top_k=block.max_top_k)
    yield "expert_mixing", got_BLD, y_BLD
    bias_D, weight_D, shift_D = norm = random_norm(block)
    r_BLD, z_BLD = within(block, norm, x_BLD)
    yield "expert_mixing_norm, r", r_BLD, x_BLD.double() + bias_D.double() + y_BLD
    exact_BLD = layer_norm(
        x_BLD.double(), x_BLD.shape[-1:], weight_D.double(), shift_D.double(), EPS
    )
    yield "expert_mixing_norm, z", z_BLD, exact_BLD


def _autoencoders(device: torch.device) -> Iterator[tuple[str, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    mean_TF, std_TF = normal(TASKS, WIDTH), normal(TASKS, WIDTH).abs() + 0.5
    encoder_TFC, encoder_bias_TC = normal(TASKS, WIDTH, CODE) / WIDTH**0.5, normal(TASKS, CODE)
    decoder_TCF, decoder_bias_TF = normal(TASKS, CODE, WIDTH) / CODE**0.5, normal(TASKS, WIDTH)
    weights = (mean_TF, std_TF, encoder_TFC, encoder_bias_TC, decoder_TCF, decoder_bias_TF)
    x_BF = normal(BATCH, WIDTH)
    z_TBF = (x_BF.double() - mean_TF.double()[:, None]) / std_TF.double()[:, None]
    code_TBC = (z_TBF @ encoder_TFC.double() + encoder_bias_TC.double()[:, None]).relu()
    decoded_TBF = code_TBC @ decoder_TCF.double() + decoder_bias_TF.double()[:, None]
    exact_TB = (decoded_TBF - z_TBF).square().mean(-1)
    yield "autoencoder_errors", autoencoder_errors(x_BF, *weights), exact_TB.T
