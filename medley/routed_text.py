"""The text tower of a routed model: prompts encoded with what one path adds to it.

Under a causal mask token 0 sees only itself, and it is the same start of text in every prompt: what
a router that reads it says is a constant of the path. One token through the tower finds it out, and
from then on no router runs.

Legend: N prompts, L tokens, D width, E joint embedding width, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.expert_mixing import choose, mix
from medley.low_rank import LowRankPool
from medley.pool import ExpertPool, PackedExperts
from medley.tower import Beside, TextTower

__all__ = ["RoutedText"]

Mixing = Callable[[int, Tensor], Tensor | None]  # block, its attended (N, L, D) -> what to add
Inside = Callable[[int], Beside]  # block -> what goes on inside its MLP


@dataclass(frozen=True)
class _BlockRoute:
    """The experts that a path's prompts take in one block."""

    slots_1K: Tensor
    gates_1K: Tensor  # float32, the path's scale folded in


class RoutedText:
    """A text tower, the slots of its experts, and those of its low-rank updates if it takes any.

    What is loaded and unloaded here are experts; `low_rank` does that for itself.
    """

    def __init__(
        self, tower: TextTower, pool: ExpertPool, low_rank: LowRankPool | None = None
    ) -> None:
        self.tower, self.pool, self.low_rank = tower, pool, low_rank
        self._routes: dict[int, tuple[int, list[_BlockRoute | None]]] = {}  # by path, first token

    @property
    def paths(self) -> frozenset[int]:
        """The paths that have experts here."""
        return self.pool.paths

    def has_room(self, packed: PackedExperts, without: Collection[int] = ()) -> bool:
        """Whether `load` would find room, were the paths `without` gone."""
        return self.pool.has_room(packed, without)

    def load(self, path: int, packed: PackedExperts) -> None:
        """Load a path's text experts.

        Raises:
            CapacityError: there is no room for them; nothing has changed.
        """
        self.pool.load(path, packed)

    def unload(self, path: int) -> None:
        """Free the slots of a path that is loaded here."""
        self.pool.unload(path)
        self._routes.pop(path, None)

    def encode(self, tokens_NL: Tensor, path: int) -> Tensor | None:
        """Encode token ids by a path; un-normalised features (N, E), None if it adds nothing."""
        if path in self.paths:
            x_NLD = self._run(tokens_NL, self._mixing(tokens_NL, path))
        elif self.low_rank is not None and path in self.low_rank.paths:
            x_NLD = self._run(tokens_NL, None, _updates(self.low_rank, tokens_NL, path))
        else:
            return None
        return self.tower.pool(x_NLD, tokens_NL)

    def _run(
        self, tokens_NL: Tensor, mixing: Mixing | None, inside: Inside | None = None
    ) -> Tensor:
        x_NLD, mask = self.tower.embed(tokens_NL)
        for index, block in enumerate(self.tower.blocks):
            x_NLD = block.attend(x_NLD, mask)
            mixed_NLD = None if mixing is None else mixing(index, x_NLD)
            x_NLD = x_NLD + block.mlp(x_NLD, None if inside is None else inside(index))
            x_NLD = x_NLD if mixed_NLD is None else x_NLD + mixed_NLD
        return x_NLD

    def _mixing(self, tokens_NL: Tensor, path: int) -> Mixing:
        if not self.tower.causal or not (tokens_NL[:, 0] == tokens_NL[:1, 0]).all():
            paths_N = torch.full((len(tokens_NL),), path, device=tokens_NL.device)
            return lambda block, x_NLD: self.pool.mixing(block, x_NLD, paths_N)
        start = int(tokens_NL[0, 0])
        if path not in self._routes or self._routes[path][0] != start:
            self._routes[path] = (start, self._constants(path, start))
        routes = self._routes[path][1]
        return lambda block, x_NLD: self._mixed(block, x_NLD, routes[block])

    @torch.no_grad()
    def _constants(self, path: int, start: int) -> list[_BlockRoute | None]:
        """Route the token that every prompt begins with, and that sees nothing else."""
        routes: list[_BlockRoute | None] = []

        def mixing(block: int, x_11D: Tensor) -> Tensor | None:
            routes.append(self._route(block, x_11D, path))
            return self._mixed(block, x_11D, routes[-1])

        self._run(torch.full((1, 1), start, device=self.pool.slots_NPE.device), mixing)
        return routes

    def _route(self, block: int, x_11D: Tensor, path: int) -> _BlockRoute | None:
        pool, paths_1 = self.pool, torch.tensor([path], device=x_11D.device)
        expert_1K, gates_1K, active_1 = choose(
            x_11D,
            paths_1,
            pool.routers_NPDE[block],
            pool.slots_NPE[block],
            pool.top_k_P,
            max_top_k=pool.capacity.max_top_k,
        )
        if not active_1:
            return None
        slots_1K = pool.slots_NPE[block, paths_1].gather(1, expert_1K)
        return _BlockRoute(slots_1K, gates_1K * pool.scale_P[path])

    def _mixed(self, block: int, x_NLD: Tensor, route: _BlockRoute | None) -> Tensor | None:
        if route is None:
            return None
        # All tokens of all prompts are one row of `mix`: no weight is gathered for each prompt.
        x_1TD = x_NLD.flatten(0, 1)[None]
        weights_S2RD, biases_SF = self.pool.weights_NS2RD[block], self.pool.biases_NSF[block]
        y_1TD = mix(x_1TD, route.slots_1K, route.gates_1K, weights_S2RD, biases_SF)
        return y_1TD.view(x_NLD.shape)


def _updates(low_rank: LowRankPool, tokens_NL: Tensor, path: int) -> Inside:
    """A path's updates of every block; all tokens of all prompts are one row, as in `mix`."""
    rows = low_rank.rows(torch.tensor([path], device=tokens_NL.device))
    assert rows is not None

    def inside(block: int) -> Beside:
        beside = rows.beside(block)

        def add(linear: int, x_NLI: Tensor, y_NLO: Tensor) -> Tensor:
            x_1TI, y_1TO = x_NLI.flatten(0, 1)[None], y_NLO.flatten(0, 1)[None]
            return beside(linear, x_1TI, y_1TO).view(y_NLO.shape)

        return add

    return inside
