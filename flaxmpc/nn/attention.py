"""Attention weights as a pair: numerator x normaliser. Every published variant is one choice of each.

Notation: scores s = Q K^T / sqrt(d), key mask m in {0, 1}, n = number of valid keys, V the values.

    row sum      context_i = sum_j f(s_ij) m_j V_j / sum_j f(s_ij) m_j
    constant     context_i = r sum_j f(s_ij) (m_j / n) V_j            (r: one trainable scalar per head)

The mask is multiplied into V, never added to the scores: under fixed point (-1e4 + 5)^2 is at the ring's edge. One
product of V with the mask (S x d) then serves numerator and normaliser, where masking the weights costs S x S.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flaxmpc.nn.parts import Registry

Scores = Float[Array, "batch head query key"]
Values = Float[Array, "batch head key depth"]
Context = Float[Array, "batch head query depth"]
PerHeadScalar = Float[Array, " head"]


class Keys(NamedTuple):
    """What the client says of the keys: which are tokens, and how many, in the forms that the parties multiply with.

    The client knows n, so it does the divisions and roots, and none is left for the computing parties.

    Attributes:
        mask: m, 1 for a token, 0 for padding.
        weight: m / n.
        scale: a = m n^(-1/2k), of a folded model whose numerators have degree k (`flaxmpc.models.folded`); else m.
        inverse, inverse_square: 1/a and 1/a^2 at the tokens, 0 at padding.
        log_length: log n, for an exponential that takes 1/n into its argument.
    """

    mask: Float[Array, "batch key"]
    weight: Float[Array, "batch key"]
    scale: Float[Array, "batch key"]
    inverse: Float[Array, "batch key"]
    inverse_square: Float[Array, "batch key"]
    log_length: Float[Array, " batch"]

    @classmethod
    def from_mask(cls, attention_mask: Array, degree: int | None = None) -> "Keys":
        """From HF's attention_mask (batch, key), 1 for a token and 0 for padding, any dtype."""
        mask = jnp.asarray(attention_mask, jnp.float32)
        n = jnp.maximum(mask.sum(-1, keepdims=True), 1.0)
        root = jnp.ones_like(n) if degree is None else n ** (0.5 / degree)
        return cls(mask, mask / n, mask / root, mask * root, mask * root * root, jnp.log(n[..., 0]))


# The products of two batches of matrices, (batch, head, m, k) x (batch, head, k, n).
Product = Callable[[Float[Array, "batch head m k"], Float[Array, "batch head k n"]], Float[Array, "batch head m n"]]


def matmul(a: Float[Array, "batch head m k"], b: Float[Array, "batch head k n"]) -> Float[Array, "batch head m n"]:
    """The plain batched product: fastest in the clear. SPU runs it head after head (12 heads: 32 rounds in ABY3)."""
    return jnp.matmul(a, b)


# XLA turns a grouped convolution into a dilated one, whose work grows with the square of the groups: at 192 groups
# (16 sentences, 12 heads) it took ten times as long as all matrix products of the layer.
_MOST_GROUPS = 24


def grouped_conv(
    a: Float[Array, "batch head m k"], b: Float[Array, "batch head k n"]
) -> Float[Array, "batch head m n"]:
    """The same product as grouped 1-D convolutions of width 1: the same bytes in MPC, 2.7 rounds for up to 24 heads.

    One convolution holds all heads of as many sentences as that allows, at least of one.
    """
    batch, heads = a.shape[:2]
    step = max(1, _MOST_GROUPS // heads)
    return jnp.concatenate([_one_conv(a[i : i + step], b[i : i + step]) for i in range(0, batch, step)])


def _one_conv(a: Array, b: Array) -> Array:
    batch, heads, m, k = a.shape
    n = b.shape[-1]
    groups = batch * heads
    signal_1xMxGK = a.transpose(2, 0, 1, 3).reshape(1, m, groups * k)
    kernel_1xKxGN = b.transpose(2, 0, 1, 3).reshape(1, k, groups * n)
    out_1xMxGN = jax.lax.conv_general_dilated(
        signal_1xMxGK, kernel_1xKxGN, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups
    )
    return out_1xMxGN.reshape(m, batch, heads, n).transpose(1, 2, 0, 3)


# Dropout of weights while training; None in evaluation and under MPC.
Dropout = Callable[[Scores], Scores]


# --------------------------------------------------------------------------------------------------- numerators


# How far a masked key's score is lowered while a row's maximum is taken: below any real score.
_BELOW_ALL_SCORES = 1000.0


def _lowered(scores: Scores, keys: Keys) -> Scores:
    return scores - _BELOW_ALL_SCORES * (1.0 - keys.mask[:, None, None, :])


def _exp_limit(root: Array) -> Array:
    """(1 + x/2^5)^(2^5) from 1 + x/2^5: PUMA's exponential, five squarings."""
    for _ in range(5):
        root = root * root
    return root


# Where PUMA's exponential ends: below, it counts as 0.
_LOWEST = -14.0


def exp_max(scores: Scores, keys: Keys, shift: Array | None) -> Scores:
    """exp(s - max): exact. A maximum (a comparison tree over the keys) and SPU's exponential."""
    highest = jax.lax.stop_gradient(_lowered(scores, keys).max(-1, keepdims=True))
    # 0 for a masked key: by default SPU's exponential is a polynomial that grows again below -512.
    return jnp.exp((scores - highest) * keys.mask[:, None, None, :])


def exp_puma(scores: Scores, keys: Keys, shift: Array | None) -> Scores:
    """(1 + x/2^5)^(2^5) on x = s - max, 0 where x <= -14. A maximum, one comparison and five squarings.

    The comparison's bit multiplies what is squared, so that nothing below -14 grows.
    """
    lowered = _lowered(scores, keys)  # so masked keys are 0
    x = lowered - jax.lax.stop_gradient(lowered.max(-1, keepdims=True))
    return _exp_limit(jnp.where(x > _LOWEST, 1.0 + x / 32.0, 0.0))


def exp_bounded(scores: Scores, keys: Keys, shift: Array | None) -> Scores:
    """e^s / n: (1 + x/2^5)^(2^5) on x = s - log n up to 1, 0 where x <= -14. Two comparisons, five squarings.

    The bound: no key weighs more than e, where softmax gives it 1 at most. Nothing else holds the sum of a row: with a
    bound on s alone, the rows of a few sentences in a thousand sum to twenty times what those of all others do.
    """
    x = scores - keys.log_length[:, None, None, None]
    # Both comparisons at once, and the products with their bits.
    above, beyond = jnp.stack([x, x]) > jnp.array([_LOWEST, 1.0]).reshape(2, *[1] * x.ndim)
    pieces = jnp.stack([1.0 + x / 32.0, jnp.full_like(x, 1.0 + 1.0 / 32.0)])
    inside, bound = jnp.where(jnp.stack([above ^ beyond, beyond]), pieces, 0.0)
    return _exp_limit(inside + bound)


def relu_eps(scores: Scores, keys: Keys, shift: Array | None) -> Scores:
    """relu(s) + eps/n, eps = 1e-12 (so the row sum is + eps). One comparison. eps is zero at 18 fraction bits."""
    return jax.nn.relu(scores) + 1e-12 * keys.weight[:, None, None, :]


def square(scores: Scores, keys: Keys, shift: PerHeadScalar) -> Scores:
    """(s + c)^2, c one trainable scalar per head. One squaring: the cheapest that is never negative."""
    return jnp.square(scores + shift[:, None, None])


def relu(scores: Scores, keys: Keys, shift: Array | None) -> Scores:
    """relu(s). One comparison (the bits of every score) and one product."""
    return jax.nn.relu(scores)


def linear(scores: Scores, keys: Keys, shift: Array | None) -> Scores:
    """s itself: nothing to compute."""
    return scores


# -------------------------------------------------------------------------------------------------- normalisers


@dataclasses.dataclass(frozen=True)
class RowSum:
    """Divides by the masked sum over the keys, after the product with V (S x d).

    Attributes:
        reciprocal: as a product with one reciprocal a row. SPU divides the S x d numbers of a row each by itself (ABY3,
            12 heads, 128 tokens: 129 MB more). Not for sums that may be 0: their reciprocals are beyond fixed point.
        per_length: of the mean in place of the sum, with V/n: a reciprocal has no more than the fraction bits, and that
            of a large sum few that count. Of 2quad's sum over 128 keys, some 3,300, the context would be off by 0.003
            in place of 0.00007.
    """

    reciprocal: bool = True
    per_length: bool = False

    def __call__(
        self,
        numerator: Scores,
        value: Values,
        keys: Keys,
        scale: Array | None,
        product: Product,
        dropout: Dropout | None,
    ) -> Context:
        weight = (keys.weight if self.per_length else keys.mask)[:, None, :, None]
        # The mask as one more column of V: the same product then also gives the row sum.
        columns = jnp.concatenate([value * weight, jnp.broadcast_to(weight, (*value.shape[:-1], 1))], -1)
        mixed = product(numerator, columns)
        context, row_sum = mixed[..., :-1], mixed[..., -1:]
        if dropout is not None:  # the sum is taken over all keys, dropped or not, so it is never 0
            context = product(dropout(numerator), value * weight)
        return context * (1.0 / row_sum) if self.reciprocal else context / row_sum


@dataclasses.dataclass(frozen=True)
class Constant:
    """Multiplies by r_h / n (or by r_h alone): no division, no comparison, and r_h folds into the weights.

    Attributes:
        per_length: r_h / n. Without, for an f that has the 1/n itself; with any other f the constant is off for every
            sentence of another length than those it was calibrated on, as the seed paper's fixed constant is.
        calibrated: r_h starts at the mean of n / sum_j f(s_ij) over a calibration batch; else it starts, and is
            published, as 1.
    """

    per_length: bool = True
    calibrated: bool = True

    def __call__(
        self,
        numerator: Scores,
        value: Values,
        keys: Keys,
        scale: Array | None,
        product: Product,
        dropout: Dropout | None,
    ) -> Context:
        """Args: scale: r_h (head,), or None where it is folded into the weights."""
        weight = keys.weight if self.per_length else keys.mask
        mixed = product(numerator if dropout is None else dropout(numerator), value * weight[:, None, :, None])
        return mixed if scale is None else mixed * scale[:, None, None]


# ----------------------------------------------------------------------------------------------------- variants


@runtime_checkable
class AttentionPart(Protocol):
    """What an own variant must have to stand beside ours: subclass nothing, have these.

    `numerator` and `normalise` are what a layer runs, in this order.
    `initial_shift` and `initial_scale` give the start of the trainable per-head scalars, None for no such scalar;
    `calibrated_scale` a better start from data. `row_offset` is what each row's scores should be moved by before
    that, None for not at all.
    `split_scale` says how r_h folds: the factors (head,) of W_q and c, and those of W_v. `score_degree` is k where
    mask and 1/n fold too, since the numerator has degree k and the normaliser is r_h / n; else None.
    """

    @property
    def name(self) -> str: ...

    def numerator(self, scores: Scores, keys: Keys, shift: Array | None) -> Scores: ...

    def normalise(
        self,
        numerator: Scores,
        value: Values,
        keys: Keys,
        scale: Array | None,
        product: Product = matmul,
        dropout: Dropout | None = None,
    ) -> Context: ...

    def initial_shift(self, num_heads: int) -> Array | None: ...

    def initial_scale(self, num_heads: int) -> Array | None: ...

    def calibrated_scale(self, scores: Scores, keys: Keys, shift: Array | None) -> Array | None: ...

    def row_offset(self, scores: Scores, keys: Keys) -> Float[Array, "batch head query"] | None: ...

    def split_scale(self, scale: Array) -> tuple[Array, Array]: ...

    @property
    def score_degree(self) -> int | None: ...


@dataclasses.dataclass(frozen=True)
class Attention:
    """A variant: a numerator f(s), a normaliser, and what is known of the pair.

    Attributes:
        f: the numerator, (scores, keys, shift) -> the same shape as scores.
        normaliser: `RowSum()` or `Constant()`.
        source: where it was published.
        needs_distillation: whether a fine-tuned softmax model loses accuracy when this part replaces its own.
        score_range: the scores on which the secure result is within 0.01 of plaintext (FM64, 18 fraction bits, values
            of unit size, r_h = 1). Rows whose numerators sum to less than 0.01 are excepted: few of their bits are
            left, and where no score is positive `2relu` gives 0 instead of the mean of V.
        shift: start of the trainable per-head c; None if f has none.
        degree: k where f(a s; a c) = a^k f(s; c) for a > 0, so that a per-head factor folds into W_q; None if f is
            not homogeneous.
        exponential: whether f(s + t) is about e^t f(s), so that an offset of a row's scores is a factor of its sum.
    """

    name: str
    f: Callable[..., Scores]
    normaliser: RowSum | Constant
    source: str
    needs_distillation: bool
    score_range: tuple[float, float]
    shift: float | None = None
    degree: int | None = None
    exponential: bool = False

    def numerator(self, scores: Scores, keys: Keys, shift: Array | None) -> Scores:
        return self.f(scores, keys, shift)

    def normalise(
        self,
        numerator: Scores,
        value: Values,
        keys: Keys,
        scale: Array | None,
        product: Product = matmul,
        dropout: Dropout | None = None,
    ) -> Context:
        return self.normaliser(numerator, value, keys, scale, product, dropout)

    def initial_shift(self, num_heads: int) -> Array | None:
        return None if self.shift is None else jnp.full((num_heads,), self.shift)

    def initial_scale(self, num_heads: int) -> Array | None:
        return jnp.ones((num_heads,)) if isinstance(self.normaliser, Constant) else None

    def calibrated_scale(self, scores: Scores, keys: Keys, shift: Array | None) -> Array | None:
        """r_h (head,) from data: the mean of n / sum_j f(s_ij) over the valid queries; None if not calibrated.

        Scores of self-attention: a query is valid where the key at its place is. Rows with sum / n below 1e-3 (relu of
        negative scores: 0) are left out of the mean; a head that has no other starts at 1.
        """
        if not isinstance(self.normaliser, Constant) or not self.normaliser.calibrated:
            return None
        weight = keys.weight if self.normaliser.per_length else keys.mask
        row_sum_BxHxQ = jnp.einsum("bhqk,bk->bhq", self.f(scores, keys, shift), weight)
        used_BxHxQ = keys.mask[:, None, :] * (row_sum_BxHxQ >= 1e-3)
        total, count = (used_BxHxQ / jnp.maximum(row_sum_BxHxQ, 1e-3)).sum((0, 2)), used_BxHxQ.sum((0, 2))
        return jnp.where(count > 0, total / jnp.maximum(count, 1.0), 1.0)

    def row_offset(self, scores: Scores, keys: Keys) -> Float[Array, "batch head query"] | None:
        """Where nothing divides an exponential by its row's sum: the offset of the scores that makes their mean 1."""
        if not self.exponential or not isinstance(self.normaliser, Constant):
            return None
        return -jax.nn.logsumexp(scores, -1, b=keys.weight[:, None, None, :])

    @property
    def score_degree(self) -> int | None:
        per_length = isinstance(self.normaliser, Constant) and self.normaliser.per_length
        return self.degree if per_length else None

    def split_scale(self, scale: Array) -> tuple[Array, Array]:
        """r = a^degree x rest per head: a goes into W_q and c, the rest into W_v.

        a keeps f(s) near 1, which is where fixed point is most precise; what has no degree, or no positive r, goes
        into W_v whole. A row sum has no r.
        """
        if not isinstance(self.normaliser, Constant):
            return jnp.ones_like(scale), jnp.ones_like(scale)
        if self.degree is None:
            return jnp.ones_like(scale), scale
        a = jnp.where(scale > 0, jnp.abs(scale) ** (1.0 / self.degree), 1.0)
        return a, scale / a**self.degree


def common(degrees: set[int | None]) -> int | None:
    """The degree that all have, or None."""
    return next(iter(degrees)) if len(degrees) == 1 else None


def _take(x: Any, indices: Sequence[int], axis: int) -> Any:
    """Static slices rather than a gather, which SPU runs as a loop. None, the scalar that is not there, stays None."""
    if x is None:
        return None
    return jnp.concatenate([jax.lax.slice_in_dim(x, i, i + 1, axis=axis) for i in indices], axis)


@dataclasses.dataclass(frozen=True)
class PerHead:
    """One variant per head (MPCViT searches such mixes). Equal variants are computed together.

    Attributes:
        parts: a variant for every head, in order.
    """

    parts: tuple[Attention, ...]

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.parts)

    def _joined(self, compute: Callable[[Attention, list[int]], Array]) -> Array:
        """`compute` for every distinct part and its heads; the results, (batch, head, ...), in the heads' order."""
        groups = [(part, [i for i, own in enumerate(self.parts) if own == part]) for part in dict.fromkeys(self.parts)]
        joined = jnp.concatenate([compute(part, heads) for part, heads in groups], 1)
        order = [head for _, heads in groups for head in heads]
        return _take(joined, [order.index(head) for head in range(len(order))], 1)

    def numerator(self, scores: Scores, keys: Keys, shift: Array | None) -> Scores:
        return self._joined(lambda part, heads: part.numerator(_take(scores, heads, 1), keys, _take(shift, heads, 0)))

    def normalise(
        self,
        numerator: Scores,
        value: Values,
        keys: Keys,
        scale: Array | None,
        product: Product = matmul,
        dropout: Dropout | None = None,
    ) -> Context:
        return self._joined(
            lambda part, heads: part.normalise(
                _take(numerator, heads, 1), _take(value, heads, 1), keys, _take(scale, heads, 0), product, dropout
            )
        )

    def initial_shift(self, num_heads: int) -> Array | None:
        shifts = [part.shift for part in self.parts]
        return None if all(s is None for s in shifts) else jnp.array([s or 0.0 for s in shifts])

    def initial_scale(self, num_heads: int) -> Array | None:
        has = any(part.initial_scale(1) is not None for part in self.parts)
        return jnp.ones((num_heads,)) if has else None

    def calibrated_scale(self, scores: Scores, keys: Keys, shift: Array | None) -> Array | None:
        per_head = []
        for head, part in enumerate(self.parts):
            own = None if part.shift is None else shift[head : head + 1]  # pyright: ignore[reportOptionalSubscript]
            scale = part.calibrated_scale(scores[:, head : head + 1], keys, own)
            per_head.append(jnp.ones((1,)) if scale is None else scale)
        return jnp.concatenate(per_head)

    def row_offset(self, scores: Scores, keys: Keys) -> Float[Array, "batch head query"] | None:
        offsets = [part.row_offset(scores[:, h : h + 1], keys) for h, part in enumerate(self.parts)]
        if all(offset is None for offset in offsets):
            return None
        none = jnp.zeros_like(scores[:, :1, :, 0])
        return jnp.concatenate([none if offset is None else offset for offset in offsets], 1)

    @property
    def score_degree(self) -> int | None:
        return common({part.score_degree for part in self.parts})

    def split_scale(self, scale: Array) -> tuple[Array, Array]:
        split = [part.split_scale(scale[head : head + 1]) for head, part in enumerate(self.parts)]
        return jnp.concatenate([a for a, _ in split]), jnp.concatenate([rest for _, rest in split])


ATTENTION: Registry[Any] = Registry("attention", AttentionPart)

softmax = ATTENTION.register(
    Attention("softmax", exp_max, RowSum(), "exact", needs_distillation=False, score_range=(-20.0, 20.0))
)
softmax_puma = ATTENTION.register(
    Attention(
        "softmax_puma",
        exp_puma,
        RowSum(),
        "PUMA, arXiv 2307.12533",
        needs_distillation=False,
        score_range=(-20.0, 20.0),
    )
)
two_relu = ATTENTION.register(
    Attention(
        "2relu",
        relu_eps,
        RowSum(reciprocal=False),  # a row without a positive score
        "MPCFormer, arXiv 2211.01452",
        needs_distillation=True,
        score_range=(-20.0, 20.0),
    )
)
two_quad = ATTENTION.register(
    Attention(
        "2quad",
        square,
        RowSum(per_length=True),
        "MPCFormer, arXiv 2211.01452",
        needs_distillation=True,
        score_range=(-20.0, 20.0),
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
        needs_distillation=True,
        score_range=(-20.0, 20.0),
        exponential=True,
    )
)
two_quad_freediv = ATTENTION.register(
    Attention(
        "2quad_freediv",
        square,
        Constant(),
        "Liu et al., J. Computer Research and Development 61(5), 2024 (our reading of its abstract)",
        needs_distillation=True,
        score_range=(-20.0, 14.0),
        shift=5.0,
        degree=2,
    )
)
two_quad_fixed = ATTENTION.register(
    dataclasses.replace(two_quad_freediv, name="2quad_fixed", normaliser=Constant(per_length=False))
)
relu_freediv = ATTENTION.register(
    Attention(
        "relu_freediv",
        relu,
        Constant(),
        "MPCViT, arXiv 2211.13955",
        needs_distillation=True,
        score_range=(-20.0, 20.0),
        degree=1,
    )
)
scaling = ATTENTION.register(
    Attention(
        "scaling",
        linear,
        Constant(calibrated=False),
        "MPCViT, arXiv 2211.13955",
        needs_distillation=True,
        score_range=(-20.0, 20.0),
        degree=1,
    )
)
