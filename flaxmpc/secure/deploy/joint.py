"""Several requests in one secure run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def jointly(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` for several requests at once: its rounds are those of one.

    The requests' arrays are joined inside the program, on shares, where that costs nothing; nobody sees another's.

    Args:
        fn: (weights, *inputs) -> output, pytrees of arrays whose first axis is the sentence in every input and output.

    Returns:
        (weights, *requests) -> list of the requests' outputs, each request a tuple of inputs.
    """

    def together(weights: Any, *requests: tuple[Any, ...]) -> list[Any]:
        output = fn(weights, *jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *requests))
        ends, outputs = 0, []
        for request in requests:
            start, ends = ends, ends + jax.tree.leaves(request)[0].shape[0]
            outputs.append(jax.tree.map(lambda leaf, rows=slice(start, ends): leaf[rows], output))
        return outputs

    return together
