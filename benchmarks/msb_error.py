"""How often SPU's cheap truncation is wrong: `trunc_allow_msb_error`, in SEMI2K. flaxmpc leaves it off.

    python benchmarks/msb_error.py [--json] [--show] [--quick]

With it each party truncates its own share. That takes fewer bytes and rounds, and is wrong by 2^(64 - 2 x 18) = 2^28
where the shares' sum wraps: once in 2^28 / |x| products, x the result. Many products of a size are computed, and those
are counted whose result is off by more than one. `expected` is elements x size / 2^28. Two minutes.

What it means for a model: a request to BERT-Base, 128 tokens, truncates some 23 million numbers. If they are 1 in the
mean, one request in twelve meets such an error, and its answer is of noise. CrypTen truncates so, too.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import tyro
from harness import Benchmark, Options, Record, record

from flaxmpc import secure

SIZES = (64.0, 512.0, 4096.0)
WRONG = 1.0


def lenient(config: secure.Config) -> Any:
    """SPU's settings for this config, with the cheap truncation."""
    made = _STRICT(config)
    made.trunc_allow_msb_error = True
    return made


_STRICT = secure.Config.runtime_config


def measure(cheap: bool, size: float, elements: int, repetitions: int) -> Record:
    """Products with 1 of numbers around `size`."""
    with mock.patch.object(secure.Config, "runtime_config", lenient if cheap else _STRICT):
        parties = secure.InProcess("SEMI2K")
        run = secure.jit(lambda x, y: x * y, parties=parties).run
        x = np.random.default_rng(0).uniform(0.5, 1.5, elements).astype(np.float32) * size
        runs = [run(x, np.ones_like(x)) for _ in range(repetitions)]
    wrong = sum(int((np.abs(np.asarray(one.output) - x) > WRONG).sum()) for one in runs)
    count = elements * repetitions
    return record(
        runs[0].cost,
        trunc_allow_msb_error=cheap,
        size=size,
        elements=count,
        wrong=wrong,
        expected=count * size / 2.0**28 if cheap else 0.0,
    )


def jobs(quick: bool) -> Iterator[tuple[str, Callable[[], Record]]]:
    elements, repetitions = (2**10, 1) if quick else (2**20, 8)
    for cheap in (False, True):
        for size in SIZES:
            yield f"{cheap}, {size:g}", partial(measure, cheap, size, elements, repetitions)


def benchmark(quick: bool) -> Benchmark:
    columns = ("trunc_allow_msb_error", "size", "elements", "wrong", "expected", "bytes_sent_total", "rounds")
    return Benchmark("msb_error", partial(jobs, quick), (columns,))


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    benchmark(chosen.quick).run(chosen)
