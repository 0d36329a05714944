import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmpc.nn.mask import Both, Mask, causal

TOKENS = jnp.array([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])


def test_weights_sum_to_one_and_survive_an_empty_text():
    mask = Mask.from_tokens(TOKENS)
    np.testing.assert_allclose(mask.weight, [[1 / 3, 1 / 3, 1 / 3, 0], [0, 0, 0, 0], [0.25] * 4])
    np.testing.assert_allclose(mask.fourth_root**4, mask.weight, rtol=1e-6)
    np.testing.assert_array_equal(mask.tokens, TOKENS)
    np.testing.assert_allclose(mask.inverse_count, [[1 / 3], [1], [0.25]])
    np.testing.assert_allclose(mask.log_count, np.log([[3], [1], [4]]), rtol=1e-6)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_numerators_of_the_degree_turn_two_factors_into_mask_and_count(degree):
    mask = Mask.from_tokens(TOKENS, degree=degree)
    pairs = (mask.scale[:, :, None] * mask.scale[:, None, :]) ** degree
    tokens = np.asarray(TOKENS, np.float64)
    expected = tokens[:, :, None] * tokens[:, None, :] / np.maximum(tokens.sum(-1), 1)[:, None, None]
    np.testing.assert_allclose(pairs, expected, rtol=1e-5)
    np.testing.assert_allclose(mask.scale * mask.inverse, TOKENS, rtol=1e-6)
    np.testing.assert_allclose(mask.unit.inverse_square[..., 0], mask.inverse**2, rtol=1e-6)


def test_pairs_count_what_each_query_sees():
    mask = Mask.from_tokens(TOKENS, pairs=causal)
    np.testing.assert_allclose(mask.inverse_count, [[1, 1 / 2, 1 / 3, 1 / 3], [1] * 4, [1, 1 / 2, 1 / 3, 1 / 4]])
    numerators = jnp.ones((3, 1, 4, 4))
    np.testing.assert_array_equal(mask.hide(numerators)[0, 0], np.tri(4))
    lowered = mask.lower(jnp.zeros((3, 1, 4, 4)), 10.0)
    assert (np.asarray(lowered)[0, 0] == [[0, -10, -10, -20], [0, 0, -10, -20], [0, 0, 0, -20], [0, 0, 0, -10]]).all()


def test_without_pairs_nothing_is_hidden():
    numerators = jnp.ones((3, 1, 4, 4))
    assert Mask.from_tokens(TOKENS).hide(numerators) is numerators


@pytest.mark.parametrize("pairs", [None, causal], ids=["all pairs", "causal"])
def test_uniform_weights_are_alike_for_all_keys_that_a_query_sees(pairs):
    visible = np.ones((4, 4)) if pairs is None else causal(4)
    visible = np.asarray(TOKENS)[:, None] * visible
    expected = visible / np.maximum(visible.sum(-1, keepdims=True), 1.0)
    weights = jnp.broadcast_to(Mask.from_tokens(TOKENS, pairs=pairs).uniform(), (3, 1, 4, 4))
    np.testing.assert_allclose(weights[:, 0], expected, rtol=1e-6)


def even(num_tokens):
    return np.add.outer(np.arange(num_tokens), np.arange(num_tokens)) % 2 == 0


def test_masks_combine():
    mask = Mask.from_tokens(TOKENS, degree=2) & causal
    assert mask.pairs is causal
    np.testing.assert_array_equal(mask.scale, mask.tokens)  # the degree is gone
    both = mask & even
    assert both.pairs == Both((causal, even))
    numerators = jnp.ones((3, 1, 4, 4))
    np.testing.assert_array_equal(both.hide(numerators)[0, 0], np.tri(4) * even(4))
    np.testing.assert_allclose(both.inverse_count[2], [1, 1, 1 / 2, 1 / 2])


def test_pairs_have_no_degree():
    with pytest.raises(ValueError, match="a mask with pairs has no degree"):
        Mask.from_tokens(TOKENS, degree=2, pairs=causal)


def test_pairs_are_no_secret_and_the_rest_is():
    """They are part of the program: what is shared does not hold them."""
    leaves, treedef = jax.tree.flatten(Mask.from_tokens(TOKENS, pairs=causal))
    assert len(leaves) == 8
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert treedef != jax.tree.structure(Mask.from_tokens(TOKENS))
    assert jax.tree.unflatten(treedef, leaves).pairs is causal
