"""What all models have in common: an encoder in two halves, a head, and the outputs."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxmpc.nn.layers import Dense, Seen
from flaxmpc.nn.lazy import Lazy, State
from flaxmpc.nn.mask import Mask
from flaxmpc.nn.product import Product

Hidden = Float[Array, "batch token hidden"]


class Intermediates(NamedTuple):
    """What distillation matches and calibration looks at. Layers of a lazy state have no scores and no variances.

    Attributes:
        embeddings: (batch, token, hidden), after their normalisation; an array or a lazy state, as it was given.
        hidden_states: the output of every layer, each (batch, token, hidden), alike.
        scores: of every layer, Q K^T / sqrt(d) before the mask, each (batch, head, query, key).
        variances: of every layer, what its normalisations met in their order, each (batch, token, 1).
    """

    embeddings: Any
    hidden_states: tuple[Any, ...]
    scores: tuple[Any, ...]
    variances: tuple[tuple[Any, ...], ...]


class EncoderOutput(NamedTuple):
    """What an encoder gives: the last hidden state, (batch, token, hidden), and what led there."""

    hidden: State
    intermediates: Intermediates

    @classmethod
    def of(cls, embeddings: State, layers: list[tuple[State, Seen]]) -> "EncoderOutput":
        """From the embeddings and what each layer gave."""
        hidden_states = tuple(hidden for hidden, _ in layers)
        intermediates = Intermediates(
            embeddings,
            hidden_states,
            tuple(seen.scores for _, seen in layers),
            tuple(seen.variances for _, seen in layers),
        )
        return cls(hidden_states[-1] if layers else embeddings, intermediates)


class Outputs(NamedTuple):
    """A model's logits and what led there."""

    logits: Array
    intermediates: Intermediates


def first_token(hidden: State) -> State:
    """(batch, hidden) of (batch, token, hidden)."""
    return hidden.first() if isinstance(hidden, Lazy) else hidden[:, 0]


class WithHead(nn.Module):
    """An encoder and a head. The model is in two halves: `embed` is the client's where the embedding is public, and
    `from_embeddings` is what runs on shares; `__call__` is one after the other.

    A family's encoder is a submodule of the name `base_model_prefix`, as in HF. It has `embed`, and `encode`, which
    gives `EncoderOutput`. Its own submodules are `embeddings` and `layer_0`, `layer_1`, ..., each with an `attention`.
    """

    base_model_prefix: ClassVar[str]

    config: Any
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @property
    def encoder(self) -> Any:
        return getattr(self, self.base_model_prefix)

    def head(self, hidden: State, deterministic: bool) -> Array:
        """The logits from the last hidden state."""
        raise NotImplementedError

    def embed(
        self,
        input_ids: Array,
        token_type_ids: Array | None = None,
        attention_mask: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Hidden:
        """Ids (batch, token) -> embeddings. A mode of embedding whose lookup takes one-hot rows is given those.

        Args:
            attention_mask: where a part is right on some inputs only, so that padding may not be left as it is.
        """
        return self.encoder.embed(input_ids, token_type_ids, attention_mask, deterministic=deterministic)

    def outputs_from_embeddings(self, embeddings: State, mask: Mask, *, deterministic: bool = True) -> Outputs:
        """The logits, and what led there."""
        encoded = self.encoder.encode(embeddings, mask, deterministic=deterministic)
        return Outputs(self.head(encoded.hidden, deterministic), encoded.intermediates)

    def from_embeddings(self, embeddings: State, mask: Mask, *, deterministic: bool = True) -> Array:
        """The logits for embeddings (batch, token, hidden), or for a lazy state of them."""
        return self.outputs_from_embeddings(embeddings, mask, deterministic=deterministic).logits

    def outputs(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Outputs:
        """The logits for ids (batch, token), and what led there."""
        mask = self.config.mask(jnp.ones(input_ids.shape[:2]) if attention_mask is None else attention_mask)
        embeddings = self.embed(input_ids, token_type_ids, attention_mask, deterministic=deterministic)
        return self.outputs_from_embeddings(embeddings, mask, deterministic=deterministic)

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array:
        """The logits for ids (batch, token)."""
        return self.outputs(input_ids, attention_mask, token_type_ids, deterministic=deterministic).logits

    def _dense(self, features: int) -> Dense:
        initial = nn.initializers.normal(self.config.initializer_range)
        return Dense(features, kernel_init=initial, dtype=self.dtype, param_dtype=self.param_dtype)


def defer(config: Any, embeddings: Hidden, mask: Mask, product: Product) -> Lazy:
    """Embeddings as the lazy state with which a model of this config folds; see `flaxmpc.nn.lazy`."""
    unit = None if config.score_degree is None else mask.unit
    return Lazy.held(embeddings if unit is None else embeddings * unit.scale, unit, product)


def init_params(model: WithHead, seed: int = 0) -> dict[str, Any]:
    """Fresh parameters, a nested dict of float32 arrays."""
    input_ids = jnp.zeros((1, 2), jnp.int32)
    tokens = model.config.embedding.encode(input_ids, model.config.vocab_size)
    return jax.jit(model.init)(jax.random.key(seed), tokens)["params"]


def param_shapes(model: WithHead) -> dict[str, Any]:
    """The parameters as shapes and types, without computing any."""
    return jax.eval_shape(lambda: init_params(model))


def num_params(model: WithHead) -> int:
    """How many numbers the parameters are."""
    return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(model)))


def without_embeddings(model: WithHead, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model's parameters in two: the embeddings', and all others."""
    prefix = model.base_model_prefix
    encoder = dict(params[prefix])
    embeddings = encoder.pop("embeddings")
    return {prefix: {"embeddings": embeddings}}, {**params, prefix: encoder}
