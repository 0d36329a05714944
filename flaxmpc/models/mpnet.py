"""MPNet (Song et al., arXiv 2004.09297): RoBERTa's encoder, and a bias of relative positions that all layers share."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flaxmpc.models.base import Family, WithHead, register
from flaxmpc.models.config import EncoderConfig
from flaxmpc.models.encoder import Encoder
from flaxmpc.models.heads import (
    LM_HEAD_NAMES,
    LM_HEAD_TIED,
    LM_HEADS,
    AnswerHead,
    FirstTokenHead,
    MaskedLMHead,
    TokenHead,
)
from flaxmpc.nn.layers import param

# The distance from which on all are alike.
_FARTHEST = 128


@dataclasses.dataclass(frozen=True)
class MPNetConfig(EncoderConfig):
    """The shape of an MPNet and its parts; the defaults are HF's.

    Attributes:
        relative_attention_num_buckets: how many buckets the distances of two tokens fall in, both directions together.
    """

    model_type: ClassVar[str] = "mpnet"
    has_token_types: ClassVar[bool] = False
    shares_bias: ClassVar[bool] = True
    # From where a quarter of them is one, to where a quarter reaches all distances that are told apart.
    whole_numbers: ClassVar[Mapping[str, tuple[int, int]]] = {"relative_attention_num_buckets": (4, 4 * _FARTHEST - 1)}

    vocab_size: int = 30527
    type_vocab_size: int = 0
    pad_token_id: int = 1
    relative_attention_num_buckets: int = 32

    @property
    def first_position(self) -> int:
        return self.pad_token_id + 1


def buckets(distances: Int[np.ndarray, " distance"], count: int) -> Int[np.ndarray, " distance"]:
    """The bucket of each distance, key's place less query's: half of them are for keys after the query.

    A quarter has one distance each, the next quarter distances up to `_FARTHEST` by their logarithm.
    """
    half, exact = count // 2, count // 4
    away = np.abs(distances)
    with np.errstate(divide="ignore"):
        # In single precision, as HF computes it: a distance at an edge falls in the same bucket.
        log = np.log(away.astype(np.float32) / np.float32(exact)) / np.float32(math.log(_FARTHEST / exact))
    far = exact + np.where(away > 0, log * np.float32(half - exact), 0).astype(np.int64)
    return np.where(away < exact, away, np.minimum(far, half - 1)) + half * (distances > 0)


class RelativeBias(nn.Module):
    """The bias of each pair of tokens, (1, head, query, key), from a table of biases (bucket, head)."""

    config: MPNetConfig
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, num_tokens: int) -> Float[Array, "1 head query key"]:
        """It depends on their distance, so the owner looks up one number for each distance that there can be.

        What makes a matrix of them repeats and cuts, which costs nothing on shares, and is the same for every length.
        """
        config, n = self.config, num_tokens
        most, heads, count = config.num_positions, config.num_attention_heads, config.relative_attention_num_buckets
        initial = nn.initializers.normal(config.initializer_range)
        table = jnp.asarray(param(self, "table", initial, (count, heads)))
        by_distance_HxD = table[buckets(np.arange(1 - most, most + 1), count)].T
        near_HxD = by_distance_HxD[:, most - n : most + n]  # from 1 - n to n
        # In rows of one number more than there are, each starts one distance later: row r has those from r + 1 - n on.
        rows = jnp.broadcast_to(near_HxD[:, None], (heads, n + 1, 2 * n)).reshape(heads, -1)
        shifted = rows[:, : n * (2 * n + 1)].reshape(heads, n, 2 * n + 1)[:, :, :n]
        return shifted[:, ::-1][None]


class MPNetEncoder(Encoder):
    """BERT's encoder with `RelativeBias`."""

    def setup(self):
        super().setup()
        self.relative_attention_bias = RelativeBias(self.config, self.param_dtype)

    def position_bias(self, num_tokens: int) -> Float[Array, "1 head query key"]:
        return self.relative_attention_bias(num_tokens)


class _MPNet(WithHead):
    base_model_prefix: ClassVar[str] = "mpnet"
    encoder_class: ClassVar[type[Encoder]] = MPNetEncoder


class MPNetForSequenceClassification(FirstTokenHead, _MPNet):
    """MPNet that gives a label for a text, see `FirstTokenHead`."""


class MPNetForTokenClassification(TokenHead, _MPNet):
    """MPNet that gives a label for every token, see `TokenHead`."""


class MPNetForQuestionAnswering(AnswerHead, _MPNet):
    """MPNet that gives the answer to a question in the text, see `AnswerHead`."""


class MPNetForMaskedLM(MaskedLMHead, _MPNet):
    """MPNet that gives the words that stood at masked tokens, see `MaskedLMHead`."""


_LAYER, _THEIRS = r"mpnet/layer_(\d+)/", r"mpnet.encoder.layer.\1."

MPNET = register(
    Family(
        MPNetConfig,
        (MPNetForSequenceClassification, MPNetForTokenClassification, MPNetForQuestionAnswering, MPNetForMaskedLM),
        names=(
            (r"mpnet/embeddings/(word|position)_embeddings", r"mpnet.embeddings.\1_embeddings.weight"),
            (r"mpnet/embeddings/layer_norm/", "mpnet.embeddings.LayerNorm."),
            (r"mpnet/relative_attention_bias/table", "mpnet.encoder.relative_attention_bias.weight"),
            (f"{_LAYER}attention/query/", f"{_THEIRS}attention.attn.q."),
            (f"{_LAYER}attention/key/", f"{_THEIRS}attention.attn.k."),
            (f"{_LAYER}attention/value/", f"{_THEIRS}attention.attn.v."),
            (f"{_LAYER}attention/output/", f"{_THEIRS}attention.attn.o."),
            (rf"{_LAYER}attention/(\w+)$", rf"{_THEIRS}attention.attn.\2"),
            (f"{_LAYER}attention_layer_norm/", f"{_THEIRS}attention.LayerNorm."),
            (f"{_LAYER}(intermediate|output)/", rf"{_THEIRS}\2.dense."),
            (f"{_LAYER}output_layer_norm/", f"{_THEIRS}output.LayerNorm."),
            *LM_HEAD_NAMES,
        ),
        tied={"lm_head.decoder.weight": "mpnet.embeddings.word_embeddings.weight", **LM_HEAD_TIED},
        heads=LM_HEADS,
    )
)
