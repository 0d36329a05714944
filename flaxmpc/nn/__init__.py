"""Pluggable parts: attention, activations, normalisation, embedding."""

from flaxmpc.nn.activation import ACTIVATIONS, Activation
from flaxmpc.nn.attention import ATTENTION, Attention, Constant, Keys, PerHead, RowSum
from flaxmpc.nn.embedding import EMBEDDINGS, Embedding
from flaxmpc.nn.normalization import NORMALIZATIONS, LayerNorm, Newton

__all__ = [
    "ACTIVATIONS",
    "ATTENTION",
    "EMBEDDINGS",
    "NORMALIZATIONS",
    "Activation",
    "Attention",
    "Constant",
    "Embedding",
    "Keys",
    "LayerNorm",
    "Newton",
    "PerHead",
    "RowSum",
]
