"""What each step to a cheaper layer is worth, beside what it replaced and what was tried and left.

    python benchmarks/steps.py [--json] [--show] [--quick]

Each step alone, at BERT-Base's sizes: 12 heads of size 64, width 768, 128 tokens, on ABY3 unless it says otherwise; the
products of the heads at 32 tokens, since one way to write them needs 64 times their memory. `kept` is what a folded
model does. Seconds on 2 idle cores.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from harness import Benchmark, Options, Record, model_parties, record
from variants import AFTER_ATTENTION, AFTER_FEED_FORWARD, Workload

from flaxmpc.nn.activation import ACTIVATIONS
from flaxmpc.nn.lazy import square_mean_by_product
from flaxmpc.nn.product import grouped_conv, matmul


class Case(NamedTuple):
    """One way to do a step.

    Attributes:
        step: what is computed.
        variant: how.
        kept: whether a folded model does it so.
        function: of (None, *inputs).
        shapes: of the inputs, which are uniform in [0.5, 1.5].
    """

    step: str
    variant: str
    kept: bool
    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    protocol: str = "ABY3"


def multiply_and_sum(a: jax.Array, b: jax.Array) -> jax.Array:
    """A batched matmul as products of elements."""
    return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)


def cases(heads: int, size: int, tokens: int) -> Iterator[Case]:
    width = heads * size
    hidden, row = (tokens, width), (tokens, 1)
    weights, values = (1, heads, tokens, tokens), (1, heads, tokens, size)

    few = min(tokens, 32)
    products = ((1, heads, few, size), (1, heads, size, few))
    for variant, product in (("head after head", matmul), ("grouped convolution", grouped_conv),
                             ("multiply and sum", multiply_and_sum)):  # fmt: skip
        yield Case("products of the heads", variant, product is grouped_conv,
                   lambda _, a, b, product=product: product(a, b), products)  # fmt: skip
    for variant, product in (("head after head", matmul), ("grouped convolution", grouped_conv)):
        yield Case("products of the heads", variant, product is matmul,
                   lambda _, a, b, product=product: product(a, b), products, "SEMI2K")  # fmt: skip

    yield Case("mask of (s + c)^2", "on the weights", False, lambda _, s, v, m: grouped_conv(jnp.square(s) * m, v),
               (weights, values, (1, 1, 1, tokens)))  # fmt: skip
    yield Case("mask of (s + c)^2", "on V", False, lambda _, s, v, m: grouped_conv(jnp.square(s), v * m),
               (weights, values, (1, 1, tokens, 1)))  # fmt: skip
    yield Case("mask of (s + c)^2", "in the state: nothing left", True, lambda _, s, v: grouped_conv(jnp.square(s), v),
               (weights, values))  # fmt: skip

    yield Case("Q, K, V", "three matrices", False, lambda _, x, q, k, v: (x @ q, x @ k, x @ v),
               (hidden, *((width, width),) * 3))  # fmt: skip
    yield Case("Q, K, V", "one matrix", True, lambda _, x, qkv: x @ qkv, (hidden, (width, 3 * width)))

    yield Case("residual, scale, bias", "product and sums", False, lambda _, x, w, r, s, b: x @ w + r * s + b,
               (hidden, (width, width), hidden, (width,), (width,)))  # fmt: skip
    yield Case("residual, scale, bias", "rows of the matrix", True, lambda _, x, w: x @ w,
               ((tokens, 2 * width + 1), (2 * width + 1, width)))  # fmt: skip

    yield Case("mean of squares", "squares", False, lambda _, x: jnp.square(x).mean(-1, keepdims=True), (hidden,))
    yield Case("mean of squares", "diagonal of X X^T", True, lambda _, x: square_mean_by_product(x), (hidden,))
    yield Case("mean of squares", "of a few rows each, grouped", True,
               lambda _, x: square_mean_by_product(x, grouped_conv), (hidden,))  # fmt: skip

    yield Case("inverse square root", "SPU's", False, lambda _, v: jax.lax.rsqrt(v), (row,))
    yield Case("inverse square root", f"Chebyshev, depth {AFTER_ATTENTION.depth} (after attention)", True,
               lambda _, v: AFTER_ATTENTION.inverse_root(v), (row,))  # fmt: skip
    yield Case("inverse square root", f"Chebyshev, depth {AFTER_FEED_FORWARD.depth} (after feed-forward)", True,
               lambda _, v: AFTER_FEED_FORWARD.inverse_root(v), (row,))  # fmt: skip
    yield Case("GeLU", "erfc, as JAX has it", False, lambda _, x: jax.nn.gelu(x, approximate=False), (hidden,))
    yield Case("GeLU", "erf", True, lambda _, x: ACTIVATIONS["gelu"](x), (hidden,))
    row_sums = (1, heads, tokens, 1)
    yield Case("division by a row's sum", "of each number", False, lambda _, c, s: c / s, (values, values))
    yield Case("division by a row's sum", "one reciprocal", True, lambda _, c, s: c * (1.0 / s), (values, row_sums))
    yield Case("0.7 < x < 1.2", "difference of floats", False,
               lambda _, x: ((x > 0.7).astype(jnp.float32) - (x > 1.2).astype(jnp.float32)) * x, (hidden,))  # fmt: skip
    yield Case("0.7 < x < 1.2", "bits, one by one", False, lambda _, x: ((x > 0.7) ^ (x > 1.2)) * x, (hidden,))
    yield Case("0.7 < x < 1.2", "bits, compared together", True,
               lambda _, x: jnp.logical_xor(*(jnp.stack([x, x]) > jnp.array([0.7, 1.2])[:, None, None])) * x,
               (hidden,))  # fmt: skip
    yield Case("doubling", "a product with 2", False, lambda _, v: 2.0 * v, (hidden,))
    yield Case("doubling", "a sum", True, lambda _, v: v + v, (hidden,))


def jobs(quick: bool) -> Iterator[tuple[str, Callable[[], Record]]]:
    size = (2, 4, 4) if quick else (12, 64, 128)
    rng = np.random.default_rng(0)
    parties = {protocol: model_parties(protocol) for protocol in ("ABY3", "SEMI2K")}

    def measure(case: Case) -> Record:
        inputs = tuple(rng.uniform(0.5, 1.5, shape) for shape in case.shapes)
        cost = Workload(case.function, None, inputs).run(parties[case.protocol]).cost
        return record(cost, step=case.step, variant=case.variant, kept=case.kept)

    for case in cases(*size):
        yield f"{case.protocol}, {case.step}: {case.variant}", partial(measure, case)


def benchmark(quick: bool) -> Benchmark:
    columns = ("protocol", "step", "variant", "kept", "bytes_sent_total", "rounds", "seconds")
    return Benchmark("steps", partial(jobs, quick), (columns,))


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    benchmark(chosen.quick).run(chosen)
