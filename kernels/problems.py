"""Launches of both kernels as a server makes them, for `kernels/tune.py` and compile tests.

On the meta device a problem has types and shapes and no memory, which is all that a compiler needs.
Elsewhere it has random numbers, and says how far the kernel is from the reference.

Legend: as in the two kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kernels.autoencoder_errors import fused as scoring
from kernels.autoencoder_errors.reference import autoencoder_errors
from kernels.autoencoder_errors.table import Launch as ScoringLaunch
from kernels.expert_mixing import fused as mixing
from kernels.expert_mixing.reference import expert_mixing_norm
from kernels.expert_mixing.table import Launch as MixingLaunch
from kernels.launching import Call

__all__ = ["Mixing", "Scoring"]

_EXPERTS = 22  # as many as the paper's, shared by all paths
_PATHS = 11
_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """One block's expert branch with the MLP's LayerNorm: B rows of L tokens, every path there."""

    rows: int
    tokens: int
    width: int
    bottleneck: int = 64
    top_k: int = 2
    dtype: torch.dtype = torch.bfloat16
    device: str = "meta"
    seed: int = 0

    @property
    def kernel(self) -> object:
        """The Triton kernel."""
        return mixing.kernel

    def call(self, launch: MixingLaunch | None = None) -> Call:
        """Prepare the launch; without a row the table chooses."""
        x_BLD, paths_B, weights_S2RD, biases_SF, routers_PDE, slots_PE, top_k_P, scale_P = (
            self._branch
        )
        out_bias_D, norm_weight_D, norm_bias_D = self._norm
        r_BLD, z_BLD = self._answers
        return mixing.prepare(
            x_BLD,
            r_BLD,
            weights_S2RD=weights_S2RD,
            biases_SF=biases_SF,
            slots=slots_PE,
            max_top_k=self.top_k,
            router=mixing.Router(
                paths_B=paths_B, routers_PDE=routers_PDE, top_k_P=top_k_P, scale_P=scale_P
            ),
            norm=mixing.Norm(
                z_BLD=z_BLD,
                out_bias_D=out_bias_D,
                weight_D=norm_weight_D,
                bias_D=norm_bias_D,
                eps=_EPS,
            ),
            launch=launch,
        )

    def error(self, launch: MixingLaunch | None = None) -> float:
        """Run a launch; return the greater relative error of y alone and of z."""
        self.call(launch).run()
        x_BLD, paths_B, weights_S2RD, *rest = self._branch
        out_bias_D, *_ = self._norm
        expected_BLD, expected_z_BLD = expert_mixing_norm(
            x_BLD.float(), paths_B, weights_S2RD.float(), *rest, *self._norm,
            max_top_k=self.top_k, eps=_EPS,
        )  # fmt: skip
        r_BLD, z_BLD = self._answers
        y_BLD, expected_y_BLD = (r - x_BLD.float() - out_bias_D for r in (r_BLD, expected_BLD))
        return max(_relative(y_BLD, expected_y_BLD), _relative(z_BLD, expected_z_BLD))

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all that is read and written."""
        return _size_bytes(*self._branch, *self._norm, *self._answers)

    @cached_property
    def _branch(self) -> tuple[Tensor, ...]:
        random = _Random(self.device, self.seed)
        D, R = self.width, self.bottleneck
        return (
            random.normal(self.rows, self.tokens, D).to(self.dtype),
            torch.arange(self.rows, device=self.device) % _PATHS,
            (random.normal(_EXPERTS, 2, R, D) * (2 / D**0.5)).to(self.dtype),
            random.normal(_EXPERTS, R + D),
            random.normal(_PATHS, D, _EXPERTS) / D**0.5,
            torch.arange(_EXPERTS, device=self.device).expand(_PATHS, _EXPERTS).contiguous(),
            torch.full((_PATHS,), self.top_k, device=self.device),
            torch.ones(_PATHS, device=self.device),
        )

    @cached_property
    def _norm(self) -> tuple[Tensor, ...]:
        random = _Random(self.device, self.seed + 1)
        return tuple(random.normal(self.width) for _ in range(3))

    @cached_property
    def _answers(self) -> tuple[Tensor, Tensor]:
        x_BLD = self._branch[0]
        return torch.full_like(x_BLD, torch.nan), torch.full_like(x_BLD, torch.nan)


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """All tasks' autoencoders over one feature."""

    images: int
    codes: int
    width: int = 768
    tasks: int = 10
    output: str = "linear"
    dtype: torch.dtype = torch.bfloat16
    device: str = "meta"
    seed: int = 0

    @property
    def kernel(self) -> object:
        """The Triton kernel."""
        return scoring.kernel

    def call(self, launch: ScoringLaunch | None = None) -> Call:
        """Prepare the launch; without a row the table chooses."""
        return scoring.prepare(self._answer, *self._inputs, output=self.output, launch=launch)

    def error(self, launch: ScoringLaunch | None = None) -> float:
        """Run a launch; return the relative error of the errors."""
        self.call(launch).run()
        expected_BT = autoencoder_errors(*(t.double() for t in self._inputs), output=self.output)
        return _relative(self._answer, expected_BT)

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all that is read and written."""
        return _size_bytes(*self._inputs, self._answer)

    @cached_property
    def _inputs(self) -> tuple[Tensor, ...]:
        random = _Random(self.device, self.seed)
        T, F, C = self.tasks, self.width, self.codes
        return (
            random.normal(self.images, F).to(self.dtype),
            random.normal(T, F),
            random.normal(T, F).abs() + 0.5,
            random.normal(T, F, C) / F**0.5,
            random.normal(T, C),
            random.normal(T, C, F) / C**0.5,
            random.normal(T, F),
        )

    @cached_property
    def _answer(self) -> Tensor:
        return torch.full((self.images, self.tasks), torch.nan, device=self.device)


class _Random:
    def __init__(self, device: str, seed: int) -> None:
        self._device = device
        meta = device == "meta"
        self._generator = None if meta else torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device=self._device)


def _relative(tensor: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference by that of what was expected; NaN if there is one."""
    return float((tensor.double() - expected.double()).norm() / expected.double().norm())


def _size_bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
