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
from harness import Benchmark, Options, Record, record
from variants import NEWTON_PARTS, random_params

from flaxmpc import secure
from flaxmpc.convert.fold import fold
from flaxmpc.models.bert import BertForSequenceClassification, BertLayer, param_shapes
from flaxmpc.models.config import BertConfig, preset
from flaxmpc.models.folded import FoldedLayer
from flaxmpc.nn.activation import Activation

# As transformers' Flax models have it.
JAX_GELU = Activation("gelu_jax", functools.partial(jax.nn.gelu, approximate=False), "jax.nn", needs_distillation=False)
# The last layer leaves out what another one needs; so it is the first of two.
_LAYERS = 2
VARIANTS = {
    "unmodified": {"attention": "softmax", "hidden_act": JAX_GELU},
    "exact": {"attention": "softmax", "hidden_act": "gelu"},
    "2quad_freediv": {"attention": "2quad_freediv", "hidden_act": "quad"},
    "2quad_freediv_folded": {"attention": "2quad_freediv", "hidden_act": "quad"},
    "2quad_freediv_newton": {
        "attention": "2quad_freediv",
        "hidden_act": "quad",
        "layer_norm": [NEWTON_PARTS] * _LAYERS,
    },
}
# Run as `fold` returns them.
FOLDED = ("2quad_freediv_folded", "2quad_freediv_newton")


def layer_function(config: BertConfig) -> Callable[..., jax.Array]:
    """One layer as a function of (params, hidden (batch, token, hidden), keys)."""
    if config.folded:
        layer: Any = FoldedLayer(config, 0)
        return lambda params, u, keys: layer.apply({"params": params}, u, keys)
    layer: Any = BertLayer(config, 0)
    return lambda params, hidden, keys: layer.apply({"params": params}, hidden, keys, deterministic=True)[0]


@dataclasses.dataclass
class Layer:
    """A layer whose weights reside with parties."""

    parties: secure.Parties
    variant: str
    quick: bool

    def __post_init__(self):
        size = "tiny" if self.quick else "base"
        config = preset(size, num_hidden_layers=_LAYERS, vocab_size=100, **VARIANTS[self.variant])
        params = random_params(param_shapes(BertForSequenceClassification(config)))
        if self.variant in FOLDED:
            params, config = fold(params, config)
            config = dataclasses.replace(config, grouped_heads=self.parties.config.grouped_products)
        tokens = 4 if self.quick else 128
        hidden = np.random.default_rng(0).normal(size=(1, tokens, config.hidden_size)).astype(np.float32)
        self.inputs = hidden, jax.device_get(config.keys(jnp.ones(hidden.shape[:2])))
        self.weights = self.parties.put(params["bert"]["layer_0"])
        self.run = secure.jit(layer_function(config), parties=self.parties).run
        self.opened = False

    def measure(self, warm: bool) -> Record:
        if warm and not self.opened:  # an interrupted benchmark goes on here
            self.run(self.weights, *self.inputs)
        cost = self.run(self.weights, *self.inputs).cost
        self.opened = True
        return record(cost, variant=self.variant, num_tokens=self.inputs[0].shape[1], warm=warm)


def jobs(quick: bool) -> Iterator[tuple[str, Callable[[], Record]]]:
    for protocol in ("ABY3",) if quick else ("ABY3", "SEMI2K"):
        parties = secure.InProcess(protocol)
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
