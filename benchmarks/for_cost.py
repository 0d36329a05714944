"""BERT-Base, 128 tokens, ABY3, by plans of bits: what each option of `flaxmpc convert` that distils for cost saves.

    python benchmarks/for_cost.py [--json] [--show] [--quick]

2quad_freediv + quad, folded, the head included and linear. The options alone, and together. What they cost in accuracy
is in the zoo: `models/movie-minilm-l6-2quad-freediv/runs/`. Of the 12 layers (or 6) two and three are measured, or four
where two share scores: the difference is what the others cost, but for their plans. So 12 layers differ by 4 % from
those of bert_base.py. Weights are random: the cost does not depend on them. About 18 minutes on 2 idle cores.
"""

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import tyro
from harness import Benchmark, Options, Record, model_parties, record
from variants import AFTER_FEED_FORWARD, CHEBYSHEV_PARTS, fitted, ours

from flaxmpc import secure
from flaxmpc.models.bert import preset
from flaxmpc.nn.normalization import CONSTANT


def options(shape: str) -> dict[str, dict[str, Any]]:
    """The fields of a config that each option changes, by its name."""
    size = preset(shape)
    constant = {"layer_norm": (CONSTANT, AFTER_FEED_FORWARD)}
    heads = {"num_attention_heads": size.num_attention_heads // 2}
    features = {"intermediate_size": size.intermediate_size // 2}
    scores = {"layers_sharing_scores": 2}
    quarter = {"num_attention_heads": size.num_attention_heads // 4, "intermediate_size": size.intermediate_size // 4}
    return {
        "no option": {},
        "no root after attention": constant,
        "half the heads": heads,
        "half the features": features,
        "half the scores": scores,
        "all three": constant | heads | features,
        "all four": constant | heads | features | scores,
        "all three, a quarter": constant | quarter,
    }


@functools.cache
def cost(variant: str, layers: int, shape: str, tokens: int, vocab_size: int, planned: bool) -> secure.Cost:
    """What a request costs a classifier at a preset's shape; `planned`: by its plan."""
    fields = options(shape)[variant]
    layer_norm = [fields.get("layer_norm", CHEBYSHEV_PARTS)] * layers
    parts = {"attention": "2quad_freediv", "hidden_act": "quad", "classifier_activation": "identity"}
    changes = {**fields, **parts, "layer_norm": layer_norm, "num_hidden_layers": layers, "vocab_size": vocab_size}
    made = ours(fitted(preset(shape, **changes), 1, tokens), folded=True, batch=1, tokens=tokens, planned=planned)
    if planned:  # which takes longer than all else
        made = made.planned(made.plan())
    return made.run(model_parties("ABY3", fraction_bits=made.fraction_bits)).cost


def measure(variant: str, layers: int, shape: str, *size: Any) -> Record:
    """Of `layers`, those after the third cost what the third does; where two share scores, every two the next two."""
    step = options(shape)[variant].get("layers_sharing_scores", 1)
    few, more = (record(cost(variant, n, shape, *size), variant=variant, num_layers=layers) for n in (2, 2 + step))
    sums = ("bytes_sent_total", "rounds", "seconds", "lan_seconds", "wan_seconds")
    return more | {name: more[name] + (layers - 2 - step) / step * (more[name] - few[name]) for name in sums}


def jobs(quick: bool) -> Iterator[tuple[str, Callable[[], Record]]]:
    size = ("tiny", 8, 100, False) if quick else ("base", 128, 30522, True)
    for variant in ["all three"] if quick else options(size[0]):
        for layers in (12, 6):
            yield f"{variant}, {layers} layers", partial(measure, variant, layers, *size)


def benchmark(quick: bool) -> Benchmark:
    columns = ("variant", "num_layers", "bytes_sent_total", "rounds", "seconds", "lan_seconds", "wan_seconds")
    return Benchmark("for_cost", partial(jobs, quick), (columns,))


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    benchmark(chosen.quick).run(chosen)
