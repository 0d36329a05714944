"""One BERT-Base layer, 128 tokens: unmodified against folded 2quad_freediv + quad, on ABY3 and SEMI2K.

    python benchmarks/layer_cost.py [--json] [--show] [--quick]

Weights are random: the cost does not depend on their values. Under a minute on 2 cores.
"""

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

# The last layer leaves out what another one needs; so it is the first of two.
_LAYERS = 2
VARIANTS = {
    "unmodified": {"attention": "softmax", "hidden_act": "gelu"},
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


def jobs(quick: bool) -> Iterator[tuple[str, Callable[[], Record]]]:
    tokens = 4 if quick else 128
    rng = np.random.default_rng(0)
    for protocol in ("ABY3",) if quick else ("ABY3", "SEMI2K"):
        parties = secure.InProcess(protocol)
        for variant, parts in VARIANTS.items():
            config = preset("tiny" if quick else "base", num_hidden_layers=_LAYERS, vocab_size=100, **parts)
            hidden = rng.normal(size=(1, tokens, config.hidden_size)).astype(np.float32)

            def measure(config=config, hidden=hidden, parties=parties, variant=variant) -> Record:
                params = random_params(param_shapes(BertForSequenceClassification(config)))
                if variant in FOLDED:
                    params, config = fold(params, config)
                keys = jax.device_get(config.keys(jnp.ones(hidden.shape[:2])))
                weights = parties.put(params["bert"]["layer_0"])
                cost = secure.jit(layer_function(config), parties=parties).run(weights, hidden, keys).cost
                return record(cost, variant=variant, num_tokens=hidden.shape[1])

            yield f"{protocol} {variant}", measure


def benchmark(quick: bool) -> Benchmark:
    columns = ("protocol", "variant", "bytes_sent_total", "rounds", "seconds", "lan_seconds", "wan_seconds")
    return Benchmark("layer_cost", lambda: jobs(quick), (columns,))


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    benchmark(chosen.quick).run(chosen)
