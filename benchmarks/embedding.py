"""BERT-Base's embedding, 30522 tokens x 768, in each mode, alone and end to end with the 12 layers, on ABY3.

    python benchmarks/embedding.py [--json] [--show] [--quick]

public: the client embeds with the published table, and shares the result. secret: it shares one-hot rows, and the
parties multiply them with the secret table. gather: it shares ids, and the parties index the secret table, which SPU
makes a loop of; no part of this package does so. client_bytes is what the client uploads, all parties' shares
together. About 4 minutes on 2 idle cores.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
import tyro
from harness import Benchmark, Options, Record, in_child, model_parties, record
from variants import VARIANTS, ours

from flaxmpc.nn.embedding import EMBEDDINGS, Embedding

_public = EMBEDDINGS["public"]
MODES = {
    "public": _public,
    "secret": EMBEDDINGS["secret"],
    "gather": Embedding("gather", _public.encode, _public.lookup, client_embeds=False),
}


def measure(mode: str, layers: int, shape: str, tokens: int, vocab_size: int) -> Record:
    """Without layers it is the embedding alone, its LayerNorm and the first token's pooler and head."""
    variant = VARIANTS["2quad_freediv"]
    config = variant.config(shape, layers, embedding=MODES[mode], vocab_size=vocab_size)
    work = ours(config, folded=variant.folded and layers > 0, batch=1, tokens=tokens)
    parties = model_parties("ABY3")
    found = record(work.run(parties).cost, variant=mode, num_tokens=tokens, num_layers=layers)
    # ABY3: each of three parties gets two of the three summands of a number, 8 bytes each.
    found["client_bytes"] = 48 * sum(np.size(leaf) for leaf in jax.tree.leaves(work.inputs))
    return found


def jobs(quick: bool) -> Iterator[tuple[str, Callable[[], Record]]]:
    size: tuple[Any, ...] = ("tiny", 4, 50) if quick else ("base", 128, 30522)
    for layers in (0,) if quick else (0, 12):
        for mode in MODES:
            job = partial(measure, mode, layers, *size)
            yield f"{mode}, {layers} layers", job if quick else partial(in_child, job)


def benchmark(quick: bool) -> Benchmark:
    columns = ("variant", "num_layers", "client_bytes", "bytes_sent_total", "rounds", "seconds", "lan_seconds",
               "wan_seconds", "peak_memory_bytes")  # fmt: skip
    return Benchmark("embedding", partial(jobs, quick), (columns,))


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    benchmark(chosen.quick).run(chosen)
