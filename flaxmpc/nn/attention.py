"""Attention weights as a pair: numerator x normaliser. Every published variant is one choice of each.

Notation: scores s = Q K^T / sqrt(d) (+ a position's bias), key mask m in {0, 1}, n = number of keys that a query
sees, V the values.

    row sum      context_i = sum_j f(s_ij) m_j V_j / sum_j f(s_ij) m_j
    constant     context_i = r sum_j f(s_ij) (m_j / n) V_j            (r: one trainable scalar per head)
    none         context_i = sum_j f(s_ij) V_j                        (f is 0 at m_j = 0, and its row sums are 1)

The mask is multiplied into V, never added to the scores: under fixed point (-1e4 + 5)^2 is at the ring's edge. One
product of V with the mask (S x d) then serves numerator and normaliser, where masking the weights costs S x S.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxmpc.nn.mask import Mask
from flaxmpc.nn.parts import Registry
from flaxmpc.nn.product import Product, matmul

Queries = Float[Array, "batch head query depth"]
Keys = Float[Array, "batch head key depth"]
Values = Float[Array, "batch head key features"]
Context = Float[Array, "batch head query features"]
Scores = Float[Array, "batch head query key"]
PerHeadScalar = Float[Array, " head"]
Scalars = Mapping[str, Float[Array, "..."]]
"""The trainable scalars of a part, (head,) each, by name: ours have `shift`, the c of (s + c)^2, and `scale`, r."""

# Dropout of weights while training; None in evaluation and under MPC.
Dropout = Callable[[Scores], Scores]


# --------------------------------------------------------------------------------------------------- numerators


# How far a masked key's score is lowered while a row's maximum is taken: below any real score.
_BELOW_ALL_SCORES = 1000.0


def _exp_limit(root: Array) -> Array:
    """(1 + x/2^5)^(2^5) from 1 + x/2^5: PUMA's exponential, five squarings."""
    for _ in range(5):
        root = root * root
    return root


# Where PUMA's exponential ends: below, it counts as 0.
_LOWEST = -14.0


def exp_max(scores: Scores, mask: Mask, shift: Array | None) -> Scores:
    """exp(s - max): exact. A maximum (a comparison tree over the keys) and SPU's exponential."""
    lowered = mask.lower(scores, _BELOW_ALL_SCORES)
    highest = jax.lax.stop_gradient(lowered.max(-1, keepdims=True))
    # 0 for a masked key: by default SPU's exponential is a polynomial that grows again below -512.
    return jnp.exp(mask.hide((scores - highest) * mask.tokens[:, None, None, :]))


def exp_puma(scores: Scores, mask: Mask, shift: Array | None) -> Scores:
    """(1 + x/2^5)^(2^5) on x = s - max, 0 where x <= -14. A maximum, one comparison and five squarings.

    The comparison's bit multiplies what is squared, so that nothing below -14 grows.
    """
    lowered = mask.lower(scores, _BELOW_ALL_SCORES)  # so masked keys are 0
    x = lowered - jax.lax.stop_gradient(lowered.max(-1, keepdims=True))
    return _exp_limit(jnp.where(x > _LOWEST, 1.0 + x / 32.0, 0.0))


# Where Nimbus's exponential ends, and its cubic above, the highest power first.
_NIMBUS_LOWEST = -3.9
_NIMBUS = (0.0291786417536755, 0.26332572942924737, 0.8318065569430768, 0.9708981428645548)


def exp_nimbus(scores: Scores, mask: Mask, shift: Array | None) -> Scores:
    """A cubic in x = s - max, 0 where x <= -3.9. A maximum, one comparison and two products.

    The coefficients are those of its code (examples/python/ml/Nimbus/nonlinear.py in secretflow/spu), fitted to the
    scores that a BERT has. On [-3.9, 0] the cubic is within 0.0292 of e^x; below, a key loses 0.0203 at most. Where all
    keys of a row are within 2.5 of the largest, each weight is within 9 % of softmax's. Further off it depends on how
    many keys there are: of a hundred that are 4 below the largest, which weigh 65 % by softmax, nothing is left.
    """
    lowered = mask.lower(scores, _BELOW_ALL_SCORES)  # so masked keys are 0
    x = lowered - jax.lax.stop_gradient(lowered.max(-1, keepdims=True))
    cubic, square, linear, constant = _NIMBUS
    return jnp.where(x > _NIMBUS_LOWEST, x * (x * (cubic * x + square) + linear) + constant, 0.0)


def exp_bounded(scores: Scores, mask: Mask, shift: Array | None) -> Scores:
    """e^s / n: (1 + x/2^5)^(2^5) on x = s - log n up to 1, 0 where x <= -14. Two comparisons, five squarings.

    The bound: no key weighs more than e, where softmax gives it 1 at most. Nothing else holds the sum of a row: with a
    bound on s alone, the rows of a few sentences in a thousand sum to twenty times what those of all others do.
    """
    x = scores - mask.log_count[:, None, :, None]
    # Both comparisons at once, and the products with their bits.
    above, beyond = jnp.stack([x, x]) > jnp.array([_LOWEST, 1.0]).reshape(2, *[1] * x.ndim)
    pieces = jnp.stack([1.0 + x / 32.0, jnp.full_like(x, 1.0 + 1.0 / 32.0)])
    inside, bound = jnp.where(jnp.stack([above ^ beyond, beyond]), pieces, 0.0)
    return _exp_limit(inside + bound)


def relu_eps(scores: Scores, mask: Mask, shift: Array | None) -> Scores:
    """relu(s) + eps/n, eps = 1e-12 (so the row sum is + eps). One comparison. eps is zero at 18 fraction bits."""
    return jax.nn.relu(scores) + 1e-12 * mask.weight[:, None, None, :]


def square(scores: Scores, mask: Mask, shift: PerHeadScalar | None) -> Scores:
    """(s + c)^2, c one trainable scalar per head. One squaring: the cheapest that is never negative."""
    return jnp.square(scores if shift is None else scores + shift[:, None, None])


def power5(scores: Scores, mask: Mask, shift: PerHeadScalar | None) -> Scores:
    """(s/8 + c)^5, c one trainable scalar per head. The truncation of the eighth, two squarings and a product.

    The published (s + 5)^5 leaves FM64's 18 fraction bits at s = 31 (36.7^5 = 2^26), and the constant that goes with it
    is about a millionth, less than a unit of theirs. In eighths it is s = 288, and the constant has 8^5 of it. Negative
    where s < -8c, as published: a row can sum to less than 0.

    Raises:
        ValueError: no c, as where it is folded into the scores: the eighth is of these alone.
    """
    if shift is None:
        raise ValueError("power5 takes c beside the scores: give its Attention Constant(per_length=False)")
    # The sum holds the eighth where it is: XLA may take a factor out of all products, for the largest to overflow.
    x = scores * 0.125 + shift[:, None, None]
    return jnp.square(jnp.square(x)) * x


# SHAFT's softmax: between which scores, and in how many steps.
_ODE_BOUNDS = (-4.0, 12.0)
_ODE_STEPS = 16


def softmax_ode(scores: Scores, mask: Mask, shift: Array | None) -> Scores:
    """Softmax as y(1) of y' = y (x - <x, y>), y(0) = m / n, in 16 Euler steps, of x = s clipped to [-4, 12].

    Two comparisons at once for the bounds, and two products a step; no maximum, exponential or division. The width of
    the bounds is the number of steps, so no factor 1 + (x - <x, y>) / 16 is negative, and no weight.

    Ours: a masked key, which SHAFT clips to -4, starts at 0 as well, and stays there; and x is counted from -4 on.
    That changes nothing as rows sum to 1, but <x, y> is never negative then, so an error in a row's sum shrinks with
    each step, where it could grow.

    Where all scores of a row are within d of one another, each weight is within a factor of (1 - d/16)^-16 e^-d of
    softmax's: 1.03 for d = 1, 1.83 for 4. The clipping loses what is outside: with a score of 14 beside one of 12, both
    keys weigh the same.
    """
    low, high = _ODE_BOUNDS
    # (clipped score - low) / steps, in [0, 1]; 0 of a masked key, so that what rounding makes of its weight shrinks: a
    # high score would double that in each step.
    x = mask.lower(scores, _BELOW_ALL_SCORES) / _ODE_STEPS
    edges = jnp.array([low, high]).reshape(2, *[1] * x.ndim) / _ODE_STEPS
    above_low, above_high = jax.nn.relu(jnp.stack([x, x]) - edges)
    x = above_low - above_high
    weights = mask.uniform()
    for _ in range(_ODE_STEPS):
        gain = x * weights
        weights = weights + gain - gain.sum(-1, keepdims=True) * weights
    return weights


def relu(scores: Scores, mask: Mask, shift: Array | None) -> Scores:
    """relu(s). One comparison (the bits of every score) and one product."""
    return jax.nn.relu(scores)


def linear(scores: Scores, mask: Mask, shift: Array | None) -> Scores:
    """s itself: nothing to compute."""
    return scores


# -------------------------------------------------------------------------------------------------- normalisers

# (columns for every key, dropout of the numerators) -> their sums, weighted by the numerators.
Mix = Callable[..., Context]


@dataclasses.dataclass(frozen=True)
class RowSum:
    """Divides by the masked sum over the keys, after the product with V (S x d).

    Attributes:
        reciprocal: whether the division is a product with one reciprocal a row. SPU divides the S x d numbers of a row
            each by itself (ABY3, 12 heads, 128 tokens: 129 MB more). Not for sums that may be 0: their reciprocals are
            beyond fixed point.
        per_length: whether the mean is taken in place of the sum, with V/n: a reciprocal has no more than the fraction
            bits, and that of a large sum few that count. With 2quad's sum over 128 keys, some 3,300, the context would
            be off by 0.003 in place of 0.00007.
    """

    reciprocal: bool = True
    per_length: bool = False

    def __call__(
        self, mix: Mix, value: Values, mask: Mask, scale: PerHeadScalar | None, dropout: Dropout | None
    ) -> Context:
        weight = (mask.weight if self.per_length else mask.tokens)[:, None, :, None]
        # The mask as one more column of V: the same product then also gives the row sum.
        columns = jnp.concatenate([value * weight, jnp.broadcast_to(weight, (*value.shape[:-1], 1))], -1)
        mixed = mix(columns)
        context, row_sum = mixed[..., :-1], mixed[..., -1:]
        if dropout is not None:  # the sum is taken over all keys, dropped or not, so it is never 0
            context = mix(value * weight, dropout=dropout)
        return context * (1.0 / row_sum) if self.reciprocal else context / row_sum


# (sums of rows, which of them count) -> r_h (head,), where a head has a row that counts.
Start = Callable[[Float[Array, "batch head query"], Float[Array, "batch head query"]], PerHeadScalar]


def mean_inverse(row_sums: Array, used: Array) -> PerHeadScalar:
    """The mean of 1 / (a row's sum): rows then sum to 1 on average."""
    return (used / jnp.where(used > 0, row_sums, 1.0)).sum((0, 2)) / jnp.maximum(used.sum((0, 2)), 1.0)


def inverse_max(row_sums: Array, used: Array) -> PerHeadScalar:
    """1 / (the largest sum of a row): then none sums to more than 1."""
    return 1.0 / jnp.where(used > 0, row_sums, 1e-3).max((0, 2))


@dataclasses.dataclass(frozen=True)
class Constant:
    """Multiplies by r_h / n (or by r_h alone): no division, no comparison, and r_h folds into the weights.

    Attributes:
        per_length: whether it is r_h / n. Without, for an f that has the 1/n itself; with any other f the constant is
            off for every sentence of another length than those it was calibrated on, as the seed paper's constant is.
        start: r_h from what the rows of a calibration batch sum to (by n, where `per_length`); None where it starts,
            and is published, as 1.
    """

    per_length: bool = True
    start: Start | None = mean_inverse

    def __call__(
        self, mix: Mix, value: Values, mask: Mask, scale: PerHeadScalar | None, dropout: Dropout | None
    ) -> Context:
        """Args: scale: r_h (head,), or None where it is folded into the weights."""
        in_value = self.per_length and mask.pairs is None
        weighted = value * (mask.weight if in_value else mask.tokens)[:, None, :, None]
        mixed = mix(weighted, dropout=dropout)
        if self.per_length and not in_value:  # n differs from query to query
            mixed = mixed * mask.inverse_count[:, None, :, None]
        return mixed if scale is None else mixed * scale[:, None, None]


@dataclasses.dataclass(frozen=True)
class Unnormalised:
    """Nothing is left to do: f gives weights, 0 where the mask is, whose rows sum to 1."""

    def __call__(
        self, mix: Mix, value: Values, mask: Mask, scale: PerHeadScalar | None, dropout: Dropout | None
    ) -> Context:
        return mix(value, dropout=dropout)


# -------------------------------------------------------------------------------------------- what a part must have


@runtime_checkable
class AttentionPart(Protocol):
    """What an own variant must have to stand beside ours: subclass nothing, have a name and one call.

    The call gets what a layer has computed, (batch, head, token, depth): the query divided by sqrt(depth) already, the
    key and the value; the mask; the part's scalars; `bias`, to be added to the scores, of positions; `product`, for
    products of two batches of matrices, such as scores and context; and `dropout`, for the weights while training. It
    gives the context, of the query's shape.

    `Trained`, `Calibrated`, `Foldable`, `Homogeneous` and `Shareable` are what a part may have beside.
    """

    @property
    def name(self) -> str: ...

    def __call__(
        self,
        query: Queries,
        key: Keys,
        value: Values,
        mask: Mask,
        scalars: Scalars,
        *,
        bias: Array | None = None,
        product: Product = matmul,
        dropout: Dropout | None = None,
    ) -> Context: ...


@runtime_checkable
class Trained(AttentionPart, Protocol):
    """A part with trainable per-head scalars: `scalars` gives their start."""

    def scalars(self, num_heads: int) -> Scalars: ...


@runtime_checkable
class Calibrated(Trained, Protocol):
    """A part whose scalars have a better start in data.

    `row_offset` says what each row's scores should be moved by before that, (batch, head, query), or None; `calibrated`
    gives the start from the scores of self-attention.
    """

    def row_offset(self, scores: Scores, mask: Mask) -> Float[Array, "batch head query"] | None: ...

    def calibrated(self, scores: Scores, mask: Mask, scalars: Scalars) -> Scalars: ...


class Folded(NamedTuple):
    """Where a part's scalars go: factors (head,) of W_q and of W_v, and the scalars that are left for the call."""

    query: PerHeadScalar
    value: PerHeadScalar
    scalars: Scalars


@runtime_checkable
class Foldable(Trained, Protocol):
    """A part whose scalars fold into the weights around it, as far as `fold` says; without `query` not into W_q."""

    def fold(self, scalars: Scalars, num_heads: int, query: bool = True) -> Folded: ...


@runtime_checkable
class Homogeneous(Foldable, Protocol):
    """A part of the form context_i = sum_j f(s_ij) (m_j / n) V_j, f(a s) = a^k f(s) for a > 0, once it is folded.

    Then mask and 1/n fold too. `score_degree` is k, or None where this object is not of the form after all; `mix` is
    sum_j f(s_ij) V_j over all keys. Of its scalars `shift` may be left, which is in the scores already.
    """

    @property
    def score_degree(self) -> int | None: ...

    def mix(
        self,
        query: Queries,
        key: Keys,
        value: Values,
        mask: Mask,
        *,
        bias: Array | None = None,
        product: Product = matmul,
    ) -> Context: ...


@runtime_checkable
class Shareable(AttentionPart, Protocol):
    """A part whose numerators another layer can use: `numerators` computes them, and `mixed` a context from them.

    `mixed(numerators(...), ...)` is what the call gives.
    """

    def numerators(
        self,
        query: Queries,
        key: Keys,
        mask: Mask,
        scalars: Scalars,
        *,
        bias: Array | None = None,
        product: Product = matmul,
    ) -> Scores: ...

    def mixed(
        self,
        numerators: Scores,
        value: Values,
        mask: Mask,
        scalars: Scalars,
        *,
        product: Product = matmul,
        dropout: Dropout | None = None,
    ) -> Context: ...


def scalars_of(part: AttentionPart, num_heads: int) -> Scalars:
    """The start of a part's scalars, (head,) each; none for a part that has none."""
    return part.scalars(num_heads) if isinstance(part, Trained) else {}


def folded(part: AttentionPart, scalars: Scalars, num_heads: int, *, query: bool = True) -> Folded:
    """What of a part's scalars goes into the weights; nothing for a part that does not say.

    Args:
        query: whether W_q may take a factor; not where a bias is added to the scores, which it would not multiply.
    """
    if isinstance(part, Foldable):
        return part.fold(scalars, num_heads, query)
    return Folded(jnp.ones((num_heads,)), jnp.ones((num_heads,)), scalars)


def common_degree(parts: Sequence[AttentionPart]) -> int | None:
    """The degree that all parts have, so that mask and 1/n fold into the state; None where they have none in common."""
    degrees = {part.score_degree if isinstance(part, Homogeneous) else None for part in parts}
    return degrees.pop() if len(degrees) == 1 else None


def scores_of(query: Queries, key: Keys, bias: Array | None = None, product: Product = matmul) -> Scores:
    """Q K^T (+ bias), of a query that is divided by sqrt(depth) already."""
    scores = product(query, key.swapaxes(-1, -2))
    return scores if bias is None else scores + bias


# ----------------------------------------------------------------------------------------------------- variants


@dataclasses.dataclass(frozen=True)
class Attention:
    """A variant: a numerator f(s), a normaliser, and what is known of the pair.

    Attributes:
        f: the numerator, (scores, mask, shift) -> the same shape as scores.
        normaliser: `RowSum()`, `Constant()` or `Unnormalised()`.
        source: the paper that published it.
        score_range: the scores on which the secure result is within 0.01 of plaintext (FM64, 18 fraction bits, values
            of unit size, r_h = 1). Rows whose numerators sum to less than 0.01 are excepted: few of their bits are
            left, and where no score is positive `2relu` gives 0 instead of the mean of V.
        shift: start of the trainable per-head c; None if f has none.
        degree: k where f(a s; a c) = a^k f(s; c) for a > 0, so that a per-head factor folds into W_q; None if f is
            not homogeneous.
        exponential: whether f(s + t) is about e^t f(s), so that an offset of a row's scores is a factor of its sum.
        linear: whether f(s) is s, so that Q (K^T V) is (Q K^T) V.
    """

    name: str
    f: Callable[..., Scores]
    normaliser: RowSum | Constant | Unnormalised
    source: str
    score_range: tuple[float, float] = (-20.0, 20.0)
    shift: float | None = None
    degree: int | None = None
    exponential: bool = False
    linear: bool = False

    def __call__(
        self,
        query: Queries,
        key: Keys,
        value: Values,
        mask: Mask,
        scalars: Scalars,
        *,
        bias: Array | None = None,
        product: Product = matmul,
        dropout: Dropout | None = None,
    ) -> Context:
        mix = functools.partial(self.mix, query, key, mask=mask, shift=scalars.get("shift"), bias=bias, product=product)
        return self.normaliser(mix, value, mask, scalars.get("scale"), dropout)

    def mix(
        self,
        query: Queries,
        key: Keys,
        value: Values,
        mask: Mask,
        shift: PerHeadScalar | None = None,
        *,
        bias: Array | None = None,
        product: Product = matmul,
        dropout: Dropout | None = None,
    ) -> Context:
        """sum_j f(s_ij) V_j, of a linear f without the scores where these are the larger matrix."""
        plain = bias is None and mask.pairs is None and dropout is None
        if self.linear and plain and key.shape[-1] * value.shape[-1] < query.shape[-2] * key.shape[-2]:
            return product(query, product(key.swapaxes(-1, -2), value))
        scalars = {} if shift is None else {"shift": shift}
        numerators = self.numerators(query, key, mask, scalars, bias=bias, product=product)
        return product(numerators if dropout is None else dropout(numerators), value)

    def numerators(
        self,
        query: Queries,
        key: Keys,
        mask: Mask,
        scalars: Scalars,
        *,
        bias: Array | None = None,
        product: Product = matmul,
    ) -> Scores:
        """f(s_ij), 0 for the pairs that the mask hides."""
        return mask.hide(self.f(scores_of(query, key, bias, product), mask, scalars.get("shift")))

    def mixed(
        self,
        numerators: Scores,
        value: Values,
        mask: Mask,
        scalars: Scalars,
        *,
        product: Product = matmul,
        dropout: Dropout | None = None,
    ) -> Context:
        """The context of values, weighted by numerators that are there. A row sum is taken anew."""

        def mix(columns: Array, dropout: Dropout | None = None) -> Context:
            return product(numerators if dropout is None else dropout(numerators), columns)

        return self.normaliser(mix, value, mask, scalars.get("scale"), dropout)

    def scalars(self, num_heads: int) -> Scalars:
        """`shift` c where f has one, and `scale` r where nothing divides."""
        start: dict[str, Array] = {}
        if self.shift is not None:
            start["shift"] = jnp.full((num_heads,), self.shift)
        if isinstance(self.normaliser, Constant):
            start["scale"] = jnp.ones((num_heads,))
        return start

    def calibrated(self, scores: Scores, mask: Mask, scalars: Scalars) -> Scalars:
        """With r from data: what its normaliser's `start` makes of sum_j f(s_ij) (/ n) of the valid queries.

        Scores of self-attention: a query is valid where the key at its place is. Rows with a sum (/ n) below 1e-3
        (relu of negative scores: 0) do not count; a head that has no other starts at 1.
        """
        if not isinstance(self.normaliser, Constant) or self.normaliser.start is None:
            return scalars
        numerator = mask.hide(self.f(scores, mask, scalars.get("shift")))
        row_sum_BxHxQ = jnp.einsum("bhqk,bk->bhq", numerator, mask.tokens)
        if self.normaliser.per_length:
            row_sum_BxHxQ = row_sum_BxHxQ * mask.inverse_count[:, None, :]
        used_BxHxQ = mask.tokens[:, None, :] * (row_sum_BxHxQ >= 1e-3)
        start = self.normaliser.start(row_sum_BxHxQ, used_BxHxQ)
        scale: Any = jnp.where(used_BxHxQ.sum((0, 2)) > 0, start, 1.0)
        return {**scalars, "scale": scale}

    def row_offset(self, scores: Scores, mask: Mask) -> Float[Array, "batch head query"] | None:
        """Where nothing divides an exponential by its row's sum: the offset of the scores that makes their mean 1."""
        if not self.exponential or not isinstance(self.normaliser, Constant):
            return None
        visible = mask.hide(jnp.broadcast_to(mask.tokens[:, None, None, :], scores.shape))
        return -jax.nn.logsumexp(scores, -1, b=visible * mask.inverse_count[:, None, :, None])

    def fold(self, scalars: Scalars, num_heads: int, query: bool = True) -> Folded:
        """r = a^degree x rest per head: a goes into W_q and c, the rest into W_v.

        a keeps f(s) near 1, which is where fixed point is most precise; what has no degree, or no positive r, goes
        into W_v whole. A row sum has no r.
        """
        left = {name: scalar for name, scalar in scalars.items() if name != "scale"}
        scale = scalars.get("scale", jnp.ones((num_heads,)))
        if self.degree is None or not query:
            return Folded(jnp.ones_like(scale), scale, left)
        a = jnp.where(scale > 0, jnp.abs(scale) ** (1.0 / self.degree), 1.0)
        return Folded(a, scale / a**self.degree, {name: scalar * a for name, scalar in left.items()})

    @property
    def score_degree(self) -> int | None:
        per_length = isinstance(self.normaliser, Constant) and self.normaliser.per_length
        return self.degree if per_length else None


def _take(x: Array, indices: Sequence[int], axis: int) -> Array:
    """Static slices rather than a gather, which SPU runs as a loop."""
    return jnp.concatenate([jax.lax.slice_in_dim(x, i, i + 1, axis=axis) for i in indices], axis)


def _of_heads(heads: Sequence[int], query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """Of queries, keys and values those of some heads."""
    return _take(query, heads, 1), _take(key, heads, 1), _take(value, heads, 1)


@dataclasses.dataclass(frozen=True)
class PerHead:
    """One variant per head (MPCViT searches such mixes). Equal variants are computed together.

    A scalar that only some of the parts have is 0 for the heads of the others, where nobody reads it.

    Attributes:
        parts: a variant for every head, in order.
    """

    parts: tuple[AttentionPart, ...]

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.parts)

    def _groups(self) -> list[tuple[AttentionPart, list[int]]]:
        """Every distinct part and its heads."""
        return [(part, [i for i, own in enumerate(self.parts) if own == part]) for part in dict.fromkeys(self.parts)]

    def _joined(self, computed: Sequence[Array], axis: int) -> Array:
        """What was computed for each of the groups, in the order of the heads."""
        order = [head for _, heads in self._groups() for head in heads]
        return _take(jnp.concatenate(computed, axis), [order.index(head) for head in range(len(order))], axis)

    def _own(self, part: AttentionPart, heads: Sequence[int], scalars: Scalars) -> Scalars:
        """The scalars of a group, without those of other parts."""
        return {name: _take(scalars[name], heads, 0) for name in scalars_of(part, len(heads)) if name in scalars}

    def _scalars(self, given: Sequence[Scalars]) -> Scalars:
        """One group's scalars after the other as those of all heads."""
        counts = [len(heads) for _, heads in self._groups()]
        names = sorted({name for scalars in given for name in scalars})
        return {
            name: self._joined([own.get(name, jnp.zeros((n,))) for own, n in zip(given, counts, strict=True)], 0)
            for name in names
        }

    def __call__(
        self,
        query: Queries,
        key: Keys,
        value: Values,
        mask: Mask,
        scalars: Scalars,
        *,
        bias: Array | None = None,
        product: Product = matmul,
        dropout: Dropout | None = None,
    ) -> Context:
        def context(part: AttentionPart, heads: Sequence[int]) -> Context:
            own = _of_heads(heads, query, key, value)
            added = None if bias is None else _take(bias, heads, 1)
            scalars_ = self._own(part, heads, scalars)
            return part(*own, mask, scalars_, bias=added, product=product, dropout=dropout)

        return self._joined([context(part, heads) for part, heads in self._groups()], 1)

    def scalars(self, num_heads: int) -> Scalars:
        return self._scalars([scalars_of(part, len(heads)) for part, heads in self._groups()])

    def calibrated(self, scores: Scores, mask: Mask, scalars: Scalars) -> Scalars:
        def start(part: AttentionPart, heads: Sequence[int]) -> Scalars:
            own = self._own(part, heads, scalars)
            return part.calibrated(_take(scores, heads, 1), mask, own) if isinstance(part, Calibrated) else own

        return self._scalars([start(part, heads) for part, heads in self._groups()])

    def row_offset(self, scores: Scores, mask: Mask) -> Float[Array, "batch head query"] | None:
        def offset(part: AttentionPart, heads: Sequence[int]) -> Array | None:
            return part.row_offset(_take(scores, heads, 1), mask) if isinstance(part, Calibrated) else None

        offsets = [offset(part, heads) for part, heads in self._groups()]
        if all(found is None for found in offsets):
            return None
        none = [jnp.zeros_like(scores[:, : len(heads), :, 0]) for _, heads in self._groups()]
        return self._joined([zero if own is None else own for own, zero in zip(offsets, none, strict=True)], 1)

    def fold(self, scalars: Scalars, num_heads: int, query: bool = True) -> Folded:
        done = [
            folded(part, self._own(part, heads, scalars), len(heads), query=query) for part, heads in self._groups()
        ]
        for_query = self._joined([own.query for own in done], 0)
        for_value = self._joined([own.value for own in done], 0)
        return Folded(for_query, for_value, self._scalars([own.scalars for own in done]))

    @property
    def score_degree(self) -> int | None:
        return common_degree(self.parts)

    def mix(
        self,
        query: Queries,
        key: Keys,
        value: Values,
        mask: Mask,
        *,
        bias: Array | None = None,
        product: Product = matmul,
    ) -> Context:
        def context(part: AttentionPart, heads: Sequence[int]) -> Context:
            assert isinstance(part, Homogeneous), "asked for where score_degree says that all are"
            added = None if bias is None else _take(bias, heads, 1)
            return part.mix(*_of_heads(heads, query, key, value), mask, bias=added, product=product)

        return self._joined([context(part, heads) for part, heads in self._groups()], 1)


ATTENTION: Registry[Any] = Registry("attention", AttentionPart)

softmax = ATTENTION.register(Attention("softmax", exp_max, RowSum(), "exact"))
softmax_puma = ATTENTION.register(
    Attention(
        "softmax_puma",
        exp_puma,
        RowSum(),
        "PUMA, arXiv 2307.12533",
    )
)
softmax_nimbus = ATTENTION.register(
    Attention(
        "softmax_nimbus",
        exp_nimbus,
        RowSum(),
        "Nimbus, NeurIPS 2024, arXiv 2411.15707 (the coefficients of its code)",
    )
)
softmax_shaft = ATTENTION.register(
    Attention(
        "softmax_shaft",
        softmax_ode,
        Unnormalised(),
        "SHAFT, NDSS 2025 (steps and bounds of its code), after Zheng et al., ACSAC 2023",
    )
)
two_relu = ATTENTION.register(
    Attention(
        "2relu",
        relu_eps,
        RowSum(reciprocal=False),  # a row without a positive score
        "MPCFormer, arXiv 2211.01452",
    )
)
two_quad = ATTENTION.register(
    Attention(
        "2quad",
        square,
        RowSum(per_length=True),
        "MPCFormer, arXiv 2211.01452",
        shift=5.0,
        degree=2,
    )
)
softmax_freediv = ATTENTION.register(
    Attention(
        "softmax_freediv",
        exp_bounded,
        Constant(per_length=False),  # f has the 1/n
        "Liu et al., J. Computer Research and Development 61(5), 2024 (our reading of its abstract)",
        exponential=True,
    )
)
two_quad_freediv = ATTENTION.register(
    Attention(
        "2quad_freediv",
        square,
        Constant(),
        "Liu et al., J. Computer Research and Development 61(5), 2024 (our reading of its abstract)",
        score_range=(-20.0, 14.0),
        shift=5.0,
        degree=2,
    )
)
two_quad_fixed = ATTENTION.register(
    dataclasses.replace(two_quad_freediv, name="2quad_fixed", normaliser=Constant(per_length=False))
)
# Of the paper the abstract and the code were at hand. There the weights are (s + 5)^5 / R, R of every head and position
# the largest sum of a row in the last batch of training, over all keys, padding too. Ours: one r = 8^5 / R a head, for
# all positions, from sums over tokens; it starts there and is trained from then on, as c is, which starts at 5/8.
power5_batch = ATTENTION.register(
    Attention(
        "power5_batch",
        power5,
        Constant(per_length=False, start=inverse_max),
        "Powerformer, ACL 2025, eprint 2024/1429 (its Batch Power-Max, by its code)",
        score_range=(-20.0, 16.0),
        shift=0.625,
        degree=5,
    )
)
# The paper's constant is 1/197, of 197 tokens each time. Ours: n, and r, which starts at 1 and may be trained.
square_freediv = ATTENTION.register(
    Attention(
        "square_freediv",
        square,
        Constant(start=None),
        "PriViT, TMLR 2024, arXiv 2310.04604",
        score_range=(-19.0, 19.0),
        degree=2,
    )
)
relu_freediv = ATTENTION.register(
    Attention(
        "relu_freediv",
        relu,
        Constant(),
        "MPCViT, arXiv 2211.13955",
        degree=1,
    )
)
scaling = ATTENTION.register(
    Attention(
        "scaling",
        linear,
        Constant(start=None),
        "MPCViT, arXiv 2211.13955",
        degree=1,
        linear=True,
    )
)
