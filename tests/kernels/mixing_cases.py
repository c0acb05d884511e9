"""Problems for the expert mixing, and what the answers are in float64, by loops.

Shares nothing with the kernel or its plain definition. Whatever must not be read is NaN here, and
what is written lies between canaries.

Legend: as in `kernels/expert_mixing/reference.py`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kernels.expert_mixing import expert_mixing, expert_mixing_norm, mix
from kernels.expert_mixing.table import Launch
from tests.kernels.memory import Canaries, surrounded
from tests.kernels.mutants import module

__all__ = [
    "Case",
    "Form",
    "Paths",
    "Problem",
    "answered",
    "build",
    "errors",
    "launched",
    "small",
]

Form = Literal["mix", "plain", "norm"]
Paths = Literal["mixed", "null", "one", "distinct"]

_NEAR = 1e-3  # logits closer than this may come in either order: float32 sums differ by their order


@dataclass(frozen=True, kw_only=True)
class Case:
    """A problem's shape and form; equal cases have equal tensors."""

    B: int
    L: int
    D: int
    R: int
    E: int
    K: int
    P: int = 3
    form: Form = "plain"
    dtype: torch.dtype = torch.float32
    paths: Paths = "mixed"
    relu: bool = True
    keep: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Problem:
    """The tensors of a case; the form says which of them count."""

    form: Form
    max_top_k: int
    relu: bool
    x_BLD: Tensor
    weights_S2RD: Tensor
    biases_SF: Tensor
    paths_B: Tensor
    routers_PDE: Tensor
    slots_PE: Tensor
    top_k_P: Tensor
    scale_P: Tensor
    slots_BK: Tensor
    gates_BK: Tensor
    keep_BLH: Tensor | None
    out_bias_D: Tensor
    norm_weight_D: Tensor
    norm_bias_D: Tensor
    eps: float = 1e-5


def small(*, block_m: int = 16, split: int = 1) -> Launch:
    """Return a launch that cuts even small problems up."""
    return Launch(block_m=block_m, block_k=32, block_n=32, num_warps=4, num_stages=2, split=split)


def build(case: Case) -> Problem:
    """Make a case's tensors.

    Path 0 has all of its experts, path 1 one less than the top-k where it can, path 2 none in this
    block, all others what chance gives; path 3 uses one, all others the full top-k. Behind the last
    path and the last slot lies one more that looks sound and must not be read.
    """
    g = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    B, L, D, R, E, K, P = case.B, case.L, case.D, case.R, case.E, case.K, case.P
    S = P * E + 3
    slots_PE = torch.randperm(S, generator=g)[: P * E].view(P, E)
    for path in range(1, P):
        here = {1: max(K - 1, 1), 2: 0}.get(path, int(torch.randint(1, E + 1, (), generator=g)))
        slots_PE[path, torch.randperm(E, generator=g)[here:]] = -1
    routers_PDE = normal(P + 1, D, E) * 2 / D**0.5
    routers_PDE[:P].transpose(1, 2)[slots_PE < 0] = torch.nan
    # Such sizes that down and up, both biases and x all matter next to each other.
    weights_S2RD = normal(S + 1, 2, R, D) / torch.tensor([D**0.5, R**0.5])[:, None, None]
    biases_SF = normal(S + 1, R + D)
    unused = torch.ones(S + 1, dtype=torch.bool)
    unused[slots_PE[slots_PE >= 0]] = False
    unused[S] = False
    weights_S2RD[unused] = torch.nan
    biases_SF[unused] = torch.nan
    used_S = (~unused[:S]).nonzero()[:, 0]
    slots_BK = used_S[torch.randint(len(used_S), (B, K), generator=g)]
    slots_BK[1::3, -1] = -1
    keep_BLH = (torch.rand(B, L, K * R, generator=g) < 0.7) / 0.7
    top_k_P = torch.full((P + 1,), K)
    top_k_P[3:4] = 1
    return Problem(
        form=case.form,
        max_top_k=K,
        relu=case.relu,
        x_BLD=surrounded(normal(B, L, D).to(case.dtype)),
        weights_S2RD=surrounded(weights_S2RD.to(case.dtype))[:S],
        biases_SF=surrounded(biases_SF)[:S],
        paths_B=_paths(case, g),
        routers_PDE=surrounded(routers_PDE)[:P],
        slots_PE=torch.cat([slots_PE, slots_PE[:1]])[:P],
        top_k_P=top_k_P[:P],
        scale_P=(torch.rand(P + 1, generator=g) + 0.5)[:P],
        slots_BK=slots_BK,
        gates_BK=torch.rand(B, K, generator=g) + 0.1,
        keep_BLH=surrounded(keep_BLH.to(case.dtype)) if case.keep else None,
        out_bias_D=normal(D),
        norm_weight_D=normal(D),
        norm_bias_D=normal(D),
    )


def _paths(case: Case, g: torch.Generator) -> Tensor:
    match case.paths:
        case "mixed":  # 0, none, 1, 2, 3, ...
            return torch.cat([torch.tensor([0, -1]), torch.arange(1, case.P)]).repeat(case.B)[
                : case.B
            ]
        case "null":
            return torch.full((case.B,), -1)
        case "one":
            return torch.zeros(case.B, dtype=torch.int64)
        case "distinct":
            return torch.randperm(case.P, generator=g)[: case.B]


def errors(answers: tuple[Tensor, ...], p: Problem) -> list[float]:
    """Return the relative Frobenius error of each answer, (y,) or (r, z), against float64.

    That of r goes by the size of y where there is any: the residual would hide an error of y. It is
    inf for an answer that is not finite.
    """
    rows = [_expected(p, b) for b in range(len(p.x_BLD))]
    return [_error(answer, [row[i] for row in rows]) for i, answer in enumerate(answers)]


@dataclass(frozen=True)
class _Expected:
    """What one row may come out as, (choices, L, D): several only where logits nearly tie."""

    choices: Tensor
    measure: Tensor  # the error is relative to its size


def _error(answer_BLD: Tensor, rows: list[_Expected]) -> float:
    off = measure = size = 0.0
    for row_LD, row in zip(answer_BLD.double(), rows, strict=True):
        if not row_LD.isfinite().all():
            return torch.inf
        off += float((row_LD - row.choices).square().sum((-2, -1)).min())
        measure += float(row.measure[0].square().sum())
        size += float(row.choices[0].square().sum())
    if off == 0:
        return 0.0
    return (off / (measure or size)) ** 0.5 if size else torch.inf


def _expected(p: Problem, b: int) -> tuple[_Expected, ...]:
    x_LD = p.x_BLD[b].double()
    y = torch.stack([_mixed(p, b, x_LD, pairs) for pairs in _choices(p, b, x_LD[0])])
    if p.form != "norm":
        return (_Expected(y, y),)
    mean = x_LD.mean(-1, keepdim=True)
    variance = ((x_LD - mean) ** 2).mean(-1, keepdim=True)
    z = (x_LD - mean) / (variance + p.eps).sqrt() * p.norm_weight_D.double()
    z = (z + p.norm_bias_D.double())[None]
    return _Expected(x_LD + p.out_bias_D.double() + y, y), _Expected(z, z)


def _choices(p: Problem, b: int, token_D: Tensor) -> list[list[tuple[int, float]]]:
    """What the row may be mixed of: (slot, gate) of every expert that counts."""
    if p.form == "mix":
        pairs = zip(p.slots_BK[b].tolist(), p.gates_BK[b].double().tolist(), strict=True)
        return [[(s if 0 <= s < len(p.weights_S2RD) else -1, gate) for s, gate in pairs]]
    path = int(p.paths_B[b])
    if not 0 <= path < len(p.slots_PE):
        return [[]]
    there = [e for e, s in enumerate(p.slots_PE[path].tolist()) if 0 <= s < len(p.weights_S2RD)]
    logit = {e: float((token_D * p.routers_PDE[path, :, e].double()).sum()) for e in there}
    count = min(int(p.top_k_P[path]), len(there))
    if count == 0:
        return [[]]
    bound = sorted(logit.values(), reverse=True)[count - 1]
    sure = [e for e in there if logit[e] > bound + _NEAR]
    near = [e for e in there if abs(logit[e] - bound) <= _NEAR]
    return [
        _gated(p, path, {e: logit[e] for e in (*sure, *some)})
        for some in itertools.combinations(near, count - len(sure))
    ]


def _gated(p: Problem, path: int, logit: dict[int, float]) -> list[tuple[int, float]]:
    gates = torch.tensor(list(logit.values()), dtype=torch.float64).softmax(0)
    scale = float(p.scale_P[path])
    return [
        (int(p.slots_PE[path, e]), float(gate) * scale)
        for e, gate in zip(logit, gates, strict=True)
    ]


def _mixed(p: Problem, b: int, x_LD: Tensor, pairs: list[tuple[int, float]]) -> Tensor:
    y_LD = torch.zeros_like(x_LD)
    R = p.weights_S2RD.shape[2]
    for k, (slot, gate) in enumerate(pairs):
        if slot < 0:
            continue
        down_RD, up_RD = p.weights_S2RD[slot].double()
        down_bias_R, up_bias_D = p.biases_SF[slot].double().tensor_split([R])
        hidden_LR = x_LD @ down_RD.T + down_bias_R
        if p.relu or p.form != "mix":
            hidden_LR = hidden_LR.clamp_min(0)
        if p.form == "mix" and p.keep_BLH is not None:
            hidden_LR = hidden_LR * p.keep_BLH[b, :, k * R : (k + 1) * R].double()
        y_LD += gate * (hidden_LR @ up_RD + up_bias_D)
    return y_LD


def answered(p: Problem) -> tuple[Tensor, ...]:
    """Ask the public operation of the problem's form where its tensors are: (y,), or (r, z)."""
    pool = (p.weights_S2RD, p.biases_SF)
    if p.form == "mix":
        return (mix(p.x_BLD, p.slots_BK, p.gates_BK, *pool, relu=p.relu, keep_BLH=p.keep_BLH),)
    routing = (p.paths_B, *pool, p.routers_PDE, p.slots_PE, p.top_k_P, p.scale_P)
    if p.form == "plain":
        return (expert_mixing(p.x_BLD, *routing, max_top_k=p.max_top_k),)
    norm = (p.out_bias_D, p.norm_weight_D, p.norm_bias_D)
    return expert_mixing_norm(p.x_BLD, *routing, *norm, max_top_k=p.max_top_k, eps=p.eps)


def launched(
    p: Problem, launch: Launch | None = None, *, source: Path | None = None
) -> tuple[Tensor, ...]:
    """Run the kernel, or that of another source file: (y,), or (r, z). For `Runner.call`.

    Raises:
        AssertionError: a canary beside an answer is gone.
    """
    fused = module("kernels.expert_mixing.fused", source)
    written = [
        Canaries(torch.full_like(p.x_BLD, torch.nan)) for _ in range(2 if p.form == "norm" else 1)
    ]
    router = fused.Router(
        paths_B=p.paths_B, routers_PDE=p.routers_PDE, top_k_P=p.top_k_P, scale_P=p.scale_P
    )
    norm = fused.Norm(
        z_BLD=written[-1].inner,
        out_bias_D=p.out_bias_D,
        weight_D=p.norm_weight_D,
        bias_D=p.norm_bias_D,
        eps=p.eps,
    )
    given = p.form == "mix"
    fused.prepare(
        p.x_BLD,
        written[0].inner,
        weights_S2RD=p.weights_S2RD,
        biases_SF=p.biases_SF,
        slots=p.slots_BK if given else p.slots_PE,
        max_top_k=p.max_top_k,
        router=None if given else router,
        gates_BK=p.gates_BK if given else None,
        keep_BLH=p.keep_BLH if given else None,
        norm=norm if p.form == "norm" else None,
        relu=p.relu,
        launch=launch,
    ).run()
    for each in written:
        each.check()
    return tuple(each.inner for each in written)
