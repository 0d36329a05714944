import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmpc import secure
from flaxmpc.nn.embedding import EMBEDDINGS

VOCABULARY, HIDDEN = 30, 16
IDS = np.array([[0, 29, 3, 3], [7, 1, 0, 12]], np.int32)
TABLE = np.random.default_rng(0).uniform(-2, 2, (VOCABULARY, HIDDEN)).astype(np.float32)

every_part = pytest.mark.parametrize("part", EMBEDDINGS.values(), ids=EMBEDDINGS)
every_secret_part = pytest.mark.parametrize(
    "part", [part for part in EMBEDDINGS.values() if not part.client_embeds], ids=lambda part: part.name
)


@every_part
def test_every_part_gives_the_rows_of_the_table(part):
    embeddings = part.lookup(jnp.asarray(TABLE), part.encode(jnp.asarray(IDS), VOCABULARY))
    expected = np.array([[TABLE[token] for token in row] for row in IDS])
    np.testing.assert_allclose(embeddings, expected, atol=1e-6)


@every_part
def test_gradients_reach_the_rows_in_use_only(part):
    grad = jax.grad(lambda table: part.lookup(table, part.encode(jnp.asarray(IDS), VOCABULARY)).sum())(
        jnp.asarray(TABLE)
    )
    np.testing.assert_allclose(grad[:, 0], np.bincount(IDS.ravel(), minlength=VOCABULARY))


def test_every_part_traces_to_a_program_of_its_own():
    def programs():
        return {
            name: jax.jit(part.lookup).lower(TABLE, part.encode(jnp.asarray(IDS), VOCABULARY)).as_text()
            for name, part in EMBEDDINGS.items()
        }

    first = programs()
    assert programs() == first  # the text is that of the program alone
    assert len(set(first.values())) == len(EMBEDDINGS)


@every_secret_part
def test_a_secret_table_is_never_indexed(part):
    text = jax.jit(part.lookup).lower(TABLE, part.encode(jnp.asarray(IDS), VOCABULARY)).as_text()
    assert "gather" not in text
    assert "dynamic" not in text
    public = EMBEDDINGS["public"]
    assert "gather" in jax.jit(public.lookup).lower(TABLE, public.encode(jnp.asarray(IDS), VOCABULARY)).as_text()


@pytest.mark.parametrize("protocol", ["REF2K", "ABY3"])
@every_secret_part
def test_secure_result_is_within_a_hundredth_of_the_lookup(part, protocol, group):
    encoded = np.asarray(part.encode(jnp.asarray(IDS), VOCABULARY))
    ours = secure.jit(part.lookup, parties=group(protocol))(TABLE, encoded)
    np.testing.assert_allclose(ours, TABLE[IDS], rtol=0, atol=0.01)
