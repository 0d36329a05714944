"""Real parties over mutual TLS: many clients at once, and limited networks beside their model.

    python benchmarks/deployment.py [--json] [--show] [--quick] [--attack]

First 200 requests of 8 clients to the zoo's default model, all on this machine: throughput, latency (the wait for the
others' requests included, p50 to p99 in seconds), memory of each party after a quarter of the requests and at the end,
bytes from a client.
Then the same model and one BERT-Base layer of 128 tokens, a party in each network namespace (Linux, root, iproute2;
else left out): measured seconds of a run beside those of the model, which starts from the cost in process.
It says how long it still takes; --quick is 8 requests of 2 clients, one network, a tiny layer.
With --attack something else: a hostile client beside two others, see attacks.py.
"""

import contextlib
import dataclasses
import functools
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import attacks
import harness
import jax
import jax.numpy as jnp
import namespaces
import numpy as np
import tyro
from layer_cost import block, lazily
from parties import MOST_DIFFERENCE, Running, Workload, sentences
from rich.console import Console

from flaxmpc import secure
from flaxmpc.models import zoo
from flaxmpc.models.bert import preset

NETWORKS = {"3gbit": secure.Network("3 Gbit/s", 3e9, 0.0), "100mbit": secure.Network("100 Mbit/s", 100e6, 0.0)}
_MORE_BYTES = 64 << 10  # that a warm request may take, beside the shares of its inputs

console = Console(stderr=True, highlight=False)


@dataclasses.dataclass(frozen=True)
class Options(harness.Options):
    """What is measured.

    Attributes:
        model: a name of the zoo or a model folder.
        requests: of all clients together, one sentence each.
        clients: at once.
        attack: in place of that, a hostile client beside two others.
    """

    model: str = zoo.DEFAULT
    requests: int = 200
    clients: int = 8
    attack: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def layer(size: str, tokens: int) -> Workload:
    """One folded 2quad_freediv + quad layer with random weights."""
    config = preset(size, num_hidden_layers=1, vocab_size=100, attention="2quad_freediv", hidden_act="quad")
    hidden = np.random.default_rng(0).normal(size=(1, tokens, config.hidden_size)).astype(np.float32)
    inputs = (hidden, jax.device_get(config.mask(jnp.ones(hidden.shape[:2]))))
    params: Any = jax.jit(block(config).init)(jax.random.key(0), *inputs)["params"]  # pyright: ignore[reportIndexIssue]
    function, weights = secure.hoist(lazily(config, secure.Config()), params, *inputs, dtype="float64")

    expected, cost = secure.jit(function).run(weights, *inputs)
    program = f"1x{tokens}"

    def put(parties: secure.Cluster) -> None:
        resident = parties.put(weights)
        parties.publish("layer", resident, {program: parties.program(function, resident, *inputs, length=tokens)}, b"")

    def connect(parties: secure.Cluster) -> Callable[[int], tuple[secure.Cost, float]]:
        name, model = parties.find("layer")

        def ask(_: int) -> tuple[secure.Cost, float]:
            (output,), cost = parties.infer(name, model, program, inputs)
            return cost, float(np.abs(output - expected).max())

        return ask

    return Workload(f"{size} layer", cost, put, connect, sum(leaf.size for leaf in jax.tree.leaves(inputs)))


def measure(workload: Workload, rate: str | None, requests: int, clients: int, together: int) -> harness.Record:
    """One record; the first request of every client is not counted."""
    with Running(rate, together) as running:
        with secure.Cluster(running.cluster, "owner") as owner:
            workload.put(owner)
        latencies: list[float] = []
        costs: list[secure.Cost] = []
        differences: list[float] = []
        client_bytes: list[int] = []
        memory: list[list[int]] = []
        errors: list[BaseException] = []
        warm = threading.Barrier(clients + 1)
        done = threading.Lock()
        start = 0.0

        def work(number: int) -> None:
            try:
                with secure.Cluster(running.cluster, "client") as parties:
                    ask = workload.connect(parties)
                    ask(number)
                    warm.wait()
                    for i in range(number, requests, clients):
                        before, begin = parties.bytes_sent, time.perf_counter()
                        cost, difference = ask(i)
                        seconds = time.perf_counter() - begin
                        with done:
                            latencies.append(seconds)
                            costs.append(cost)
                            differences.append(difference)
                            client_bytes.append(parties.bytes_sent - before)
                            count = len(latencies)
                            if count == max(1, requests // 4):
                                memory.append(running.memory_mb())
                            if count % max(1, requests // 20) == 0:
                                left = (time.perf_counter() - start) / count * (requests - count)
                                console.print(f"  {count} of {requests} requests, {left:.0f} s left")
            except BaseException as error:
                errors.append(error)
                warm.abort()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        with contextlib.suppress(threading.BrokenBarrierError):
            warm.wait()
        start, runs = time.perf_counter(), len(running.runs())
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - start
        if errors:
            raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
        if max(differences) > MOST_DIFFERENCE:
            raise SystemExit(f"{workload.name}: an answer is {max(differences):.3f} from that in process")
        cuts = statistics.quantiles(latencies, n=100, method="inclusive")
        network = NETWORKS[rate] if rate is not None else None
        return harness.record(
            workload.cost,
            workload=workload.name,
            network=network.name if network else "loopback",
            clients=clients,
            requests=requests,
            runs=len(running.runs()) - runs,
            per_second=requests / seconds,
            p50=cuts[49],
            p95=cuts[94],
            p99=cuts[98],
            # Three parties, each two of three parts of 64 bits.
            share_bytes=workload.numbers * 3 * 2 * 8,
            client_bytes=max(client_bytes),
            party_memory_mb_quarter=memory[0],
            party_memory_mb_end=running.memory_mb(),
            max_difference=max(differences),
            measured_seconds=statistics.median(cost.seconds for cost in costs) if network else None,
            modelled_seconds=network.seconds(workload.cost) if network else None,
        )


def jobs(options: Options) -> Iterator[tuple[str, Callable[[], harness.Record]]]:
    requests, clients = (8, 2) if options.quick else (options.requests, options.clients)
    demo = functools.cache(lambda: sentences(options.model))
    base = functools.cache(lambda: layer("tiny", 16) if options.quick else layer("base", 128))
    yield f"{requests} requests of {clients} clients", lambda: measure(demo(), None, requests, clients, 8)
    if reason := namespaces.unavailable():
        console.print(f"left out, the runs over limited networks: {reason}")
        return
    for rate in ("100mbit",) if options.quick else NETWORKS:
        for name, workload in (("a sentence", demo), ("a layer", base)):
            yield (
                f"{name} over {NETWORKS[rate].name}",
                lambda workload=workload, rate=rate: measure(workload(), rate, 3, 1, 1),
            )


def notes(records: Sequence[harness.Record]) -> list[str]:
    lines = []
    for row in records:
        title = f"{row['workload']}, {row['network']}"
        lines.append(
            harness.held(
                f"{title}: kB of a warm request beside its shares",
                (row["client_bytes"] - row["share_bytes"]) / 1024,
                most=_MORE_BYTES / 1024,
            )
        )
        if row["network"] == "loopback":
            grown = max(np.divide(row["party_memory_mb_end"], row["party_memory_mb_quarter"]))
            lines.append(harness.held(f"{title}: memory of a party, end / first quarter", float(grown), most=1.1))
            lines.append(harness.held(f"{title}: logits beside those in process", row["max_difference"], most=0.01))
        else:
            lines.append(f"{title}: measured / modelled {row['measured_seconds'] / row['modelled_seconds']:.2f}")
    return lines


def benchmark(options: Options) -> harness.Benchmark:
    asked = (
        "workload",
        "network",
        "requests",
        "runs",
        "per_second",
        "p50",
        "p95",
        "p99",
    )
    sizes = ("workload", "network", "client_bytes", "share_bytes", "party_memory_mb_quarter", "party_memory_mb_end")
    beside = ("workload", "network", "bytes_sent_total", "rounds", "seconds", "measured_seconds", "modelled_seconds")
    return harness.Benchmark("deployment", lambda: jobs(options), (asked, sizes, beside), notes=notes)


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the parties end with it
    with contextlib.ExitStack() as stack:
        made = attacks.benchmark(chosen.model, chosen.quick, stack) if chosen.attack else benchmark(chosen)
        made.run(chosen)
