"""The text tower learns to read as MiniLM does: distillation on short texts.

Starts from token embeddings that already mean something: MiniLM's reading of each token's letters,
in the 256 directions in which its sentence embeddings differ most.

Dimensions: N texts, B batch, L tokens, E embedding, V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from medley.mini import CONTEXT_LENGTH
from trainer.pretrain.loop import adamw, update

_WEIGHT_DECAY = 0.02
_COSINE_WEIGHT = 4.0
_RETRIEVAL_SCALE = 20.0
_WORD_PIECE = 0.4  # a piece of a word says less about the text than a whole word
_TOKEN_STD = 0.16
_BUCKET_BATCHES = 64  # so many batches are sorted by length together


@dataclass(frozen=True)
class TextTable:
    """Texts with what the teacher makes of them.

    Attributes:
        tokens: (N, L) token ids, zero after the end.
        lengths: (N,) tokens of each text, start and end included.
        targets: (N, E) centred teacher embeddings of length one.
        weights: (N,) how often a text is drawn, against the others.
    """

    tokens: Tensor
    lengths: NDArray[np.int64]
    targets: Tensor
    weights: NDArray[np.float64]

    @classmethod
    def build(
        cls,
        texts: list[str],
        targets_NE: Tensor,
        *,
        tokenizer: SimpleTokenizer,
        weights_N: NDArray[np.float64],
    ) -> TextTable:
        """Tokenise; texts that do not fit the context are never drawn."""
        tokens_NL = tokenizer(texts)
        lengths_N = (tokens_NL != 0).sum(1).numpy()
        return cls(
            tokens_NL, lengths_N, targets_NE, np.where(lengths_N < CONTEXT_LENGTH, weights_N, 0.0)
        )


def encode(model: CLIP, tokens_BL: Tensor) -> Tensor:
    """``model.encode_text`` for texts cut to their longest: the same numbers, several times faster.

    The tower is causal and reads off the end token, so what follows it never mattered.
    """
    length = tokens_BL.shape[1]
    x_BLD = model.token_embedding(tokens_BL) + model.positional_embedding[:length]
    x_BLD = model.transformer(x_BLD, attn_mask=model.attn_mask[:length, :length])
    x_BLD = model.ln_final(x_BLD)
    end_BD = x_BLD[torch.arange(len(tokens_BL)), tokens_BL.argmax(1)]
    features_BE: Tensor = end_BD @ model.text_projection
    return features_BE


@torch.no_grad()
def embed(model: CLIP, tokens_NL: Tensor, *, batch: int = 512) -> Tensor:
    """Normalised features of many texts, (N, E)."""
    lengths_N = (tokens_NL != 0).sum(1)
    order_N = lengths_N.argsort(stable=True)
    features_NE = torch.empty(len(tokens_NL), model.text_projection.shape[1])
    for some_B in order_N.split(batch):
        cut_BL = tokens_NL[some_B, : int(lengths_N[some_B].max())]
        features_NE[some_B] = F.normalize(encode(model, cut_BL), dim=-1)
    return features_NE


def start_from_teacher(
    model: CLIP, tokens_VE: Tensor, targets_NE: Tensor, *, whole_word_V: Tensor
) -> None:
    """Set token embeddings and projection from the teacher.

    Args:
        model: gets them.
        tokens_VE: centred teacher embedding of each token's letters; the last two rows, start and
            end, are not used.
        targets_NE: a sample of what is to be learnt, for its principal directions.
        whole_word_V: whether a token ends a word.
    """
    width = model.token_embedding.weight.shape[1]
    directions_ED = torch.linalg.svd(targets_NE, full_matrices=False).Vh[:width].T
    start_VD = tokens_VE @ directions_ED
    start_VD = start_VD / start_VD.std() * _TOKEN_STD
    start_VD = torch.where(whole_word_V[:, None], start_VD, _WORD_PIECE * start_VD)
    with torch.no_grad():
        model.token_embedding.weight[:-2] = start_VD[:-2]
        model.text_projection.copy_(directions_ED.T)


class TextLearner:
    """Trains the text tower of ``model``; see `loop.Learner`."""

    def __init__(self, model: CLIP, table: TextTable, *, batch: int, seed: int) -> None:
        self._model = model
        self._table = table
        self._batch = batch
        self._seed = seed
        self._named = {
            name: parameter
            for name, parameter in model.named_parameters()
            if not name.startswith("visual.") and name != "logit_scale"
        }
        self._optimizer = adamw(self._named.items(), weight_decay=_WEIGHT_DECAY)
        self._bucket = (-1, np.empty((0, 0), np.int64))

    def step(self, index: int, learning_rate: float) -> dict[str, float]:
        """One batch of texts of about the same length."""
        rows = self._rows(index)
        length = int(self._table.lengths[rows].max())
        target_BE = self._table.targets[rows]
        text_BE = F.normalize(encode(self._model, self._table.tokens[rows, :length]), dim=-1)
        cosine = (text_BE * target_BE).sum(1).mean()
        logits_BB = _RETRIEVAL_SCALE * text_BE @ target_BE.T
        wanted_BB = torch.softmax(_RETRIEVAL_SCALE * target_BE @ target_BE.T, 1)
        retrieval = -(wanted_BB * logits_BB.log_softmax(1)).sum(1).mean()
        update(self._optimizer, _COSINE_WEIGHT * (1 - cosine) + retrieval, learning_rate)
        return {"cosine": cosine.item(), "retrieval": retrieval.item()}

    def state_dict(self) -> dict[str, Any]:
        """Tower and optimizer."""
        tower = {name: parameter.detach() for name, parameter in self._named.items()}
        return {"tower": tower, "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a `state_dict`."""
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(state["tower"][name])
        self._optimizer.load_state_dict(state["optimizer"])

    @staticmethod
    def restore(model: CLIP, state: dict[str, Any]) -> None:
        """Put a trained tower into another model."""
        _, unexpected = model.load_state_dict(state["tower"], strict=False)
        assert not unexpected, unexpected

    def _rows(self, index: int) -> NDArray[np.int64]:
        """Rows of the table for a step: drawn many batches at a time, then sorted by length."""
        number, place = divmod(index, _BUCKET_BATCHES)
        if self._bucket[0] != number:
            chance = np.random.default_rng((self._seed, number))
            share = self._table.weights / self._table.weights.sum()
            drawn = chance.choice(len(share), self._batch * _BUCKET_BATCHES, p=share)
            drawn = drawn[np.argsort(self._table.lengths[drawn], kind="stable")]
            batches = drawn.reshape(_BUCKET_BATCHES, self._batch)
            self._bucket = (number, chance.permutation(batches))
        return self._bucket[1][place]
