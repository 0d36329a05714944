"""One BERT-Base layer, 128 tokens: unmodified against folded 2quad_freediv + quad, on ABY3 and SEMI2K.

In SEMI2K the first run with resident weights is cold, and later ones (warm) send less.

    python benchmarks/layer_cost.py [--json] [--show] [--quick]

Weights are random: the cost does not depend on their values. Under a minute on 2 cores.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from harness import Benchmark, Options, Record, model_parties, record
from variants import CHEBYSHEV_PARTS, random_params

from flaxmpc import secure
from flaxmpc.models.bert import BertConfig, preset
from flaxmpc.nn.activation import Activation
from flaxmpc.nn.layers import PostNormBlock
from flaxmpc.nn.lazy import Lazy
from flaxmpc.nn.mask import Mask
from flaxmpc.serve.private import product_for

# As transformers' Flax models have it.
JAX_GELU = Activation("gelu_jax", functools.partial(jax.nn.gelu, approximate=False), "jax.nn")
VARIANTS = {
    "unmodified": {"attention": "softmax", "hidden_act": JAX_GELU},
    "exact": {"attention": "softmax", "hidden_act": "gelu"},
    "2quad_freediv": {"attention": "2quad_freediv", "hidden_act": "quad"},
    "2quad_freediv_folded": {"attention": "2quad_freediv", "hidden_act": "quad"},
    "2quad_freediv_chebyshev": {
        "attention": "2quad_freediv",
        "hidden_act": "quad",
        "layer_norm": [CHEBYSHEV_PARTS],
    },
}
# Run on a lazy state.
FOLDED = ("2quad_freediv_folded", "2quad_freediv_chebyshev")


def block(config: BertConfig) -> PostNormBlock:
    """The first layer of a model."""
    return PostNormBlock(
        config.attention_of(0),
        config.hidden_act_of(0),
        config.layer_norms_of(0),
        config.num_attention_heads,
        config.intermediate_size,
    )


def as_written(config: BertConfig) -> Callable[..., jax.Array]:
    """A layer as a function of (params, hidden (batch, token, hidden), mask)."""
    return lambda params, hidden, mask: block(config).apply({"params": params}, hidden, mask)[0]  # pyright: ignore[reportIndexIssue, reportReturnType]


def lazily(config: BertConfig, protocol: secure.Config) -> Callable[..., jax.Array]:
    """The same on a lazy state, to the array that the state after it holds."""
    product = product_for(protocol)

    def layer(params: Any, hidden: jax.Array, mask: Mask) -> jax.Array:
        before = Lazy.held(hidden, mask.unit, product)
        after: Any = block(config).apply({"params": params}, before, mask, into=before.unit)
        return after[0].arrays[0]

    return layer


@dataclasses.dataclass
class Layer:
    """A layer whose weights reside with parties."""

    parties: secure.Parties
    variant: str
    quick: bool

    def __post_init__(self):
        size = "tiny" if self.quick else "base"
        config = preset(size, num_hidden_layers=1, vocab_size=100, **VARIANTS[self.variant])
        tokens = 4 if self.quick else 128
        hidden = np.random.default_rng(0).normal(size=(1, tokens, config.hidden_size)).astype(np.float32)
        mask = jax.device_get(config.mask(jnp.ones(hidden.shape[:2])))
        shapes = jax.eval_shape(block(config).init, jax.random.key(0), hidden, mask)["params"]  # pyright: ignore[reportIndexIssue]
        weights = random_params(shapes)
        function, self.inputs = as_written(config), (hidden, mask)
        if self.variant in FOLDED:
            function, weights = secure.hoist(
                lazily(config, self.parties.config), weights, *self.inputs, dtype="float64"
            )
        self.weights = self.parties.put(weights)
        self.run = secure.jit(function, parties=self.parties).run
        self.opened = False

    def measure(self, warm: bool) -> Record:
        if warm and not self.opened:  # an interrupted benchmark goes on here
            self.run(self.weights, *self.inputs)
        cost = self.run(self.weights, *self.inputs).cost
        self.opened = True
        return record(cost, variant=self.variant, num_tokens=self.inputs[0].shape[1], warm=warm)


def jobs(quick: bool) -> Iterator[tuple[str, Callable[[], Record]]]:
    for protocol in ("ABY3",) if quick else ("ABY3", "SEMI2K"):
        parties = model_parties(protocol)
        for variant in VARIANTS:
            layer = functools.cache(lambda parties=parties, variant=variant: Layer(parties, variant, quick))
            yield f"{protocol} {variant}", lambda layer=layer: layer().measure(warm=False)
            if parties.config.opens_once:
                yield f"{protocol} {variant} warm", lambda layer=layer: layer().measure(warm=True)


def benchmark(quick: bool) -> Benchmark:
    columns = ("protocol", "variant", "warm", "bytes_sent_total", "rounds", "seconds", "lan_seconds", "wan_seconds")
    return Benchmark("layer_cost", lambda: jobs(quick), (columns,))


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    benchmark(chosen.quick).run(chosen)
