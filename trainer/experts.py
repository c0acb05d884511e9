"""Trainable experts of one tower: frozen and new ones under this task's noisy router.

What the trainer optimises and nothing else; a finished task is `medley.experts.BlockExperts`, made
from this by `trainer/export.py`. The experts run through the op that serves them, `mix` of
`kernels.expert_mixing`, which has gradients.

Legend: B rows (images or prompts), L tokens, D width, E experts, R bottleneck, K chosen experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.expert_mixing import mix
from medley.experts import BlockExperts
from trainer.distributed import ALONE, Part
from trainer.penalties import Penalties
from trainer.redundancy import Groups, SubspaceRedundancy, group_count, sampled

__all__ = ["BlockMixture", "ExpertConfig", "NoisyRouter", "TowerMixture", "balance_loss"]

_NOISE_FLOOR = 0.01


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """What the experts of a run look like."""

    num_new: int
    bottleneck: int
    top_k: int
    scale: float
    dropout: float
    relu: bool = True  # False: linear experts, which no bundle can hold
    redundancy: SubspaceRedundancy | None = None  # what training keeps small


class NoisyRouter(nn.Module):
    """Noisy top-k gating; both matrices start at zero, so the first choices are drawn by lot.

    Source: Shazeer et al., arXiv:1701.06538, eq. 3-5; MoE-Adapters, arXiv:2403.11549.
    """

    def __init__(self, width: int, num_experts: int, *, top_k: int) -> None:
        super().__init__()
        self.gate_DE = nn.Parameter(torch.zeros(width, num_experts))
        self.noise_DE = nn.Parameter(torch.zeros(width, num_experts))
        self.top_k = min(top_k, num_experts)

    def forward(self, tokens_BD: Tensor, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """Choose experts, in training with noise; the balance is that of the whole batch.

        Returns:
            expert_BK int64 and gates_BK float32, best first, and the balance loss,
            a scalar, zero outside of training.
        """
        # In float32 whatever the rest runs in, as the server routes: half precision flips close
        # choices.
        with torch.autocast(tokens_BD.device.type, enabled=False):
            clean_BE = tokens_BD.float() @ self.gate_DE
            E = clean_BE.shape[1]
            if not self.training:
                return *self._top(clean_BE), clean_BE.new_zeros(())
            spread_BE = F.softplus(tokens_BD.float() @ self.noise_DE) + _NOISE_FLOOR
            noise_BE = part.drawn(lambda rows: clean_BE.new_empty(rows, E).normal_())
            noisy_BE = clean_BE + noise_BE * spread_BE
            expert_BK, gates_BK = self._top(noisy_BE)
            importance_BE = torch.zeros_like(clean_BE).scatter(1, expert_BK, gates_BK)
            balance = balance_loss(
                importance_BE, clean_BE, noisy_BE, spread_BE, self.top_k, total=part.team.total
            )
            return expert_BK, gates_BK, balance

    def _top(self, logits_BE: Tensor) -> tuple[Tensor, Tensor]:
        top_BK, expert_BK = logits_BE.topk(self.top_k, dim=-1)
        return expert_BK, torch.softmax(top_BK, dim=-1)


class BlockMixture(nn.Module):
    """One block's experts, the frozen ones first, and the router over them all."""

    frozen_down_ERD: Tensor
    frozen_down_bias_ER: Tensor
    frozen_up_ERD: Tensor
    frozen_up_bias_ED: Tensor
    counts_E: Tensor

    def __init__(self, width: int, frozen: BlockExperts | None, config: ExpertConfig) -> None:
        super().__init__()
        new, rank = config.num_new, config.bottleneck
        self.config = config
        self.num_frozen = 0 if frozen is None else frozen.num_experts
        self.router = NoisyRouter(width, self.num_frozen + new, top_k=config.top_k)
        # How often each was chosen while training: the paper's freezing rule goes by it.
        self.register_buffer("counts_E", torch.zeros(self.num_frozen + new))
        # Identity at the start: up is zero. The bound is Kaiming's with a = sqrt(5), as torch's own
        # Linear.
        bound = 1 / math.sqrt(width)
        self.down_ERD = nn.Parameter(torch.empty(new, rank, width).uniform_(-bound, bound))
        self.down_bias_ER = nn.Parameter(torch.zeros(new, rank))
        self.up_ERD = nn.Parameter(torch.zeros(new, rank, width))
        self.up_bias_ED = nn.Parameter(torch.zeros(new, width))
        for name in ("down_ERD", "down_bias_ER", "up_ERD", "up_bias_ED"):
            trained = getattr(self, name)
            kept = trained[:0].detach().clone() if frozen is None else getattr(frozen, name).float()
            self.register_buffer(f"frozen_{name}", kept, persistent=False)

    def forward(
        self, x_BLD: Tensor, *, one_route: bool = False, part: Part | None = None
    ) -> tuple[Tensor, Penalties]:
        """Mix each row's experts.

        Args:
            x_BLD: the residual stream after attention, not layer-normed.
            one_route: all rows have the same token 0, so they share one choice of experts (and in
                training one draw of noise) and are mixed as if they were one long row.
            part: which rows of a batch these are, or of all prompts; None: all of it.

        Returns:
            what to add to the block's output, (B, L, D) in x's dtype, and the penalties, zero
            outside of training.
        """
        part = part or ALONE.part(len(x_BLD))
        routed = ALONE.part(1) if one_route else part  # one choice is everybody's
        tokens_BD = x_BLD[:1, 0] if one_route else x_BLD[:, 0]
        expert_BK, gates_BK, balance = self.router(tokens_BD, routed)
        if self.training:
            counts_E = torch.bincount(expert_BK.flatten(), minlength=len(self.counts_E))
            self.counts_E += routed.team.total(counts_E)
        penalties = Penalties(balance, self._penalty(x_BLD, expert_BK, part))
        rows_BLD = _autocast(x_BLD)
        keep_BLH = self._dropout(rows_BLD, part)
        if one_route:
            rows_BLD = rows_BLD.flatten(0, 1)[None]
            keep_BLH = None if keep_BLH is None else keep_BLH.flatten(0, 1)[None]
        y_BLD = mix(
            rows_BLD,
            expert_BK,
            self.config.scale * gates_BK,
            torch.stack([self._all("down_ERD"), self._all("up_ERD")], 1).to(rows_BLD.dtype),
            torch.cat([self._all("down_bias_ER"), self._all("up_bias_ED")], 1),
            relu=self.config.relu,
            keep_BLH=keep_BLH,
        )
        return y_BLD.view_as(x_BLD).to(x_BLD.dtype), penalties

    def gates(self, x_BLD: Tensor) -> Tensor:
        """Return every row's gates over all experts, (B, E): how much each is used."""
        expert_BK, gates_BK, _ = self.router(x_BLD[:, 0], ALONE.part(len(x_BLD)))
        all_BE = gates_BK.new_zeros(len(x_BLD), self.router.gate_DE.shape[1])
        return all_BE.scatter(1, expert_BK, gates_BK)

    def redundancy(self, x_BLD: Tensor, how: SubspaceRedundancy) -> Tensor:
        """Measure how redundant the experts are for these rows, a scalar."""
        part = ALONE.part(len(x_BLD))
        return self._redundancy(x_BLD, self.router(x_BLD[:, 0], part)[0], how, part)

    def _penalty(self, x_BLD: Tensor, expert_BK: Tensor, part: Part) -> Tensor:
        how = self.config.redundancy
        if how is None or not self.training:
            return self.down_ERD.new_zeros(())
        return self._redundancy(x_BLD, expert_BK, how, part)

    def _redundancy(
        self, x_BLD: Tensor, expert_BK: Tensor, how: SubspaceRedundancy, part: Part
    ) -> Tensor:
        tokens_BLD = sampled(x_BLD, part)
        B, L, _ = tokens_BLD.shape
        chosen_BE = self.counts_E.new_zeros(len(expert_BK), len(self.counts_E))
        chosen_BE = chosen_BE.scatter(1, expert_BK, 1.0).expand(B, -1)  # or one choice for all
        counted_SE = chosen_BE.repeat_interleave(L, 0)
        groups = group_count(self.config.bottleneck, how.groups)

        def taken_apart(prefix: str, counted_SE: Tensor) -> Groups:
            names = ("down_ERD", "down_bias_ER", "up_ERD")
            down_ERD, bias_ER, up_ERD = (getattr(self, prefix + name) for name in names)
            tokens_SD = tokens_BLD.flatten(0, 1)
            return Groups.of(tokens_SD, down_ERD, bias_ER, up_ERD, counted_SE, groups=groups)

        with torch.autocast(x_BLD.device.type, enabled=False):
            new = taken_apart("", counted_SE[:, self.num_frozen :])
            if not self.num_frozen:
                return how.of(new, total=part.team.total)
            # A new expert should differ from all frozen ones, whether they were chosen or not.
            frozen = taken_apart("frozen_", torch.ones_like(counted_SE[:, : self.num_frozen]))
            return how.of(new, frozen, total=part.team.total)

    def _dropout(self, x_BLD: Tensor, part: Part) -> Tensor | None:
        """Draw what each hidden unit of each token is multiplied by: 0, or 1 / (1 - dropout)."""
        if not (self.training and self.config.dropout):
            return None
        L, H = x_BLD.shape[1], self.router.top_k * self.config.bottleneck
        return part.drawn(lambda rows: F.dropout(x_BLD.new_ones(rows, L, H), self.config.dropout))

    def _all(self, name: str) -> Tensor:
        return torch.cat([getattr(self, f"frozen_{name}"), getattr(self, name)])


class TowerMixture(nn.Module):
    """The mixtures of one tower by block; blocks before the first have none."""

    def __init__(
        self,
        width: int,
        blocks: range,
        frozen: Mapping[int, BlockExperts],
        config: ExpertConfig,
    ) -> None:
        super().__init__()
        self.mixtures = nn.ModuleDict(
            {str(block): BlockMixture(width, frozen.get(block), config) for block in blocks}
        )

    @property
    def blocks(self) -> list[int]:
        """Which blocks have experts, ascending."""
        return sorted(int(block) for block in self.mixtures)

    def __getitem__(self, block: int) -> BlockMixture:
        mixture = self.mixtures[str(block)]
        assert isinstance(mixture, BlockMixture)
        return mixture


def balance_loss(
    importance_BE: Tensor,
    clean_BE: Tensor,
    noisy_BE: Tensor,
    spread_BE: Tensor,
    top_k: int,
    *,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """Return CV(importance)^2 + CV(load)^2: zero where all experts are used alike.

    Load is the smooth count: the chance, over a fresh draw of one expert's noise, that it would be
    among the chosen.

    Args:
        importance_BE: each row's gates over all experts.
        clean_BE, noisy_BE, spread_BE: logits without and with noise, and the noise's deviation.
        top_k: how many experts are chosen.
        total: adds sums over these rows to those over the others of the batch.

    Source: Shazeer et al., arXiv:1701.06538, eq. 6-11.
    """
    if top_k == clean_BE.shape[1]:
        return clean_BE.new_zeros(())  # all are always chosen
    best_BK = noisy_BE.topk(top_k + 1, dim=-1).values
    kth_B1, next_B1 = best_BK[:, top_k - 1, None], best_BK[:, top_k, None]
    rival_BE = torch.where(noisy_BE > next_B1, next_B1, kth_B1)
    load_BE = torch.special.ndtr((clean_BE - rival_BE) / spread_BE)
    importance_E, load_E = total(torch.stack([importance_BE.sum(0), load_BE.sum(0)]))
    return _squared_variation(importance_E) + _squared_variation(load_E)


def _squared_variation(values_E: Tensor) -> Tensor:
    return values_E.var() / (values_E.mean() ** 2 + 1e-10)


def _autocast(x: Tensor) -> Tensor:
    """Go over to the dtype of autocast where it is on; autocast does not look into the op."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
