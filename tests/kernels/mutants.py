"""Small wrongs that could be done to the fused kernels, each a text put in the place of another.

What a test that passes for one of these is worth, `test_expert_mixing_mutants.py` finds out.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["LOW_RANK_MUTANTS", "MUTANTS", "module", "written"]

# What is wrong: (the kernel's own text, found in it exactly once, and what replaces it).
MUTANTS = {
    "the expert's index is taken for its slot": (
        "tl.where(present_E & (e_E == index), slots_E, -1)",
        "tl.where(present_E & (e_E == index), e_E.to(tl.int64), -1)",
    ),
    "gates are not normalised": ("gate_K / total *", "gate_K *"),
    "the path's scale is left out": (" * tl.load(scale_ptr + path)", ""),
    "the path's own top-k is ignored": (
        "share = tl.where(k < count, tl.exp(best - top), 0.0)",
        "share = tl.exp(best - top)",
    ),
    "an expert may be chosen twice": (
        'live_E = tl.where(e_E == index, float("-inf"), live_E)',
        "live_E += 0.0",
    ),
    "an absent expert may be chosen": (
        'live_E = tl.where(present_E, logits_E, float("-inf"))',
        'live_E = tl.where(e_E < E, logits_E, float("-inf"))',
    ),
    "the router reads token 1": ("token = tl.load(x_ptr + d)", "token = tl.load(x_ptr + D + d)"),
    "all rows share the router of path 0": ("(path * D + d[:, None]) * E", "(d[:, None]) * E"),
    "a path out of range is followed": ("if (path >= 0) & (path < P):", "if path >= 0:"),
    "a path's slot out of range is used": (
        "present_E = (slots_E >= 0) & (slots_E < S)",
        "present_E = slots_E >= 0",
    ),
    "a given slot out of range is used": (
        "there = (slot_K >= 0) & (slot_K < S)",
        "there = slot_K >= 0",
    ),
    "there is no ReLU": ("        if RELU:\n", "        if not RELU:\n"),
    "the bias of the hidden units is left out": (
        "hidden_MH += down_bias_H[None, :]",
        "hidden_MH += 0.0 * down_bias_H[None, :]",
    ),
    "the bias of the answer is not gated": (
        "tl.sum(gate_K[:, None] * up_bias_KN, axis=0)",
        "tl.sum(up_bias_KN, axis=0)",
    ),
    "the hidden units are not gated": (
        "(hidden_MH * gate_H[None, :]).to",
        "(hidden_MH * (gate_H[None, :] > 0)).to",
    ),
    "the dropout mask is left out": ("hidden_MH *= keep_MH.to(tl.float32)", "hidden_MH *= 1.0"),
    "the dropout mask is that of row 0": (
        "keep_ptr + b * L * (K * R) + m_M",
        "keep_ptr + m_M",
    ),
    "both products use the first matrix": ("up_H = down_H + R * D", "up_H = down_H"),
    "all experts of a row live in the first one's slot": (
        "mine_HK = (h_H // R)[:, None] == k_K[None, :]",
        "mine_HK = (h_H // H_PAD)[:, None] == k_K[None, :]",
    ),
    "the last step of the first product is left out": (
        "        for k0 in range(0, D, BLOCK_K):\n"
        "            kk_K = k0 + tl.arange(0, BLOCK_K)\n"
        "            x_MK = read(x_ptr, at_M, kk_K, within_M)\n"
        "            down_HK",
        "        for k0 in range(0, D - BLOCK_K, BLOCK_K):\n"
        "            kk_K = k0 + tl.arange(0, BLOCK_K)\n"
        "            x_MK = read(x_ptr, at_M, kk_K, within_M)\n"
        "            down_HK",
    ),
    "every split writes the first columns": ("first = split * (D // SPLIT)", "first = 0"),
    "a tile writes one token too many": ("within_M = (m_M < L)", "within_M = (m_M <= L)"),
    "all rows are row 0": (
        "b = (program // (SPLIT * tiles)).to(tl.int64)",
        "b = (program // (SPLIT * tiles * 1000)).to(tl.int64)",
    ),
    "the variance is divided by one column less": (
        "rstd_M = tl.rsqrt(spread_M / D + eps)\n        up_H",
        "rstd_M = tl.rsqrt(spread_M / (D - 1) + eps)\n        up_H",
    ),
    "steps' variances are added without their distance": (
        " + delta_M * delta_M * (seen * share)",
        "",
    ),
    "the norm has no bias": (
        "* weight_N[None, :] + bias_N[None, :]",
        "* weight_N[None, :]",
    ),
    "rows without experts miss the MLP's bias": (
        "y_MN = x_MN + tl.load(out_bias_ptr + nn_N).to(tl.float32)[None, :]",
        "y_MN = x_MN",
    ),
}

# The same of the kernel of low-rank updates.
LOW_RANK_MUTANTS = {
    "a slot out of range is used": ("if (slot >= 0) & (slot < S):", "if slot >= 0:"),
    "rows without a slot use the first": (
        "if (slot >= 0) & (slot < S):",
        "slot = tl.maximum(slot, 0)\n    if slot < S:",
    ),
    "the scale is left out": (
        "(hidden_MR * tl.load(scale_ptr + slot)).to",
        "hidden_MR.to",
    ),
    "the scale is that of the row's number": ("scale_ptr + slot", "scale_ptr + b"),
    "a slot's second matrix is found by the first one's size": (
        "up_ptr + slot * (R * O)",
        "up_ptr + slot * (R * I)",
    ),
    "what was there is forgotten": (
        "y_MN = read(y_ptr, m_M[:, None] * O, nn_N, within_M).to(tl.float32)",
        "y_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)",
    ),
    "ranks beyond the last are those of the next slot": (
        "tl.load(down_R + kk_K[None, :], mask=r_R < R, other=0.0)",
        "tl.load(down_R + kk_K[None, :])",
    ),
    "the last step of the first product is left out": (
        "range(0, I, BLOCK_K)",
        "range(0, I - BLOCK_K, BLOCK_K)",
    ),
    "the last step of the second product is left out": (
        "range(0, O // SPLIT, BLOCK_N)",
        "range(0, O // SPLIT - BLOCK_N, BLOCK_N)",
    ),
    "every split writes the first columns": ("split * (O // SPLIT) + n0", "n0"),
    "a tile writes one token too many": ("within_M = (m_M < L)", "within_M = (m_M <= L)"),
    "all rows read the x of row 0": ("x_ptr += b * L * I", "x_ptr += 0"),
    "the ranks are cut to x's precision before the scale": (
        "(hidden_MR * tl.load(scale_ptr + slot)).to(x_ptr.dtype.element_ty)",
        "(hidden_MR.to(tl.bfloat16) * tl.load(scale_ptr + slot)).to(x_ptr.dtype.element_ty)",
    ),
}


def written(folder: Path, name: str, text: str) -> Path:
    """Write a kernel's source to a file of its own."""
    path = folder / f"kernel_{name}.py"
    path.write_text(text)
    return path


def module(name: str, source: Path | None) -> ModuleType:
    """A kernel's module, or that of another source file.

    For the process in which it runs: importing it is what TRITON_INTERPRET has to come before.
    """
    if source is None:
        return importlib.import_module(name)
    if source.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(source.stem, source)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[source.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[source.stem])
    return sys.modules[source.stem]
