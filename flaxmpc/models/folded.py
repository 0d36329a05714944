"""BERT as it runs on shares: what `flaxmpc.convert.fold` makes of the model in `flaxmpc.models.bert`.

The state between layers is not the hidden state x = scale z + bias but u = a z: z is x before the LayerNorm's scale
and bias, and a = m n^(-1/2k) of a numerator of degree k, with m the mask and n the number of tokens. Then

- a matrix reads [u, a], its bias being one more row, so that padding stays exactly zero;
- the scores are a^2 times theirs, so the numerators are 1/n times theirs, and 0 at padding: mask and normaliser cost
  nothing; c is one more column of queries, with a for its key;
- c, of which z is a multiple, is centred by the matrix that makes it, and sized so that its squares' mean needs only
  a power of two as divisor;
- the residual is more rows of the matrix after it, and so are scale, bias and mean of the LayerNorm before and
  after: what is left of a LayerNorm is the division by the deviation, which takes a away too.

Where a model's attention parts have no common degree (row sums, exponentials), a = 1, and they run as they are.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxmpc.models.config import BertConfig
from flaxmpc.nn.attention import Keys, grouped_conv, matmul
from flaxmpc.nn.normalization import Unit, square_mean_by_product

State = Float[Array, "batch token hidden"]


class FoldedLayer(nn.Module):
    """One layer on the state u; the last one's output is z."""

    config: BertConfig
    layer: int

    @nn.compact
    def __call__(self, u: State, keys: Keys) -> State:
        config = self.config
        degree = config.score_degree
        after_attention, after_feed_forward = config.layer_norms_of(self.layer)
        last = self.layer == config.num_hidden_layers - 1
        a = jnp.ones_like(u[..., :1]) if degree is None else keys.scale[..., None]

        context = self.context(jnp.concatenate([u, a], -1), keys)
        c = nn.Dense(config.hidden_size, use_bias=False, name="attention_output")(jnp.concatenate([context, u, a], -1))
        unit = None if degree is None else Unit(keys.inverse[..., None], keys.inverse_square[..., None])
        z = c * after_attention(square_mean_by_product(c) + config.layer_norm_eps, unit=unit)

        h = config.hidden_act_of(self.layer)(nn.Dense(config.intermediate_size, name="intermediate")(z))
        c = nn.Dense(config.hidden_size, name="output")(jnp.concatenate([h, z], -1))
        return c * after_feed_forward(
            square_mean_by_product(c) + config.layer_norm_eps, None if last or degree is None else a
        )

    def context(self, x: Float[Array, "batch token hidden_1"], keys: Keys) -> State:
        """The attention's output for x = [u, a], heads side by side."""
        config = self.config
        part = config.attention_of(self.layer)
        heads = config.num_attention_heads
        homogeneous = config.score_degree is not None
        shift = part.initial_shift(heads)
        query_size = config.hidden_size + (heads if homogeneous and shift is not None else 0)

        def split(y_BxTxF: Array) -> Array:
            return y_BxTxF.reshape(*y_BxTxF.shape[:2], heads, -1).transpose(0, 2, 1, 3)

        qkv = nn.Dense(2 * query_size + config.hidden_size, use_bias=False, name="qkv")(x)
        query, key, value = (split(y) for y in jnp.split(qkv, (query_size, 2 * query_size), -1))
        product = grouped_conv if config.grouped_heads else matmul
        scores = product(query, key.swapaxes(-1, -2))
        if homogeneous:
            nothing = None if shift is None else jnp.zeros_like(shift)
            context = product(part.numerator(scores, keys, nothing), value)
        else:
            if shift is not None:
                shift = self.param("shift", lambda _: shift)
            numerator = part.numerator(scores, keys, shift)
            context = part.normalise(numerator, value, keys, None, product)
        return context.transpose(0, 2, 1, 3).reshape(*x.shape[:2], config.hidden_size)
