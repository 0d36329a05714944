import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmpc.models.outputs import Intermediates
from flaxmpc.training import losses

RNG = np.random.default_rng(0)
LOGITS, TEACHER = jnp.asarray(RNG.normal(0, 3, (2, 5, 3)), jnp.float32)
LABELS = jnp.array([0, 2, 1, 1, 0])
ROWS = jnp.array([1, 1, 0, 1, 0], jnp.float32)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def states(seed: int) -> Intermediates:
    rng = np.random.default_rng(seed)
    embeddings, *hidden = jnp.asarray(rng.normal(size=(3, 2, 4, 6)), jnp.float32)
    return Intermediates(embeddings, tuple(hidden), (), ())


def changed(array, where):
    return jnp.asarray(np.where(where, np.float32(1e3), array))


def test_cross_entropy_is_that_of_the_true_label():
    per_row = -log_softmax(LOGITS)[np.arange(5), LABELS]
    assert losses.label_loss(LOGITS, LABELS, ROWS) == pytest.approx(per_row[ROWS > 0].mean(), rel=1e-5)


def test_soft_cross_entropy_weighs_with_the_teachers_probabilities():
    per_row = -(np.exp(log_softmax(TEACHER)) * log_softmax(LOGITS)).sum(-1)
    assert losses.logit_loss(LOGITS, TEACHER, ROWS) == pytest.approx(per_row[ROWS > 0].mean(), rel=1e-5)


def test_soft_cross_entropy_is_least_where_the_student_is_the_teacher():
    gradient = jax.grad(losses.logit_loss)(TEACHER, TEACHER, ROWS)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_hidden_loss_sums_the_means_of_layers_and_embeddings():
    ours, theirs = states(1), states(2)
    mask = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0]], jnp.float32)
    expected = sum(
        (np.asarray(a - b, np.float64)[mask > 0] ** 2).mean()
        for a, b in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True)
    )
    assert losses.hidden_loss(ours, theirs, mask) == pytest.approx(expected, rel=1e-5)
    assert losses.hidden_loss(ours, ours, mask) == 0


def test_rows_that_only_fill_up_do_not_matter():
    fill = (ROWS == 0)[:, None]
    for loss, other in ((losses.label_loss, LABELS), (losses.logit_loss, TEACHER)):
        assert loss(changed(LOGITS, fill), other, ROWS) == loss(LOGITS, other, ROWS)
        assert (jax.grad(loss)(LOGITS, other, ROWS)[ROWS == 0] == 0).all()
    mask = jnp.array([[1, 1, 1, 0], [0, 0, 0, 0]], jnp.float32)
    ours, theirs = states(1), states(2)
    padded = jax.tree.map(lambda leaf: changed(leaf, mask[..., None] == 0), ours)
    assert losses.hidden_loss(padded, theirs, mask) == losses.hidden_loss(ours, theirs, mask)


def test_a_batch_of_fill_alone_has_no_loss():
    assert losses.label_loss(LOGITS, LABELS, jnp.zeros(5)) == 0


def test_models_of_different_depth_are_refused():
    ours, theirs = states(1), states(2)
    with pytest.raises(ValueError, match="shorter"):
        losses.hidden_loss(ours, theirs._replace(hidden_states=theirs.hidden_states[:1]), jnp.ones((2, 4)))
