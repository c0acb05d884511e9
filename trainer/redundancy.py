"""How alike the subspaces of low-rank updates are: a loss that training may add, and nothing else.

An update of rank R is the sum of the updates of its groups of ranks, exactly; groups that do the
same are redundant. A measure says how alike two groups are, and `SubspaceRedundancy` which groups
are compared. It follows what ReSoRA (arXiv:2507.20745) says of itself in its abstract; formulas,
weights and schedule are our reconstruction (`docs/redundancy.md`). What is learnt is served as if
it had never been.

Legend: S tokens, E experts, R ranks of an expert, G and H groups, M ranks of a group, I inputs,
O outputs; B rows, L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.distributed import Part

__all__ = [
    "DEFAULT_GROUPS",
    "LEAST_RANKS",
    "MEASURES",
    "Groups",
    "MeasureName",
    "SubspaceRedundancy",
    "group_count",
    "sampled",
]

DEFAULT_GROUPS = 8
LEAST_RANKS = 8  # of a group: of fewer, hardly anything can be said
TOKENS = 512  # of a batch that are looked at, and at least one of each row
_CONSTANT = 1e-10  # a column is constant whose variance is so small a part of its mean square
_TINY = 1e-20

MeasureName = Literal["feature_correlation", "distribution_divergence", "output_cosine", "weight"]
Total = Callable[[Tensor], Tensor]  # adds sums over these tokens to those over everybody else's


@dataclass(frozen=True)
class Groups:
    """The groups of some low-rank updates that read the same tokens."""

    tokens_SI: Tensor
    down_GMI: Tensor
    bias_GM: Tensor
    up_GMO: Tensor
    counted_SG: Tensor  # float32: 1 where the token goes through the group's expert, else 0
    expert_G: Tensor  # whose they are

    @classmethod
    def of(
        cls,
        tokens_SI: Tensor,
        down_ERI: Tensor,
        bias_ER: Tensor,
        up_ERO: Tensor,
        counted_SE: Tensor,
        *,
        groups: int,
    ) -> Groups:
        """Take experts apart into groups of neighbouring ranks.

        Args:
            tokens_SI: what they read, float32, as all others.
            down_ERI, bias_ER, up_ERO: of the experts.
            counted_SE: 1 where a token goes through an expert, else 0.
            groups: of an expert; divides R.
        """
        E, R, inputs = down_ERI.shape
        size = (E * groups, R // groups)
        return cls(
            tokens_SI,
            down_ERI.reshape(*size, inputs),
            bias_ER.reshape(size),
            up_ERO.reshape(*size, up_ERO.shape[-1]),
            counted_SE.repeat_interleave(groups, 1),
            torch.arange(E, device=down_ERI.device).repeat_interleave(groups),
        )

    @cached_property
    def features(self) -> Tensor:
        """What the down projections make of the tokens; no ReLU, no dropout."""
        return torch.einsum("si,gmi->sgm", self.tokens_SI, self.down_GMI) + self.bias_GM


Measure = Callable[[Groups, Groups, Total], Tensor]  # to r_GH, each of the first with each other


def feature_correlation(one: Groups, other: Groups, total: Total) -> Tensor:
    """M times the mean square correlation of the features of one group with those of the other.

    Between 0 (uncorrelated) and M. Features are standardised over the tokens of their own expert,
    so tokens that go through only one of two experts make these less alike.
    """
    correlation_GMHN = total(
        torch.einsum("sgm,shn->gmhn", _standardised(one, total), _standardised(other, total))
    )
    return correlation_GMHN.square().sum((1, 3)) / correlation_GMHN.shape[1]


def distribution_divergence(one: Groups, other: Groups, total: Total) -> Tensor:
    """exp(-J/2), the mean over tokens; J = KL(p|q) + KL(q|p).

    The distributions are the softmax over a group's features. Between 0 and 1; 1 where both are the
    same for all tokens.
    """
    log_p_SGM, log_q_SHM = (F.log_softmax(g.features, dim=-1) for g in (one, other))
    p_SGM, q_SHM = log_p_SGM.exp(), log_q_SHM.exp()
    own_SG1 = (p_SGM * log_p_SGM).sum(-1)[:, :, None]
    own_S1H = (q_SHM * log_q_SHM).sum(-1)[:, None, :]
    cross_SGH = torch.einsum("sgm,shm->sgh", p_SGM, log_q_SHM)
    cross_SGH = cross_SGH + torch.einsum("sgm,shm->sgh", log_p_SGM, q_SHM)
    return _over_tokens(torch.exp(0.5 * (cross_SGH - own_SG1 - own_S1H)), one, other, total)


def output_cosine(one: Groups, other: Groups, total: Total) -> Tensor:
    """Squared cosine of what both groups add to a token's output, the mean over tokens.

    Between 0 and 1; 0 as long as one of them adds nothing. No rotation of the ranks of a group
    changes it, as none changes the update.
    """
    up_GMO, up_HMO = _unit(one.up_GMO), _unit(other.up_GMO)
    gram_GMHN = torch.einsum("gmo,hno->gmhn", up_GMO, up_HMO)
    product_SGH = torch.einsum(
        "sghn,shn->sgh",
        torch.einsum("sgm,gmhn->sghn", one.features, gram_GMHN),
        other.features,
    )
    lengths_SGH = _length(one, up_GMO)[:, :, None] * _length(other, up_HMO)[:, None, :]
    return _over_tokens(product_SGH.square() / lengths_SGH.clamp_min(_TINY), one, other, total)


def weight(one: Groups, other: Groups, total: Total) -> Tensor:
    """Squared cosines of the rows of both downs, summed, over M; and the same of the ups.

    Between 0 (orthogonal) and 2 M, whatever the tokens are. Ups that are zero are left out.
    """
    cosines = (
        torch.einsum("gmi,hni->gmhn", F.normalize(a, dim=-1), F.normalize(b, dim=-1))
        for a, b in ((one.down_GMI, other.down_GMI), (one.up_GMO, other.up_GMO))
    )
    downs_GH, ups_GH = (c_GMHN.square().sum((1, 3)) / c_GMHN.shape[1] for c_GMHN in cosines)
    return downs_GH + ups_GH


MEASURES: dict[MeasureName, Measure] = {
    "feature_correlation": feature_correlation,
    "distribution_divergence": distribution_divergence,
    "output_cosine": output_cosine,
    "weight": weight,
}
assert tuple(MEASURES) == get_args(MeasureName)


@dataclass(frozen=True, kw_only=True)
class SubspaceRedundancy:
    """Which groups are compared, and by which measure; each switch adds a term of its own."""

    measure: MeasureName = "feature_correlation"
    groups: int = DEFAULT_GROUPS  # of an expert, as far as its rank allows
    within: bool = True  # the groups of one expert
    across: bool = True  # those of experts that were chosen for the same row
    frozen: bool = True  # those of a new expert with those of all frozen ones

    def of(
        self, new: Groups, frozen: Groups | None = None, *, total: Total = lambda sums: sums
    ) -> Tensor:
        """How redundant the updates are: the sum of the terms, a scalar of no unit.

        A term is the mean over its pairs of groups, each counted by the tokens that go through
        both; 0 where there are none.

        Args:
            new: groups that are trained.
            frozen: groups that the new ones should keep away from; no gradient reaches them.
            total: adds sums over these tokens to those over the others of the batch.
        """
        measure, terms = MEASURES[self.measure], []
        if self.within or self.across:
            alike_GG = measure(new, new, total)
            count_GG = _together(new, new, total).triu(1)
            same_GG = new.expert_G[:, None] == new.expert_G
            chosen = ((self.within, same_GG), (self.across, ~same_GG))
            terms += [_mean(alike_GG, count_GG * pairs_GG) for wanted, pairs_GG in chosen if wanted]
        if self.frozen and frozen is not None:
            terms.append(_mean(measure(new, frozen, total), _together(new, frozen, total)))
        return sum(terms, start=new.down_GMI.new_zeros(()))


def group_count(rank: int, wanted: int = DEFAULT_GROUPS) -> int:
    """How many equal groups a rank is taken apart into: at most `wanted`, none below 8 ranks."""
    most = max(1, min(wanted, rank // LEAST_RANKS))
    return next(count for count in range(most, 0, -1) if rank % count == 0)


def sampled(x_BLD: Tensor, part: Part) -> Tensor:
    """Some tokens of each row, (B, at most L, D), float32 and without gradient.

    Which ones does not depend on the generators of the run, nor on how many processes share the
    batch: so training draws the same numbers whether somebody looks or not.
    """
    each, (_, L, D) = max(1, TOKENS // part.whole), x_BLD.shape
    if each < L:
        chance = torch.Generator().manual_seed(L)
        place_BL = torch.rand(part.whole, L, generator=chance).topk(each).indices[part.rows]
        x_BLD = x_BLD.gather(1, place_BL.to(x_BLD.device)[:, :, None].expand(-1, -1, D))
    return x_BLD.detach().float()


def _standardised(groups: Groups, total: Total) -> Tensor:
    """Columns of mean zero and length 1 over the tokens that count; those of others are zero."""
    counted_SG1 = groups.counted_SG[:, :, None]
    kept_SGM = groups.features * counted_SG1
    mean_GM = total(kept_SGM.sum(0)) / total(counted_SG1.sum(0)).clamp_min(1)
    centred_SGM = (groups.features - mean_GM) * counted_SG1
    squares_GM = total(centred_SGM.square().sum(0))
    floor_GM = _CONSTANT * total(kept_SGM.detach().square().sum(0)) + _TINY
    return centred_SGM * squares_GM.clamp_min(floor_GM).rsqrt()


def _unit(up_GMO: Tensor) -> Tensor:
    """Each group's up at length 1, for numbers of a fair size; cosines do not see it."""
    length_G11 = up_GMO.detach().flatten(1).norm(dim=1)[:, None, None]
    return up_GMO / length_G11.clamp_min(_TINY)


def _length(groups: Groups, up_GMO: Tensor) -> Tensor:
    """The squared length of each group's output, (S, G)."""
    gram_GMN = torch.einsum("gmo,gno->gmn", up_GMO, up_GMO)
    features_SGM = groups.features
    return (torch.einsum("sgm,gmn->sgn", features_SGM, gram_GMN) * features_SGM).sum(-1)


def _over_tokens(value_SGH: Tensor, one: Groups, other: Groups, total: Total) -> Tensor:
    """The mean over the tokens that go through both."""
    sum_GH = torch.einsum("sgh,sg,sh->gh", value_SGH, one.counted_SG, other.counted_SG)
    return total(sum_GH) / _together(one, other, total).clamp_min(1)


def _together(one: Groups, other: Groups, total: Total) -> Tensor:
    """How many tokens go through both, (G, H)."""
    return total(one.counted_SG.T @ other.counted_SG)


def _mean(value_GH: Tensor, count_GH: Tensor) -> Tensor:
    return (value_GH * count_GH).sum() / count_GH.sum().clamp_min(1)
