import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.speed.baselines import baselines, oracle
from trainer.speed.baselines.columns import DISPATCHER
from trainer.speed.baselines.oracle import relative_error
from trainer.speed.block import MIXES, SHAPES, Block, Shape, make_block
from trainer.speed.norm import apart, random_norm, within

CPU = torch.device("cpu")
SMALL = Shape("small", 13, 48)
COLUMNS = {column.name: column for column in baselines(CPU, compiled=False)}
# Two products and one sum in the dtype, against float64; bfloat16 keeps 8 bits of each.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def small(mix: str, dtype: torch.dtype = torch.float32, batch: int = 6) -> Block:
    return make_block(SMALL, batch=batch, mix=mix, dtype=dtype, device=CPU, seed=3)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", COLUMNS)
def test_every_column_computes_the_branch(name: str, mix: str, dtype: torch.dtype) -> None:
    block = small(mix, dtype)
    x_BLD = block.random_x(1)
    y_BLD = COLUMNS[name].prepare(block)(x_BLD)
    assert y_BLD.dtype == dtype
    assert relative_error(y_BLD, oracle(block, x_BLD)) < LIMITS[dtype]
    null_B = block.paths_B < 0
    assert not y_BLD[null_B].count_nonzero()


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_reads_x_each_time(name: str) -> None:
    block = small("half null")
    run = COLUMNS[name].prepare(block)
    one, other = (block.random_x(seed) for seed in (1, 2))
    kept = run(one).clone()
    assert not torch.equal(run(other), kept)
    torch.testing.assert_close(run(one), kept)


def test_the_oracle_tells_a_wrong_expert_from_a_right_one() -> None:
    block = small("11 tasks")
    x_BLD = block.random_x(1)
    shifted = replace(block, slots_PE=block.slots_PE.roll(1, 1))
    assert relative_error(COLUMNS["gather + bmm"].prepare(shifted)(x_BLD), oracle(block, x_BLD)) > 1


def test_the_dispatcher_does_about_as_many_operations_as_the_published_code() -> None:
    """196 were counted on the published code for 8 images of one task, empty experts included."""
    block = make_block(SHAPES[0], batch=8, mix="one task", dtype=torch.float32, device=CPU)
    run, x_BLD = COLUMNS[DISPATCHER].prepare(block), block.random_x(1)
    with _Counting() as counting:
        run(x_BLD)
    assert 176 <= counting.operations <= 196


def test_the_branch_with_its_norm_is_the_same_in_one_op_and_in_three() -> None:
    block = small("half null")
    norm, x_BLD = random_norm(block), block.random_x(1)
    for one, other in zip(within(block, norm, x_BLD), apart(block, norm, x_BLD), strict=True):
        torch.testing.assert_close(one, other)


VIEWS = ("view", "t", "slice", "select", "split_with_sizes", "unsqueeze", "detach", "lift_fresh")


class _Counting(TorchDispatchMode):
    operations = 0

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.operations += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


INTERPRETED = """
import torch
from trainer.speed.baselines import oracle, shrink_expand
from trainer.speed.baselines.oracle import relative_error
from trainer.speed.block import Shape, make_block
for mix in ("half null", "all distinct"):
    block = make_block(Shape("small", 70, 80), batch=3, mix=mix, dtype=torch.float32,
                       device=torch.device("cpu"))
    x = block.random_x(1)
    error = relative_error(shrink_expand.prepare(block)(x), oracle(block, x))
    assert error < 1e-5, error
"""


def test_the_pair_of_kernels_computes_the_branch_under_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
