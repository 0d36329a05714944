import jax
import numpy as np
import pytest

from flaxmpc.models.base import param_shapes


@pytest.fixture(scope="session")
def random_params():
    """random_params(model, seed) -> parameters, of which no two are alike; much faster than to initialise them."""

    def make(model, seed=0):
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), param_shapes(model))

    return make
