"""A request of each family at base size, 128 tokens, on ABY3: 2quad_freediv + quad, folded, the head included.

    python benchmarks/families.py [--json] [--show] [--quick]

MPNet is RoBERTa with a bias of relative positions, which all layers share: the difference is what the bias costs.
Kin cost the same: XLM-RoBERTa and CamemBERT what RoBERTa does. Weights are random: the cost does not depend on them.
About 4 minutes on 2 idle cores.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import tyro
from harness import Benchmark, Options, Record, in_child, model_parties, record
from variants import CHEBYSHEV_PARTS, ours

from flaxmpc.models import folder  # noqa: F401  it registers the families
from flaxmpc.models.base import families, family_of

BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
QUICK = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50}


def measure(model_type: str, tokens: int, **fields: Any) -> Record:
    config_class = family_of(model_type).config
    layers = fields.get("num_hidden_layers", config_class.num_hidden_layers)
    config = config_class(
        attention="2quad_freediv", hidden_act="quad", layer_norm=[CHEBYSHEV_PARTS] * layers,
        max_position_embeddings=514, **fields,
    )  # fmt: skip
    cost = ours(config, folded=True, batch=1, tokens=tokens).run(model_parties("ABY3")).cost
    return record(cost, variant=model_type, num_tokens=tokens, num_layers=layers)


def jobs(quick: bool) -> Iterator[tuple[str, Callable[[], Record]]]:
    own = {family.prefix: family.config.model_type for family in reversed([*families()])}
    for model_type in sorted(own.values()):
        job = partial(measure, model_type, 8 if quick else 128, **(QUICK if quick else BASE))
        yield model_type, job if quick else partial(in_child, job)


def benchmark(quick: bool) -> Benchmark:
    columns = ("variant", "num_layers", "bytes_sent_total", "rounds", "seconds", "lan_seconds", "wan_seconds",
               "peak_memory_bytes")  # fmt: skip
    return Benchmark("families", partial(jobs, quick), (columns,))


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    benchmark(chosen.quick).run(chosen)
