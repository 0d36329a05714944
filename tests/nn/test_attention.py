"""Formulas are written here on their own, from the papers: float64, one row at a time."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmpc import secure
from flaxmpc.nn.attention import ATTENTION, Constant, PerHead, RowSum, folded, scalars_of
from flaxmpc.nn.mask import Mask, causal
from flaxmpc.nn.product import grouped_conv, grouped_conv_of_less_work, matmul

BATCH, HEADS, TOKENS, DEPTH = 2, 3, 8, 4
LENGTHS = (8, 5)


def _per_head(*names):
    return PerHead(tuple(ATTENTION[name] for name in names))


PARTS = {
    **ATTENTION,
    "mix of row sum and constant": _per_head("softmax", "2quad_freediv", "softmax"),
    "mix in another order": _per_head("2quad_freediv", "softmax", "softmax"),
    "mix of constants": _per_head("scaling", "relu_freediv", "scaling"),
    "mix of one": _per_head("2quad", "2quad", "2quad"),
}
every_part = pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
every_product = pytest.mark.parametrize("product", [matmul, grouped_conv])

SHIFTS = {"2quad": 5.0, "2quad_freediv": 5.0, "2quad_fixed": 5.0, "power5_batch": 5 / 8}
SHIFT = np.array([5.0, 3.0, 4.0])
SCALE = np.array([0.02, 1.5, 0.7])


# ---------------------------------------------------------------- numpy: scores of one row of valid keys -> weights


def _softmax(s, c, r):
    e = np.exp(s - s.max())
    return e / e.sum()


def _softmax_puma(s, c, r):
    x = s - s.max()
    e = np.where(x > -14, (1 + x / 2**5) ** 2**5, 0.0)
    return e / e.sum()


def _softmax_nimbus(s, c, r):
    x = s - s.max()
    cubic = 0.0291786417536755 * x**3 + 0.26332572942924737 * x**2 + 0.8318065569430768 * x + 0.9708981428645548
    e = np.where(x > -3.9, cubic, 0.0)
    return e / e.sum()


def _softmax_shaft(s, c, r):
    x = np.clip(s, -4, 12) / 16
    y = np.full(len(s), 1 / len(s))
    for _ in range(16):
        y = y + (x - (x * y).sum()) * y
    return y


def _two_relu(s, c, r):
    relu = s * (s > 0)
    return (relu + 1e-12 / len(s)) / (relu.sum() + 1e-12)


def _two_quad(s, c, r):
    return (s + c) ** 2 / ((s + c) ** 2).sum()


def _softmax_freediv(s, c, r):
    x = np.minimum(s - np.log(len(s)), 1.0)
    return r * np.where(x > -14, (1 + x / 2**5) ** 2**5, 0.0)


FORMULAS = {
    "softmax": _softmax,
    "softmax_puma": _softmax_puma,
    "softmax_nimbus": _softmax_nimbus,
    "softmax_shaft": _softmax_shaft,
    "2relu": _two_relu,
    "2quad": _two_quad,
    "softmax_freediv": _softmax_freediv,
    "2quad_freediv": lambda s, c, r: r / len(s) * (s + c) ** 2,
    "2quad_fixed": lambda s, c, r: r * (s + c) ** 2,
    "power5_batch": lambda s, c, r: r / 8**5 * (s + 8 * c) ** 5,
    "square_freediv": lambda s, c, r: r / len(s) * s**2,
    "relu_freediv": lambda s, c, r: r / len(s) * s * (s > 0),
    "scaling": lambda s, c, r: r / len(s) * s,
}


def formula(part, scores, value, mask, shift, scale):
    """Attention's output, for the scores, values and per-head scalars of all heads."""
    parts = part.parts if isinstance(part, PerHead) else (part,) * scores.shape[1]
    out = np.zeros(value.shape)
    for b, h, q in np.ndindex(scores.shape[:3]):
        valid = mask[b].astype(bool)
        weights = FORMULAS[parts[h].name](scores[b, h, q, valid].astype(np.float64), shift[h], scale[h])
        out[b, h, q] = weights @ value[b, h, valid].astype(np.float64)
    return out


# -------------------------------------------------------------------------------------------------------- inputs


def score_range(part: Any):
    parts: Any = part.parts if isinstance(part, PerHead) else (part,)
    ranges = [own.score_range for own in parts]
    return max(low for low, _ in ranges), min(high for _, high in ranges)


def padding(lengths, tokens):
    return np.array([[t < length for t in range(tokens)] for length in lengths], np.float32)


def inputs(part, *, lengths=LENGTHS, tokens=TOKENS, seed=0):
    """Scores spread over the part's range, its ends included; values of unit size; the mask."""
    rng = np.random.default_rng(seed)
    low, high = score_range(part)
    scores = rng.uniform(low, high, (len(lengths), HEADS, tokens, tokens))
    scores[..., 0, :] = high
    scores[..., 1, 0] = low
    scores[..., 2, :] = np.linspace(low, high, tokens)
    value = rng.uniform(-1, 1, (len(lengths), HEADS, tokens, DEPTH))
    return scores.astype(np.float32), value.astype(np.float32), padding(lengths, tokens)


def scalars(part, shift=SHIFT, scale=SCALE):
    """The trainable scalars that the part has."""
    values = {"shift": shift, "scale": scale}
    return {name: jnp.asarray(values[name], jnp.float32) for name in scalars_of(part, HEADS)}


def layer(part, product=matmul):
    """The part on scores, which come as the bias of queries and keys that are 0."""

    def run(scores, value, mask, scalars, dropout=None):
        nothing = jnp.zeros((*value.shape[:3], 1)), jnp.zeros((*scores.shape[:3], 1))
        return part(nothing[1], nothing[0], value, mask, scalars, bias=scores, product=product, dropout=dropout)

    return run


def apply(part, scores, value, mask, scalars, product=matmul):
    mask = Mask.from_tokens(jnp.asarray(mask))
    return np.asarray(layer(part, product)(jnp.asarray(scores), jnp.asarray(value), mask, scalars))


def close(ours, theirs, tolerance=1e-5):
    """Within the tolerance, relative to the largest."""
    assert ours.shape == theirs.shape
    assert np.isfinite(theirs).all()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1.0, np.abs(theirs).max()))


# --------------------------------------------------------------------------------------------------------- tests


def test_every_part_has_a_formula_here():
    assert set(FORMULAS) == set(ATTENTION)


@every_part
@every_product
def test_values_are_those_of_the_formula(part, product):
    scores, value, mask = inputs(part)
    close(
        apply(part, scores, value, mask, scalars(part), product),
        formula(part, scores, value, mask, SHIFT, SCALE),
        2e-5,
    )


@every_part
def test_trainable_scalars_start_as_published(part):
    start = scalars_of(part, HEADS)
    parts = part.parts if isinstance(part, PerHead) else (part,) * HEADS
    shifts = [SHIFTS.get(own.name, 0.0) for own in parts]
    scales = [own.name.endswith(("freediv", "fixed", "scaling", "batch")) for own in parts]
    assert set(start) == {name for name, has in (("shift", any(shifts)), ("scale", any(scales))) if has}
    if "shift" in start:
        np.testing.assert_array_equal(start["shift"], shifts)
    if "scale" in start:
        np.testing.assert_array_equal(start["scale"], np.where(scales, 1.0, 0.0))


def test_products_are_equal():
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(2, 3, 5, 4), (2, 3, 4, 6)])
    expected = np.einsum("bhmk,bhkn->bhmn", a, b)
    close(np.asarray(matmul(a, b)), expected)
    close(np.asarray(grouped_conv(a, b)), expected)


@every_part
@every_product
def test_padding_changes_nothing(part, product):
    """A batch padded to 8 and, further, to 11 tokens gives what each sentence gives alone."""
    for tokens in (8, 11):
        scores, value, mask = inputs(part, tokens=tokens)
        padded = apply(part, scores, value, mask, scalars(part), product)
        for b, n in enumerate(LENGTHS):
            one = slice(b, b + 1)
            alone = apply(part, scores[one, :, :n, :n], value[one, :, :n], np.ones((1, n)), scalars(part), product)
            close(padded[one, :, :n], alone)


@every_part
def test_what_padding_holds_is_never_read(part):
    scores, value, mask = inputs(part)
    before = apply(part, scores, value, mask, scalars(part))
    scores[1, :, :, LENGTHS[1] :] = score_range(part)[1]
    value[1, :, LENGTHS[1] :] = 7.0
    np.testing.assert_array_equal(apply(part, scores, value, mask, scalars(part)), before)


@every_part
def test_the_order_of_the_keys_does_not_matter(part):
    scores, value, mask = inputs(part)
    order = np.random.default_rng(1).permutation(TOKENS)
    shuffled = apply(part, scores[..., order], value[:, :, order], mask[:, order], scalars(part))
    close(shuffled, apply(part, scores, value, mask, scalars(part)))


@every_part
@pytest.mark.parametrize("kind", ["spread", "zero", "low", "high"])
def test_gradients_are_finite(part, kind):
    scores, value, mask = inputs(part)
    if kind != "spread":
        scores[:] = {"zero": 0.0, "low": score_range(part)[0], "high": score_range(part)[1]}[kind]
    seen = Mask.from_tokens(jnp.asarray(mask))

    def loss(scores, value, scalars):
        return jnp.square(layer(part)(scores, value, seen, scalars)).sum()

    grads = jax.grad(loss, argnums=(0, 1, 2))(jnp.asarray(scores), jnp.asarray(value), scalars(part))
    for grad in jax.tree.leaves(grads):
        assert np.isfinite(grad).all()
    np.testing.assert_array_equal(grads[0][1, :, :, LENGTHS[1] :], 0.0)
    np.testing.assert_array_equal(grads[1][1, :, LENGTHS[1] :], 0.0)
    if kind == "spread":
        assert all(np.abs(grad).max() > 0 for grad in jax.tree.leaves(grads))


@every_product
def test_every_part_traces_to_a_program_of_its_own(product):
    def program(part):
        scores, value, mask = map(jnp.asarray, inputs(part))
        # Which of the mask's forms is used counts too.
        jitted = jax.jit(layer(part, product), keep_unused=True)
        return jitted.lower(scores, value, Mask.from_tokens(mask), scalars_of(part, HEADS)).as_text()

    parts = {name: part for name, part in PARTS.items() if name != "mix of one"}
    programs = {name: program(part) for name, part in parts.items()}
    assert {name: program(part) for name, part in parts.items()} == programs  # the text is that of the program alone
    assert len(set(programs.values())) == len(parts)


def test_products_trace_to_different_programs():
    part = ATTENTION["2quad_freediv"]
    args = (*map(jnp.asarray, inputs(part)[:2]), Mask.from_tokens(jnp.ones((BATCH, TOKENS))), scalars(part))
    assert "convolution" in jax.jit(layer(part, grouped_conv)).lower(*args).as_text()
    assert "convolution" not in jax.jit(layer(part, matmul)).lower(*args).as_text()


@every_part
def test_dropout_acts_on_the_weights_and_keeps_their_mean(part):
    scores, value, mask = inputs(part)
    seen = Mask.from_tokens(jnp.asarray(mask))

    def run(dropout):
        return np.asarray(layer(part)(jnp.asarray(scores), jnp.asarray(value), seen, scalars(part), dropout))

    close(run(lambda weights: 2.0 * weights), 2.0 * run(None))
    np.testing.assert_array_equal(run(lambda weights: 0.0 * weights), 0.0)


@every_part
def test_calibration_is_the_mean_of_the_inverse_mean_numerator(part):
    scores, _, mask = inputs(part)
    start = scalars(part)
    found = part.calibrated(jnp.asarray(scores), Mask.from_tokens(jnp.asarray(mask)), start)
    assert set(found) == set(start)
    if "shift" in start:
        has = [own.name in SHIFTS for own in getattr(part, "parts", (part,) * HEADS)]
        np.testing.assert_array_equal(found["shift"], np.where(has, start["shift"], 0.0))
    for h, own in enumerate(part.parts if isinstance(part, PerHead) else (part,) * HEADS):
        if own.name in ("softmax_freediv", "2quad_freediv", "2quad_fixed", "relu_freediv", "power5_batch"):
            rows = [scores[b, h, q, : LENGTHS[b]] for b in range(BATCH) for q in range(LENGTHS[b])]
            means = [FORMULAS[own.name](row.astype(np.float64), SHIFT[h], 1.0).sum() for row in rows]
            inverses = [1.0 / mean for mean in means if mean >= 1e-3]
            expected = min(inverses) if own.name == "power5_batch" else np.mean(inverses)
            np.testing.assert_allclose(found["scale"][h], expected, rtol=1e-4)
        elif own.name in ("scaling", "square_freediv"):
            np.testing.assert_array_equal(found["scale"][h], start["scale"][h])


@pytest.mark.parametrize(("name", "low", "expected"), [("relu_freediv", -1.0, 0.5), ("power5_batch", -9.0, 0.25)])
def test_calibration_leaves_out_rows_without_weight(name, low, expected):
    """Or of less than none: those of odd powers can be negative."""
    part, mask = ATTENTION[name], Mask.from_tokens(jnp.ones((1, 4)))
    scores = np.full((1, HEADS, 4, 4), 2.0 if name == "relu_freediv" else 3.0, np.float32)
    scores[0, 0, 1:] = low
    scores[0, 1:] = low
    found = part.calibrated(jnp.asarray(scores), mask, scalars_of(part, HEADS))
    np.testing.assert_allclose(found["scale"], [expected, 1.0, 1.0])


def exact_softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def weights_of(name, scores):
    """The weights (row, key) that a part gives rows of valid keys, from its own context of the unit values."""
    rows, keys = scores.shape
    value = np.broadcast_to(np.eye(keys, dtype=np.float32), (rows, 1, keys, keys))
    return apply(ATTENTION[name], scores[:, None, None].astype(np.float32), value, np.ones((rows, keys)), {})[:, 0, 0]


def within(scores, spread):
    """The rows, moved and stretched so that all of a row is within a spread, its ends included."""
    low, high = scores.min(-1, keepdims=True), scores.max(-1, keepdims=True)
    return spread * (scores - low) / (high - low)


@pytest.mark.parametrize("keys", [2, 8, 128])
@pytest.mark.parametrize(
    ("name", "spread", "factor"),
    [
        ("softmax_nimbus", 1.5, 1.06),
        ("softmax_nimbus", 2.5, 1.09),
        ("softmax_shaft", 1.0, 1.034),
        ("softmax_shaft", 4.0, 1.83),
    ],
)
def test_weights_are_within_the_stated_factor_of_softmaxs(name, spread, factor, keys):
    scores = within(np.random.default_rng(0).normal(size=(200, keys)), spread)
    for moved in (scores, scores - 4.0):
        ratio = weights_of(name, moved) / exact_softmax(moved)
        assert 1 / factor < ratio.min() < ratio.max() < factor


@pytest.mark.parametrize(
    ("name", "keys", "largest", "mean"),
    [
        ("softmax_nimbus", 8, 0.07, 0.02),
        ("softmax_nimbus", 128, 0.35, 0.04),
        ("softmax_shaft", 8, 0.02, 0.01),
        ("softmax_shaft", 128, 0.1, 0.03),
    ],
)
def test_approximations_of_softmax_move_little_weight_of_normal_scores(name, keys, largest, mean):
    """Half of the sum of what the weights of a row are off by: in the worst of a thousand rows, and on average."""
    scores = np.random.default_rng(0).normal(size=(1000, keys))
    off = np.abs(weights_of(name, scores) - exact_softmax(scores)).sum(-1) / 2
    print(f"{name}, {keys} keys: {off.max():.3f} at most, {off.mean():.4f} on average")
    assert off.max() < largest
    assert off.mean() < mean


def test_what_approximations_of_softmax_lose():
    """A hundred keys that are 4 below the largest; scores beyond the bounds."""
    scores = np.array([[0.0] + [-4.0] * 100])
    assert exact_softmax(scores)[0, 1:].sum() == pytest.approx(0.65, abs=0.01)
    assert weights_of("softmax_nimbus", scores)[0, 1:].sum() == 0
    close(weights_of("softmax_shaft", np.array([[12.0, 14.0, -9.0, -4.0]])), np.array([[0.5, 0.5, 0.0, 0.0]]), 1e-4)


def test_a_constant_without_length_is_off_for_other_lengths():
    part = dataclasses.replace(ATTENTION["2quad_freediv"], normaliser=Constant(per_length=False))
    scores, value, mask = inputs(part)
    ours = apply(part, scores, value, mask, scalars(part))
    close(
        ours, formula(ATTENTION["2quad_freediv"], scores, value, mask, SHIFT, SCALE) * np.reshape(LENGTHS, (2, 1, 1, 1))
    )


@pytest.mark.parametrize("part", ATTENTION.values(), ids=ATTENTION)
def test_the_stated_degree_is_the_numerators(part):
    """f(a s; a c) = a^k f(s; c): so factors fold into the weights."""
    scores, _, mask = inputs(part)
    mask, shift = Mask.from_tokens(jnp.asarray(mask)), scalars(part).get("shift")
    once = part.f(jnp.asarray(scores), mask, shift)
    twice = part.f(2.0 * jnp.asarray(scores), mask, None if shift is None else 2.0 * shift)
    if part.degree is not None:
        close(np.asarray(twice), 2.0**part.degree * np.asarray(once))
        shifted = scores if shift is None else scores + np.asarray(shift)[:, None, None]
        if part.score_degree is not None:
            same = jnp.broadcast_to(jnp.eye(TOKENS), (BATCH, HEADS, TOKENS, TOKENS))
            mixed = part.mix(jnp.asarray(shifted), same, same, mask)
            close(np.asarray(mixed), np.asarray(once))
    else:
        assert all(np.abs(twice - 2.0**k * once).max() > 1e-6 for k in range(4)) or part.name == "2relu"


@pytest.mark.parametrize("product", [matmul, grouped_conv])
@pytest.mark.parametrize("folds", [False, True])
def test_a_linear_attention_takes_keys_times_values_first_where_these_are_smaller(product, folds, group):
    part, rng = ATTENTION["scaling"], np.random.default_rng(0)
    query, key, value = (rng.normal(size=(1, HEADS, 16, DEPTH)).astype(np.float32) for _ in range(3))
    mask = jax.device_get(Mask.from_tokens(jnp.asarray([[1] * 11 + [0] * 5]), degree=1 if folds else None))
    given = scalars(part)

    def context(query, key, value, mask, part=part, bias=None):
        if folds:
            a = mask.unit.scale[:, None]
            return part.mix(query * a, key * a, value * a, mask, product=product)
        return part(query, key, value, mask, given, product=product, bias=bias)

    first = secure.jit(context, parties=group("ABY3")).run(query, key, value, mask)
    scores = functools.partial(context, part=dataclasses.replace(part, linear=False))
    last = secure.jit(scores, parties=group("ABY3")).run(query, key, value, mask)
    expected = (query @ key.swapaxes(-1, -2))[..., :11] @ value[:, :, :11] / 11
    if folds:
        expected = expected * np.asarray(mask.scale)[0, :, None]
    else:
        expected = expected * np.asarray(given["scale"])[:, None, None]
    for run in (first, last):
        np.testing.assert_allclose(run.output, expected, atol=2e-3)
    assert first.cost.bytes_sent < 0.6 * last.cost.bytes_sent
    if not folds:  # what is added to the scores is in no product of keys and values
        bias = rng.normal(size=(1, HEADS, 16, 16)).astype(np.float32)
        args = jax.tree.map(jnp.asarray, (query, key, value, mask))
        close(context(*args, bias=jnp.asarray(bias)), scores(*args, bias=jnp.asarray(bias)))


@every_part
@pytest.mark.parametrize("scale", [(0.02, 1.5, 1.0), (0.0, -2.0, 3.0)])
def test_what_folds_goes_into_scores_and_values(part, scale):
    scores, value, mask = inputs(part)
    given = scalars(part, scale=np.array(scale))
    query, factor, left = folded(part, given, HEADS)
    assert "scale" not in left
    ours = apply(part, scores * query[:, None, None], value * factor[:, None, None], mask, left)
    close(ours, apply(part, scores, value, mask, given))


@every_part
@every_product
def test_a_causal_query_sees_what_it_would_alone(part, product):
    """Each query's context, given the pairs, is that of a text which ends at its token."""
    scores, value, mask = inputs(part)
    seen = Mask.from_tokens(jnp.asarray(mask), pairs=causal)
    ours = np.asarray(layer(part, product)(jnp.asarray(scores), jnp.asarray(value), seen, scalars(part)))
    for b, n in enumerate(LENGTHS):
        for q in range(n):
            one = scores[b : b + 1, :, : q + 1, : q + 1], value[b : b + 1, :, : q + 1]
            alone = apply(part, *one, np.ones((1, q + 1)), scalars(part), product)
            close(ours[b : b + 1, :, q], alone[:, :, q], 2e-5)


# ------------------------------------------------------------------------------------------------------- on shares

SECURE_LENGTHS = (8, 5, 3, 1)


@every_part
def test_the_stated_range_is_far_from_overflow(part):
    scores, value, mask = inputs(part, lengths=SECURE_LENGTHS)
    args = (scores, value, Mask.from_tokens(jnp.asarray(mask)), scalars_of(part, HEADS))
    secure.check(layer(part), [jax.device_get(args)]).require()


@pytest.mark.parametrize("protocol", ["REF2K", "ABY3"])
@every_part
def test_secure_result_is_within_a_hundredth_on_the_stated_range(part, protocol, group):
    scores, value, mask = inputs(part, lengths=SECURE_LENGTHS)
    start, seen = scalars_of(part, HEADS), Mask.from_tokens(jnp.asarray(mask))
    plain = apply(part, scores, value, mask, start)

    # The exception that `score_range` states. It must stay one.
    usual = np.ones(scores.shape[:3], bool)
    parts: Any = part.parts if isinstance(part, PerHead) else (part,) * HEADS
    for h, own in enumerate(parts):
        if isinstance(own.normaliser, RowSum):
            numerator = np.asarray(own.f(jnp.asarray(scores), seen, start.get("shift")))[:, h]
            usual[:, h] = (numerator * mask[:, None]).sum(-1) >= 0.01
    assert usual[0].all()
    assert usual.mean() > 0.8

    for product in (matmul, grouped_conv):
        ours = secure.jit(layer(part, product), parties=group(protocol))(scores, value, seen, start)
        assert np.abs(ours - plain)[usual].max() < 0.01


@pytest.mark.parametrize("protocol", ["REF2K", "ABY3"])
@pytest.mark.parametrize(("name", "root"), [("2quad", lambda total: np.sqrt(total / TOKENS) - 5.0), ("2relu", None)])
def test_a_row_sum_of_a_hundredth_is_enough_and_of_thousands_not_too_much(name, root, protocol, group):
    part = ATTENTION[name]
    _, value, mask = inputs(part, lengths=(8,) * 6)
    totals = np.array([0.01, 0.1, 1.0, 10.0, 100.0, 160.0 if root is None else 5000.0])
    scores = np.broadcast_to(
        (root(totals) if root else totals / TOKENS)[:, None, None, None], (6, HEADS, TOKENS, TOKENS)
    )
    scores = scores.astype(np.float32)
    start, seen = scalars_of(part, HEADS), Mask.from_tokens(jnp.asarray(mask))
    plain = apply(part, scores, value, mask, start)
    ours = secure.jit(layer(part), parties=group(protocol))(scores, value, seen, start)
    np.testing.assert_allclose(ours, plain, rtol=0, atol=0.01)


@pytest.mark.parametrize("protocol", ["REF2K", "ABY3"])
def test_a_row_sum_over_many_keys_keeps_its_bits(protocol, group):
    """(s + 5)^2 over 512 keys sums to 13,000 and to 200,000: the reciprocals have 20 and 1 units of 2^-18."""
    part, rng = ATTENTION["2quad"], np.random.default_rng(0)
    value, mask = rng.normal(size=(1, 2, 512, DEPTH)).astype(np.float32), np.ones((1, 512), np.float32)
    mean = np.array([0.0, 15.0])[None, :, None, None]
    scores = (mean + rng.normal(size=(1, 2, 4, 512))).astype(np.float32)
    start, seen = scalars_of(part, 2), Mask.from_tokens(jnp.asarray(mask))
    plain = apply(part, scores, value, mask, start)
    ours = secure.jit(layer(part), parties=group(protocol))(scores, value, seen, start)
    assert np.abs(ours - plain).max() < 5e-4


@pytest.mark.parametrize("protocol", ["REF2K", "ABY3"])
def test_rows_of_many_steps_still_sum_to_one(protocol, group):
    """100 keys: 1/100 is rounded, by 0.0002 of it. With scores counted from 0 that becomes 0.007 where all are low."""
    part, rng = ATTENTION["softmax_shaft"], np.random.default_rng(0)
    middle = np.array([-30.0, -4.0, 0.0, 4.0, 12.0, 30.0])[:, None, None, None]
    scores = (middle + rng.uniform(-1, 1, (6, 1, 4, 100))).astype(np.float32)
    value, seen = np.ones((6, 1, 100, 1), np.float32), jax.device_get(Mask.from_tokens(jnp.ones((6, 100))))
    sums = secure.jit(layer(part), parties=group(protocol))(scores, value, seen, {})
    np.testing.assert_allclose(sums, 1.0, atol=6e-4)


@pytest.mark.parametrize("protocol", ["REF2K", "ABY3"])
@pytest.mark.parametrize("folds", ["", "into scores", "into values"])
def test_the_constant_of_a_fifth_power_keeps_its_bits(folds, protocol, group):
    """Of 128 keys. As published it is 1 / 1,000,000 here, a quarter of a unit of 2^-18: nothing would be left."""
    part, rng = ATTENTION["power5_batch"], np.random.default_rng(0)
    scores = (2 * rng.normal(size=(1, HEADS, 16, 128))).astype(np.float32)
    value = rng.normal(size=(1, HEADS, 128, DEPTH)).astype(np.float32)
    square = np.concatenate([scores, np.zeros((1, HEADS, 112, 128))], 2)
    seen = Mask.from_tokens(jnp.ones((1, 128)))
    start = part.calibrated(jnp.asarray(square), seen, scalars_of(part, HEADS))
    assert np.asarray(start["scale"]).max() / 8**5 < 2e-6
    plain = apply(part, scores, value, np.ones((1, 128)), start)
    assert np.abs(plain).max() > 0.1
    given = start
    if folds:
        query, factor, given = folded(part, start, HEADS, query=folds == "into scores")
        scores, value = scores * query[:, None, None], value * factor[:, None, None]
    args = jax.device_get((scores, value, seen, given))
    ours = secure.jit(layer(part), parties=group(protocol))(*args)
    assert np.abs(ours - plain).max() < 0.002


def test_a_fifth_power_has_its_c_beside_the_scores():
    part = dataclasses.replace(ATTENTION["power5_batch"], normaliser=Constant())
    scores, value, mask = inputs(part)
    with pytest.raises(ValueError, match="power5 takes c beside the scores"):
        part.mix(jnp.asarray(scores), jnp.asarray(scores), jnp.asarray(value), Mask.from_tokens(jnp.asarray(mask)))


@pytest.mark.parametrize("protocol", ["ABY3", "SEMI2K"])
@pytest.mark.parametrize("name", ["softmax_nimbus", "softmax_shaft", "power5_batch", "square_freediv"])
@pytest.mark.parametrize("pairs", [None, causal], ids=["all pairs", "causal"])
def test_nothing_is_left_of_masked_keys_on_shares(pairs, name, protocol, group):
    """Not of those either whose scores are far above all that a query sees, where they are counted twice as hidden."""
    part = ATTENTION[name]
    scores, value, mask = inputs(part)
    seen, given = jax.device_get((Mask.from_tokens(jnp.asarray(mask), pairs=pairs), scalars_of(part, HEADS)))
    plain = np.asarray(jax.jit(layer(part))(scores, value, seen, given))
    ours = secure.jit(layer(part), parties=group(protocol))(scores, value, seen, given)
    assert np.abs(ours - plain).max() < 0.005


@pytest.mark.parametrize(("score", "fits"), [(100.0, True), (280.0, True), (400.0, False)])
def test_a_fifth_power_overflows_where_it_says_and_is_seen(score, fits, group):
    part = ATTENTION["power5_batch"]
    args = (np.full((1, 1, 1, 1), score, np.float32), np.ones((1, 1, 1, 1), np.float32))
    seen = jax.device_get(Mask.from_tokens(jnp.ones((1, 1))))
    given = jax.device_get(scalars_of(part, 1))
    margins = secure.check(layer(part), [(*args, seen, given)])
    assert (margins.margin_bits > 0) == fits
    ours = float(np.asarray(secure.jit(layer(part), parties=group("ABY3"))(*args, seen, given)).item())
    assert (abs(ours / ((score + 5) / 8) ** 5 - 1) < 1e-3) == fits
    if not fits:
        with pytest.raises(secure.OverflowRisk, match="too small for"):
            margins.require()


def test_a_row_sum_takes_one_reciprocal_a_row(group):
    """2relu's may be 0, so it divides; the option of `secure.jit` makes it as cheap."""
    scores, value, mask = inputs(ATTENTION["softmax"])
    args = (scores, value, Mask.from_tokens(jnp.asarray(mask)), {})
    programs = {name: secure.jit(layer(ATTENTION[name]), parties=group("ABY3")).program(*args) for name in ATTENTION
                if name in ("softmax", "softmax_puma", "2relu")}  # fmt: skip
    assert {name: "pphlo.divide" in program for name, program in programs.items()} == {
        "softmax": False, "softmax_puma": False, "2relu": True,
    }  # fmt: skip
    shared = secure.jit(layer(ATTENTION["2relu"]), parties=group("ABY3"), shared_reciprocal=True).program(*args)
    assert "pphlo.divide" not in shared


# Bytes of a score and rounds in ABY3. The comparisons of the bounded exponentials as numbers took 632 and 876 bytes, 27
# and 43 rounds. A row's maximum is six comparisons in sequence here.
COST = {
    "softmax_puma": (660, 93),
    "softmax_freediv": (700, 30),
    "softmax_nimbus": (480, 85),
    "softmax_shaft": (2040, 101),
    "power5_batch": (188, 10),
    "square_freediv": (53, 3),
}


@pytest.mark.parametrize("name", COST)
def test_numerators_cost_what_their_steps_do(name, group):
    scores = np.zeros((1, 1, 64, 64), np.float32)
    mask, part = Mask.from_tokens(jnp.ones((1, 64))), ATTENTION[name]
    shift = scalars_of(part, 1).get("shift")
    cost = secure.jit(lambda s, m: part.f(s, m, shift), parties=group("ABY3")).run(scores, mask).cost
    print(f"{name}: {cost.bytes_sent / scores.size:.0f} B, {cost.rounds:.1f} rounds")
    assert cost.bytes_sent / scores.size <= COST[name][0]
    assert cost.rounds <= COST[name][1]


@pytest.mark.parametrize(
    ("shape", "convolutions", "of_less_work"),
    [
        ((1, 12, 16, 32, 16), 1, 1),
        ((1, 12, 128, 64, 128), 1, 2),
        ((1, 6, 128, 128, 128), 1, 1),
        ((1, 12, 512, 64, 512), 3, 6),
        ((2, 13, 8, 4, 8), 2, 2),
    ],
)
def test_a_grouped_convolution_has_only_so_much_work(shape, convolutions, of_less_work):
    batch, heads, m, k, n = shape
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(batch, heads, m, k)), rng.normal(size=(batch, heads, k, n))
    products: Any = (grouped_conv, convolutions), (grouped_conv_of_less_work, of_less_work)
    for product, count in products:
        np.testing.assert_allclose(product(a, b), a @ b, rtol=0, atol=1e-4)
        assert str(jax.make_jaxpr(product)(a, b)).count("conv_general_dilated[") == count


def test_grouped_conv_takes_fewer_rounds_for_many_heads(group):
    a, b = np.ones((1, 12, 4, 4), np.float32), np.ones((1, 12, 4, 4), np.float32)
    rounds = [secure.jit(product, parties=group("ABY3")).run(a, b).cost.rounds for product in (matmul, grouped_conv)]
    print(f"12 heads, ABY3: {rounds[0]:.1f} rounds with matmul, {rounds[1]:.1f} with grouped_conv")
    assert rounds[1] < rounds[0] / 4
