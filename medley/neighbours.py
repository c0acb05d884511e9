"""Which tasks an image that nobody claims is nearest to, by the prototypes of their classes.

A task is as similar to an image as the nearest of its prototypes (`medley/bundle.py` keeps them).
Prototypes are of the frozen backbone, as the features of the images must be. Whether anybody is
asked, and what becomes of the neighbours' answers, is for `medley/classifier.py`.

Legend: B images, C prototypes of a task, E joint embedding width, T tasks, P paths that there may
be, K neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["NOBODY", "Neighbours"]

NOBODY = -1  # in place of a path, where an image has fewer neighbours

_SHORTEST = 1e-6  # prototypes are of unit length; what is shorter has no direction to speak of


class Neighbours:
    """The prototypes of all live tasks that have any.

    Like a `SelectorBank` it belongs to the thread that owns the model.

    Args:
        device: where the features are.
        width: of the features, E.
    """

    def __init__(self, device: str | torch.device = "cpu", *, width: int) -> None:
        self._device = torch.device(device)
        self._width = width
        self._prototypes: dict[int, Tensor] = {}  # by path, ascending; each (E, C), unit columns
        self.changes = 0  # how often a task has come or gone; what was captured before is stale
        self._sort()

    @property
    def paths(self) -> frozenset[int]:
        """The tasks that there are."""
        return frozenset(self._prototypes)

    def add(self, path: int, prototypes_CE: Tensor) -> None:
        """Let a task be a neighbour.

        Raises:
            ValueError: the path is taken or not a task's, or the prototypes are not one or more
                finite rows of the features' width, of whatever length but zero.
        """
        if path < 0 or path in self._prototypes:
            raise ValueError(f"path {path} is {'taken' if path >= 0 else 'not that of a task'}")
        self._prototypes[path] = self._unit(prototypes_CE).T.contiguous()
        self._sort()

    def remove(self, path: int) -> None:
        """Let a task be no neighbour any more.

        Raises:
            KeyError: no task has this path.
        """
        del self._prototypes[path]
        self._sort()

    def nearest(self, features_BE: Tensor, among_BP: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find each image's nearest tasks; nothing is read back to the host.

        A task's similarity does not depend by a bit on the other tasks, nor an image's neighbours
        on the other images of a batch of the same size.

        Args:
            features_BE: of the frozen backbone, unit length, float32.
            among_BP: bool, which paths may be an image's neighbours; P is beyond every path.
            k: at most how many.

        Returns:
            paths_BK int64, the nearest first, of equally near ones the smaller path; `NOBODY` where
            there are fewer than k. similarity_BK float32, the greatest cosine with a prototype; of
            nobody minus infinity.
        """
        B, T = len(features_BE), len(self._prototypes)
        paths_BK = torch.full((B, k), NOBODY, device=self._device)
        similarity_BK = torch.full((B, k), -torch.inf, device=self._device)
        if not T or not k:
            return paths_BK, similarity_BK
        # One product for each task: the rounding of a large one would depend on its size.
        cosines = [(features_BE @ unit_EC).amax(1) for unit_EC in self._prototypes.values()]
        similarity_BT = torch.stack(cosines, 1)
        among_BT = among_BP.index_select(1, self._paths_T) & similarity_BT.isfinite()
        # Stable, and columns ascend by path: among equals the smaller path comes first.
        ranked_BT, order_BT = similarity_BT.masked_fill(~among_BT, -torch.inf).sort(
            dim=1, descending=True, stable=True
        )
        found = min(k, T)
        near_BK, order_BK = ranked_BT[:, :found], order_BT[:, :found]
        similarity_BK[:, :found] = near_BK
        paths_BK[:, :found] = self._paths_T[order_BK].masked_fill(~near_BK.isfinite(), NOBODY)
        return paths_BK, similarity_BK

    def _sort(self) -> None:
        self._prototypes = dict(sorted(self._prototypes.items()))
        self._paths_T = torch.tensor(list(self._prototypes), dtype=torch.int64, device=self._device)
        self.changes += 1

    def _unit(self, prototypes_CE: Tensor) -> Tensor:
        shape = tuple(prototypes_CE.shape)
        if prototypes_CE.ndim != 2 or not len(prototypes_CE) or shape[1] != self._width:
            raise ValueError(f"prototypes have shape {shape}, expected (classes, {self._width})")
        prototypes_CE = prototypes_CE.to(self._device, torch.float32)
        lengths_C = prototypes_CE.norm(dim=1)
        bad = ~(lengths_C.isfinite() & (lengths_C >= _SHORTEST))
        if bad.any():
            first = int(bad.nonzero()[0])
            raise ValueError(f"prototype {first} has no direction, its norm is {lengths_C[first]}")
        return F.normalize(prototypes_CE, dim=1)
