"""How many 64-bit integers a core multiplies a second: SPU's matrix product, and 40 lines of AVX-512.

    python benchmarks/kernel.py [--json] [--show] [--quick]

The product is that of BERT-Base's first dense layer, 128 x 768 by 768 x 3072, modulo 2^64, on one core. SPU's is its
local product (REF2K, one party), as its own profile times it; beside it are numpy's of the same integers, and BLAS's of
float64. `kernel.c` is compiled with `cc`, and left out where there is no compiler, or no AVX-512. Medians of five. A
minute. docs/upstream/spu-ring-matmul.md says what follows from it.
"""

import ctypes
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from harness import Benchmark, Options, Record, in_child, record

from flaxmpc import secure

REPETITIONS = 5
SOURCE = Path(__file__).with_suffix(".c")
_Size = tuple[int, int, int]


def operands(size: _Size, dtype: Any = np.int64) -> list[np.ndarray]:
    """Numbers of the whole ring, (m, k) and (k, n)."""
    m, k, n = size
    rng = np.random.default_rng(0)
    return [rng.integers(-(2**63), 2**63 - 1, shape).astype(dtype) for shape in ((m, k), (k, n))]


def seconds_of(product: Callable[..., Any], *args: Any) -> list[float]:
    """Of some calls after a first one."""
    seconds = []
    for _ in range(REPETITIONS + 1):
        start = time.perf_counter()
        product(*args)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def of_spu(size: _Size) -> tuple[secure.Cost, list[float]]:
    """A run's cost, and the seconds of its product alone."""
    jax.config.update("jax_enable_x64", True)
    run = secure.jit(lambda a, b: a @ b, parties=secure.InProcess("REF2K")).run
    costs = [run(*operands(size)).cost for _ in range(REPETITIONS + 1)][1:]
    return costs[0], [cost.per_op["pphlo.dot"].seconds for cost in costs]


def of_kernel(size: _Size) -> list[float]:
    """`kernel.c`'s, whose result is compared with numpy's."""
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "kernel.so")
        subprocess.run(["cc", "-O3", "-march=native", "-shared", "-fPIC", str(SOURCE), "-o", library], check=True)
        run = ctypes.CDLL(library).ring_matmul
    a, b = operands(size)
    out = np.empty((a.shape[0], b.shape[1]), np.int64)
    args = *(array.ctypes.data_as(ctypes.c_void_p) for array in (a, b, out)), *map(ctypes.c_long, size)
    seconds = seconds_of(run, *args)
    if not np.array_equal(out, a @ b):
        raise AssertionError("kernel.c computes another product")
    return seconds


def of_numpy(size: _Size, dtype: str) -> list[float]:
    return seconds_of(np.matmul, *operands(size, dtype))


def on_one_core(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a fresh process that has one core, where there is a way to say so (Linux)."""
    if not hasattr(os, "sched_setaffinity"):
        return in_child(function, *args)
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(own)})  # a child takes it over
    try:
        return in_child(function, *args)
    finally:
        os.sched_setaffinity(0, own)


def why_no_kernel() -> str | None:
    """What `kernel.c` lacks here."""
    processor = Path("/proc/cpuinfo")
    if shutil.which("cc") is None:
        return "no C compiler"
    return None if processor.is_file() and "avx512dq" in processor.read_text() else "a processor without AVX-512"


def jobs(quick: bool) -> Iterator[tuple[str, Callable[[], Record]]]:
    size = (7, 20, 64) if quick else (128, 768, 3072)
    cost, in_spu = on_one_core(of_spu, size)

    def made(system: str, seconds: list[float]) -> Record:
        rate = float(np.prod(size)) / statistics.median(seconds)
        return record(cost, system=system, size=list(size), multiplications_per_second=rate)

    yield "SPU", lambda: made("SPU, int64", in_spu)
    if (reason := why_no_kernel()) is None:
        yield "AVX-512", lambda: made("AVX-512, int64", on_one_core(of_kernel, size))
    else:
        print(f"kernel.py leaves kernel.c out: {reason}", file=sys.stderr)
    yield "numpy", lambda: made("numpy, int64", on_one_core(of_numpy, size, "int64"))
    yield "BLAS", lambda: made("BLAS, float64", on_one_core(of_numpy, size, "float64"))


def benchmark(quick: bool) -> Benchmark:
    return Benchmark("kernel", partial(jobs, quick), (("system", "multiplications_per_second"),))


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    benchmark(chosen.quick).run(chosen)
