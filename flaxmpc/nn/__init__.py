"""Pluggable parts: attention, activations, normalisation, embedding; and the layers that take them."""

from flaxmpc.nn.activation import ACTIVATIONS, Activation
from flaxmpc.nn.attention import ATTENTION, Attention, Constant, PerHead, RowSum, Unnormalised
from flaxmpc.nn.embedding import EMBEDDINGS, Embedding
from flaxmpc.nn.layers import Dense, Norm, PostNormBlock, PreNormBlock, SelfAttention
from flaxmpc.nn.lazy import Lazy, Stream, Unit
from flaxmpc.nn.mask import Mask, causal
from flaxmpc.nn.normalization import NORMALIZATIONS, Chebyshev, Exact

__all__ = [
    "ACTIVATIONS",
    "ATTENTION",
    "EMBEDDINGS",
    "NORMALIZATIONS",
    "Activation",
    "Attention",
    "Chebyshev",
    "Constant",
    "Dense",
    "Embedding",
    "Exact",
    "Lazy",
    "Mask",
    "Norm",
    "PerHead",
    "PostNormBlock",
    "PreNormBlock",
    "RowSum",
    "SelfAttention",
    "Stream",
    "Unit",
    "Unnormalised",
    "causal",
]
