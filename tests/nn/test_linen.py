"""What Flax offers for deep models works in the installed pair of Flax and JAX."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest


class Block(nn.Module):
    wrap: bool

    @nn.compact
    def __call__(self, hidden, _):
        dense = nn.remat(nn.Dense) if self.wrap else nn.Dense
        return jnp.tanh(dense(3, name="dense")(hidden)), None


@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "remat"])
@pytest.mark.parametrize("shared", [False, True], ids=["a layer's own", "shared"])
def test_scan_over_layers_is_the_loop(wrap, shared):
    axes: dict[str, Any] = {"variable_broadcast": "params"} if shared else {"variable_axes": {"params": 0}}
    stack = nn.scan(Block, **axes, split_rngs={"params": not shared}, length=2)(wrap)
    x = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)
    params = stack.init(jax.random.key(0), x, None)

    def loop(params):
        hidden = x
        for layer in range(2):
            dense = params["params"]["dense"]
            kernel, bias = (dense[name] if shared else dense[name][layer] for name in ("kernel", "bias"))
            hidden = jnp.tanh(hidden @ kernel + bias)
        return hidden

    np.testing.assert_allclose(stack.apply(params, x, None)[0], loop(params), rtol=1e-6)
    ours, theirs = (jax.grad(lambda p, f=f: f(p).sum())(params) for f in (lambda p: stack.apply(p, x, None)[0], loop))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)


def test_parameters_are_made_from_shapes_alone():
    shapes = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    params = nn.Dense(3).lazy_init(jax.random.key(0), shapes)
    assert jax.tree.map(jnp.shape, params) == {"params": {"bias": (3,), "kernel": (4, 3)}}
