"""Rows that others published for MTIL with ViT-B/16 CLIP: quoted, none of them measured here.

Per cent, as printed. How each method chooses its parameters differs: MoE-Adapters by the mean error
of a batch of 128 images of one data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.mtil import ORDERS

__all__ = ["Anchor", "anchors"]


@dataclass(frozen=True)
class Anchor:
    """One published row, and where it was printed."""

    method: str
    transfer: float
    average: float
    last: float | None
    source: str
    protocol: str = "agnostic"


_FULL_I = (
    Anchor("Zero-shot CLIP", 69.4, 65.3, 65.3, "ZSCL notebook"),
    Anchor("Continual fine-tune", 44.6, 55.9, 77.3, "ZSCL notebook"),
    Anchor("LwF", 56.9, 64.7, 74.6, "ZSCL notebook"),
    Anchor("iCaRL", 50.4, 65.7, 80.1, "ZSCL notebook"),
    Anchor("LwF-VR", 57.2, 65.1, 76.6, "ZSCL notebook"),
    Anchor("WiSE-FT", 52.3, 60.7, 77.7, "ZSCL notebook"),
    Anchor("ZSCL (ICCV 23)", 68.1, 75.4, 83.6, "ZSCL notebook"),
    Anchor("NuSA-CL", 68.6, 75.1, 82.8, "NuSA-CL"),
    Anchor("DIKI (ECCV 24)", 68.7, 76.3, 85.1, "tables of DPW, LEBA"),
    Anchor("MoE-Adapters (CVPR 24)", 68.9, 76.7, 85.0, "tables of LEBA, DPW, FARA"),
    Anchor("IAP (2025)", 69.2, 76.8, 85.7, "table of DPW"),
    Anchor("GIFT (CVPR 25)", 69.3, 77.3, 86.0, "GIFT"),
    Anchor("MulKI (2024)", 70.1, 77.3, None, "table of ConDU"),
    Anchor("DPeCLIP (2024)", 69.1, 77.5, 86.9, "tables of ConDU, DPW"),
    Anchor("Dual-RAIL (NeurIPS 24)", 69.4, 77.8, 86.8, "table of ConDU"),
    Anchor("LEBA (NeurIPS 25)", 69.2, 77.9, 87.3, "LEBA"),
    Anchor("FARA", 70.1, 78.1, 86.6, "FARA"),
    Anchor("ConDU (LoRA)", 70.3, 78.3, 86.2, "ConDU"),
    Anchor("ConDU (FT)", 70.8, 78.8, 87.1, "ConDU"),
    Anchor("DPW (CVPR 26)", 70.4, 79.3, 88.3, "DPW"),
    Anchor("CMAP", 74.2, 80.5, 88.7, "abstract of arXiv:2605.25708"),
    Anchor("PACT (2026), 3000 steps a task", 71.8, 81.1, 90.5, "PACT"),
)
_FULL_II = (
    Anchor("Zero-shot CLIP", 65.4, 65.3, 65.3, "ZSCL notebook"),
    Anchor("Continual fine-tune", 46.6, 56.2, 67.4, "ZSCL notebook"),
    Anchor("LwF", 53.2, 62.2, 71.9, "ZSCL notebook"),
    Anchor("iCaRL", 50.9, 56.9, 71.6, "ZSCL notebook"),
    Anchor("LwF-VR", 53.1, 60.6, 68.3, "ZSCL notebook"),
    Anchor("WiSE-FT", 51.0, 61.5, 72.2, "ZSCL notebook"),
    Anchor("ZSCL (ICCV 23)", 64.2, 74.5, 83.4, "ZSCL notebook"),
    Anchor("DIKI (ECCV 24)", 64.4, 74.5, 85.5, "tables of later papers"),
    Anchor("MoE-Adapters (CVPR 24)", 64.3, 74.7, 84.1, "tables of later papers"),
    Anchor("IAP (2025)", 64.9, 75.1, 85.9, "tables of later papers"),
    Anchor("LEBA (NeurIPS 25)", 65.1, 75.6, 86.4, "LEBA"),
    Anchor("GIFT (CVPR 25)", 65.9, 75.7, 85.3, "GIFT"),
    Anchor("FARA", 65.9, 76.3, 86.3, "FARA"),
    Anchor("DPW (CVPR 26)", 65.7, 76.4, 88.1, "DPW"),
)
_SHOTS_5_I = (
    Anchor("ZSCL (ICCV 23)", 65.3, 64.4, 67.4, "tables of later papers"),
    Anchor("NuSA-CL", 68.1, 70.3, 75.4, "NuSA-CL"),
    Anchor("MoE-Adapters (CVPR 24)", 68.9, 71.4, 76.1, "tables of later papers"),
    Anchor("RAIL-Primal (NeurIPS 24)", 69.4, 71.9, 77.2, "tables of later papers"),
    Anchor("ConDU (FT)", 70.0, 72.3, 76.6, "ConDU"),
    Anchor("ConDU (LoRA)", 70.3, 72.7, 77.4, "ConDU"),
    Anchor("CoDyRA", 70.1, 73.3, 78.0, "CoDyRA"),
    Anchor("AFA", 70.2, 74.1, 79.4, "AFA"),
    Anchor("PACT (2026)", 70.5, 72.0, 80.7, "PACT"),
)
_SHOTS_16_I = (
    Anchor("DIKI (ECCV 24)", 68.7, 72.5, 78.6, "DIKI"),
    Anchor("MoE-Adapters (CVPR 24)", 69.3, 75.3, 82.3, "tables of later papers"),
    Anchor("DPW (CVPR 26)", 69.6, 75.9, 83.7, "DPW"),
    Anchor("IAP (2025)", 70.9, 72.5, 77.7, "table of PACT"),
)
_X_TAIL = (
    Anchor("ZSCL (ICCV 23)", 59.0, 60.0, 63.4, "tables of later papers", "union"),
    Anchor("MoE-Adapters (CVPR 24)", 56.0, 63.0, 70.5, "tables of later papers", "union"),
    Anchor("RAIL-Primal (NeurIPS 24)", 62.4, 70.7, 79.1, "RAIL", "union"),
    Anchor("LADA", 61.5, 72.7, 83.1, "LADA", "union"),
    Anchor("CoDyRA", 63.2, 71.3, 79.2, "CoDyRA", "union"),
    Anchor("MoRAM", 63.3, 72.7, 80.9, "MoRAM", "union"),
)
_ANCHORS: dict[tuple[str, int | None], Sequence[Anchor]] = {  # by order and shots
    ("I", None): _FULL_I,
    ("II", None): _FULL_II,
    ("I", 5): _SHOTS_5_I,
    ("I", 16): _SHOTS_16_I,
    ("X-TAIL", 16): _X_TAIL,
}


def anchors(suite: str, order: Sequence[str], shots: int | None) -> Sequence[Anchor]:
    """What was published for this very sequence; nothing for any other."""
    names = [name for name, tasks in ORDERS.items() if tasks == tuple(order)]
    return _ANCHORS.get((names[0], shots), ()) if suite == "mtil" and names else ()
