"""The layers of a Transformer, each written once. Given an array they compute; given a `Lazy` state they defer.

The plain model is trained. The lazy one is the same function of the same parameters, as it runs on secret shares: see
`flaxmpc.nn.lazy`. `dtype` and `param_dtype` are as Flax has them: of the computation, and of the parameters.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.errors import ScopeParamShapeError
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from flaxmpc.nn.activation import IDENTITY, ActivationPart, SquareForm, Squares
from flaxmpc.nn.attention import AttentionPart, Homogeneous, Scalars, Shareable, folded, scalars_of, scores_of
from flaxmpc.nn.lazy import Lazy, State, Stream, Unit, side_by_side, size, square_mean_by_product
from flaxmpc.nn.mask import Mask
from flaxmpc.nn.normalization import EXACT, InverseRoot, Linear, Normalization, Ranged, centred, variance
from flaxmpc.nn.product import Product

STRAINS = "strains"
"""The Flax collection, where it is mutable, of every lazy normalisation's strain: see `Ranged`."""


def param(module: nn.Module, name: str, init: Any, shape: tuple[int, ...]) -> Any:
    """A parameter of a module, of its `param_dtype`: as `Module.param` makes it, or finds it.

    To compare a shape Flax traces `init` wherever a parameter is used, which took an eighth of the time that a model
    takes to trace.

    Raises:
        ScopeParamShapeError: it is there with another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape, getattr(module, "param_dtype"))  # noqa: B009
    value = module.get_variable("params", name)
    if jnp.shape(value) != shape:
        raise ScopeParamShapeError(name, "/" + "/".join(module.path), shape, jnp.shape(value))
    return value


class Dense(nn.Module):
    """x W + b.

    Attributes:
        features: how many features the output has.
    """

    features: int
    kernel_init: Any = nn.initializers.normal(0.02)
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: State) -> State:
        kernel = param(self, "kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = param(self, "bias", nn.initializers.zeros, (self.features,))
        if isinstance(x, Lazy):
            return (x @ kernel).plus(bias)
        array, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        return array @ kernel + bias


class Norm(nn.Module):
    """A normalisation over the features, times scale, plus bias.

    Attributes:
        part: the normalisation, such as those in `flaxmpc.nn.normalization.NORMALIZATIONS`.
        epsilon: added to the variance.
    """

    part: Normalization = EXACT
    epsilon: float = 1e-12
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: State | Stream, into: Unit | None = None) -> State:
        """Args: into: the unit that a lazy result is wanted in; an array has none."""
        scale = param(self, "scale", nn.initializers.ones, (x.shape[-1],))
        bias = param(self, "bias", nn.initializers.zeros, (x.shape[-1],))
        if isinstance(x, Lazy):
            return self._lazy(x, scale, bias, into)
        if isinstance(x, Stream):
            assert isinstance(self.part, InverseRoot), "a stream is for what divides by a deviation"
            assert self.part.centres == x.centres, "a stream is centred, or not, for all normalisations"
            return self._divided(x.value, None, scale, bias, into, x.product)
        array, scale, bias = promote_dtype(x, scale, bias, dtype=self.dtype)
        wide = array.astype(jnp.promote_types(array.dtype, jnp.float32))  # a mean of squares needs its bits
        return self.part(wide, self.epsilon).astype(array.dtype) * scale + bias

    def _lazy(self, x: Lazy, scale: Array, bias: Array, into: Unit | None) -> Lazy:
        """What is left of it is the division: the matrices take the mean, and those that follow scale and bias.

        It is computed `size` times too large, so that the mean square has a power of two as its divisor.
        """
        part = self.part
        if isinstance(part, Linear):
            return self._linear(x.map(lambda rows: part(rows, self.epsilon)), scale, bias, into)
        if not isinstance(part, InverseRoot):
            y = part(x.force() if x.unit is None else x.force() * x.unit.inverse, self.epsilon)
            return Lazy((y if into is None else y * into.scale,), (scale,), bias, into, x.product)
        factor = part.preferred_factor if isinstance(part, Ranged) else 1.0
        times = size(x.shape[-1]) * math.sqrt(factor)
        c = x.map(lambda rows: (centred(rows) if part.centres else rows) * times).force()
        return self._divided(c, x.unit, scale, bias, into, x.product, factor)

    def _linear(self, x: Lazy, scale: Array, bias: Array, into: Unit | None) -> Lazy:
        """x, to which the part was applied. It is computed where its unit changes, and where its matrices would grow
        from block to block: after attention it has two arrays, after the feed-forward three.
        """
        if x.unit is into and len(x.arrays) <= 2:
            return x.map(lambda rows: rows * scale).plus(bias)
        y = x.force()
        if x.unit is not into:
            y = y if x.unit is None else y * x.unit.inverse
            y = y if into is None else y * into.scale
        return Lazy((y,), (scale,), bias, into, x.product)

    def _divided(
        self,
        c: Array,
        unit: Unit | None,
        scale: Array,
        bias: Array,
        into: Unit | None,
        product: Product,
        factor: float = 1.0,
    ) -> Lazy:
        """c, whose variance is `factor` times as large, by its deviation. The result's matrix takes `size` away."""
        part: Any = self.part.scaled(factor) if isinstance(self.part, Ranged) else self.part
        variance = square_mean_by_product(c, product) + self.epsilon * factor
        wanted = None if into is None else into.scale
        if isinstance(part, Ranged):
            root, strain = part.strained(variance, wanted, unit)
            self.sow(STRAINS, "strain", strain)
        else:
            root = part.inverse_root(variance, wanted, unit)
        return Lazy((c * root,), (scale / size(c.shape[-1]),), bias, into, product)


def activate(x: State, act: ActivationPart) -> State:
    """The activation of a dense layer's output. A square folds its scale and shift into that layer."""
    if not isinstance(x, Lazy):
        return act(x)
    if act == IDENTITY:
        return x
    form: SquareForm | None = act.square_form if isinstance(act, Squares) else None
    if form is None:
        return Lazy.held(act(x.force()), product=x.product)
    square = jnp.square(x.map(lambda rows: rows * form.scale).plus(form.shift).force())
    return Lazy.held(square, product=x.product).plus(form.offset)


class Weights(NamedTuple):
    """What an attention weighs the values with, for layers that share its scores.

    Attributes:
        numerators: (batch, head, query, key).
        scalars: what is left of the part's scalars for `Shareable.mixed`.
        for_value: of a lazy state, the factor (head,) of the values' matrix that the scalars fold into.
        scores: of an array, Q K^T / sqrt(d) (+ bias).
    """

    numerators: Float[Array, "batch head query key"]
    scalars: Scalars
    for_value: Any = None
    scores: Float[Array, "batch head query key"] | None = None

    def first(self, count: int) -> "Weights":
        """Those of the first queries."""
        return self._replace(numerators=self.numerators[:, :, :count])


class SelfAttention(nn.Module):
    """Multi-head self-attention with an attention part.

    Attributes:
        part: the attention, such as those in `flaxmpc.nn.attention.ATTENTION`.
        num_heads: how many heads share the features; it divides their number.
        dropout: rate, for the attention's weights while training.
        gives_weights: whether other layers share the scores. Then it also returns `Weights`; the part is `Shareable`.
    """

    part: AttentionPart
    num_heads: int
    dropout: float = 0.0
    kernel_init: Any = nn.initializers.normal(0.02)
    dtype: Any = None
    param_dtype: Any = jnp.float32
    gives_weights: bool = False

    @nn.compact
    def __call__(
        self,
        x: State,
        mask: Mask,
        bias: Array | None = None,
        deterministic: bool = True,
        queries: Lazy | None = None,
        weights: Weights | None = None,
    ) -> tuple[State, Float[Array, "batch head query key"] | None, Weights | None]:
        """The output; the scores, of an array; and the weights, where it `gives_weights`.

        Args:
            bias: what is added to the scores, (1 or batch, head, query, key), as for positions; a unit is in it
                already.
            queries: the first tokens of a lazy state, where nobody reads the output of the others.
            weights: those of an earlier layer, whose scores this one shares: it has no queries, keys and scalars.
        """
        features = x.shape[-1]
        options = {"kernel_init": self.kernel_init, "dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = {name: Dense(features, name=name, **options) for name in ("query", "key", "value", "output")}
        if queries is not None:
            count = queries.shape[1]
            mask, bias = mask.first(count), None if bias is None else bias[:, :, :count]
        if weights is not None:
            if isinstance(x, Lazy):
                read = x if queries is None else queries
                context = self._lazily_mixed(dense["value"](x), mask, weights.first(read.shape[1]), read.unit)
            else:
                context = self._mixed(dense["value"](x), mask, weights, deterministic)
            return dense["output"](context), weights.scores, weights
        sources = {"query": x if queries is None else queries, "key": x, "value": x}
        projected = [dense[name](source) for name, source in sources.items()]
        start = scalars_of(self.part, self.num_heads)
        scalars = {name: jnp.asarray(self.param(name, lambda _, value=value: value)) for name, value in start.items()}
        if isinstance(x, Lazy):
            scores, (context, given) = None, self._lazy(projected, mask, scalars, bias, together=queries is None)
        else:
            context, scores, given = self._plain(projected, mask, scalars, bias, deterministic)
        return dense["output"](context), scores, given

    def _split(self, y: Float[Array, "batch token features"]) -> Float[Array, "batch head token depth"]:
        return y.reshape(*y.shape[:2], self.num_heads, -1).transpose(0, 2, 1, 3)

    @staticmethod
    def _merge(context: Float[Array, "batch head token depth"]) -> Float[Array, "batch token features"]:
        batch, heads, tokens, depth = context.shape
        return context.transpose(0, 2, 1, 3).reshape(batch, tokens, heads * depth)

    def _dropout(self, deterministic: bool) -> Any:
        return None if deterministic else nn.Dropout(self.dropout, deterministic=False)

    def _plain(
        self, projected: list[Any], mask: Mask, scalars: Scalars, bias: Array | None, deterministic: bool
    ) -> tuple[Array, Array, Weights | None]:
        query, key, value = map(self._split, projected)
        query = query / math.sqrt(query.shape[-1])
        scores = scores_of(query, key, bias)
        if self.gives_weights:
            numerators = self._shareable.numerators(query, key, mask, scalars, bias=bias)
            weights = Weights(numerators, scalars, scores=scores)
            return self._mixed(projected[2], mask, weights, deterministic), scores, weights
        context = self.part(query, key, value, mask, scalars, bias=bias, dropout=self._dropout(deterministic))
        return self._merge(context), scores, None

    def _lazy(
        self, projected: list[Any], mask: Mask, scalars: Scalars, bias: Array | None, together: bool
    ) -> tuple[Lazy, Weights | None]:
        """What can be of the scalars goes into the matrices. `together`: one product makes queries, keys and values."""
        query, key, value = projected
        unit, product, heads = query.unit, query.product, self.num_heads
        depth = query.shape[-1] // heads
        for_query, for_value, scalars = folded(self.part, scalars, heads, query=bias is None)
        query = query.map(lambda rows: rows * jnp.repeat(for_query / math.sqrt(depth), depth))
        value = value.map(lambda rows: rows * jnp.repeat(for_value, depth))
        if unit is not None and "shift" in scalars:  # one more feature of queries and keys, whose product is a^2 c
            query = _with_feature(query, scalars["shift"])
            key = _with_feature(key, jnp.ones((heads,)))
        products = [[query, key, value]] if together else [[query], [key, value]]
        q, k, v = (self._split(y) for states in products for y in _forced(states))
        if unit is not None:
            if left := sorted(scalars.keys() - {"shift"}):
                raise ValueError(
                    f"attention {self.part.name!r} says that it folds, but {left[0]!r} is left of its scalars"
                )
            scalars = {}
        weights = None
        if self.gives_weights:
            numerators = self._shareable.numerators(q, k, mask, scalars, bias=bias, product=product)
            weights = Weights(numerators, scalars, for_value)
            context = self._context(v, mask, weights, unit, product)
        elif unit is None:
            context = self.part(q, k, v, mask, scalars, bias=bias, product=product)
        else:
            assert isinstance(self.part, Homogeneous), "a state has a unit where attention takes it"
            context = self.part.mix(q, k, v, mask, bias=bias, product=product)
        return Lazy.held(self._merge(context), unit, product), weights

    @property
    def _shareable(self) -> Shareable:
        assert isinstance(self.part, Shareable), "a config has no other where layers share scores"
        return self.part

    def _mixed(self, value: Any, mask: Mask, weights: Weights, deterministic: bool) -> Array:
        """The context of values, by weights that are there."""
        split, dropout = self._split(value), self._dropout(deterministic)
        return self._merge(self._shareable.mixed(weights.numerators, split, mask, weights.scalars, dropout=dropout))

    def _lazily_mixed(self, value: Any, mask: Mask, weights: Weights, unit: Unit | None) -> Lazy:
        """The same of a lazy state, in the unit of the queries."""
        factor = jnp.repeat(weights.for_value, value.shape[-1] // self.num_heads)
        forced = self._split(value.map(lambda rows: rows * factor).force())
        return Lazy.held(self._merge(self._context(forced, mask, weights, unit, value.product)), unit, value.product)

    def _context(self, value: Array, mask: Mask, weights: Weights, unit: Unit | None, product: Product) -> Array:
        """Of a lazy state's values, forced. With a unit mask and 1/n are in values and numerators already."""
        if unit is not None:
            return product(weights.numerators, value)
        return self._shareable.mixed(weights.numerators, value, mask, weights.scalars, product=product)


def _forced(states: list[Lazy]) -> list[Array]:
    """The values of states that are read from the same arrays: one product."""
    ends = np.cumsum([state.shape[-1] for state in states])[:-1]
    return jnp.split(side_by_side(states).force(), ends.tolist(), -1)


def _with_feature(x: Lazy, value: Float[Array, " head"]) -> Lazy:
    """The features of each head, and one more that is the same number for every token."""
    heads = value.shape[0]

    def grown(rows: Array, last: Array) -> Array:
        by_head = rows.reshape(*rows.shape[:-1], heads, -1)
        last = jnp.broadcast_to(last, by_head.shape[:-1])[..., None]
        return jnp.concatenate([by_head, last], -1).reshape(*rows.shape[:-1], -1)

    matrices = tuple(grown(jnp.diag(m) if m.ndim == 1 else m, jnp.zeros((heads,))) for m in x.matrices)
    return x.replace(matrices=matrices, bias=grown(x.bias, value))


class Seen(NamedTuple):
    """What a block gives beside its output. What distillation and calibration look at is None where it was lazy.

    Attributes:
        scores: Q K^T / sqrt(d) (+ bias) before the mask, (batch, head, query, key).
        variances: (batch, token, 1) each, what the block's normalisations met, in their order.
        weights: of the attention, for the blocks that share its scores; None where none does. Lazy ones have them too.
    """

    scores: Float[Array, "batch head query key"] | None
    variances: tuple[Float[Array, "batch token 1"] | None, ...]
    weights: Weights | None


class _Block(nn.Module):
    """What blocks of either kind have.

    Attributes:
        attention_part, hidden_act: parts.
        norms: parts, of the attention and of the feed-forward.
        num_attention_heads: how many heads the attention has.
        intermediate_size: how many features the feed-forward has between its matrices.
        epsilon: what the normalisations add to a variance.
        hidden_dropout, attention_dropout: rates while training.
        gives_weights: whether later blocks share the attention's scores.
    """

    attention_part: AttentionPart
    hidden_act: ActivationPart
    norms: tuple[Normalization, Normalization]
    num_attention_heads: int
    intermediate_size: int
    epsilon: float = 1e-12
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    kernel_init: Any = nn.initializers.normal(0.02)
    dtype: Any = None
    param_dtype: Any = jnp.float32
    gives_weights: bool = False

    def _attention(self) -> SelfAttention:
        rest = (self.attention_dropout, self.kernel_init, self.dtype, self.param_dtype, self.gives_weights)
        return SelfAttention(self.attention_part, self.num_attention_heads, *rest, name="attention")

    def _norm(self, place: int, name: str) -> Norm:
        return Norm(self.norms[place], self.epsilon, self.dtype, self.param_dtype, name=name)

    def _feed_forward(self, x: State, features: int) -> State:
        rest = (self.kernel_init, self.dtype, self.param_dtype)
        x = activate(Dense(self.intermediate_size, *rest, name="intermediate")(x), self.hidden_act)
        return Dense(features, *rest, name="output")(x)


class PostNormBlock(_Block):
    """Attention and feed-forward, each with a residual and then a normalisation, as in BERT."""

    @nn.compact
    def __call__(
        self,
        x: State,
        mask: Mask,
        bias: Array | None = None,
        deterministic: bool = True,
        into: Unit | None = None,
        first: bool = False,
        weights: Weights | None = None,
    ) -> tuple[State, Seen]:
        """The block's output, of a lazy state only the first token's, (batch, 1, hidden), where `first` says so.

        Args:
            bias, weights: what attention adds to its scores, and whose scores it shares, see `SelfAttention`.
            into: the unit that a lazy result is wanted in, of the next block.
        """
        dropout = nn.Dropout(self.hidden_dropout, deterministic=deterministic)
        queries = x.tokens(1) if first and isinstance(x, Lazy) else None
        y, scores, given = self._attention()(x, mask, bias, deterministic, queries, weights)
        x = _sum(x if queries is None else queries, y, dropout)
        met = _met(self.norms[0], x)
        x = self._norm(0, "attention_layer_norm")(x)
        x = _sum(x, self._feed_forward(x, x.shape[-1]), dropout)
        seen = Seen(scores, (met, _met(self.norms[1], x)), given)
        return self._norm(1, "output_layer_norm")(x, into), seen


class PreNormBlock(_Block):
    """Attention and feed-forward, each of a normalised state, with a residual, as in GPT-2 and ViT.

    On shares its state is a `Stream`. A normalisation follows the last block.
    """

    @nn.compact
    def __call__(
        self,
        x: State | Stream,
        mask: Mask,
        bias: Array | None = None,
        deterministic: bool = True,
        weights: Weights | None = None,
    ) -> tuple[Any, Seen]:
        """Args: bias, weights: what attention adds to its scores, and whose scores it shares, see `SelfAttention`."""
        dropout = nn.Dropout(self.hidden_dropout, deterministic=deterministic)
        first = _met(self.norms[0], x)
        normed = self._norm(0, "attention_layer_norm")(x)
        y, scores, given = self._attention()(normed, mask, bias, deterministic, None, weights)
        x = _sum(x, y, dropout)
        seen = Seen(scores, (first, _met(self.norms[1], x)), given)
        return _sum(x, self._feed_forward(self._norm(1, "output_layer_norm")(x), x.shape[-1]), dropout), seen


def _sum(x: Any, y: State, dropout: nn.Dropout) -> Any:
    """The residual; nothing is dropped of a lazy state."""
    return x + y if isinstance(y, Lazy) else x + dropout(y)


def _met(part: Normalization, x: State | Stream) -> Float[Array, "batch token 1"] | None:
    return None if isinstance(x, (Lazy, Stream)) else variance(part, x)
