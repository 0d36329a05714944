"""A cluster of real processes on this machine: latency, throughput, memory and bytes of many clients at once.

    python benchmarks/deployment.py            # the zoo's default model; --model FOLDER for another
    python benchmarks/deployment.py --quick    # 8 requests of 2 clients
    python benchmarks/deployment.py --network 100mbit --requests 8 --clients 1    # root: network namespaces

Latencies p50, p95 and p99 are seconds of a request, its wait for the others' included; memory is of all processes of
the parties together, after a quarter of the requests and after all.
"""

import contextlib
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import tyro

from flaxmpc import secure, serving
from flaxmpc.inference import SecureClassifier
from flaxmpc.models import folder as folders
from flaxmpc.models import zoo
from flaxmpc.secure.cluster import ClusterFile, write_local

SENTENCES = ("A gripping, beautifully acted film.", "A tedious, lifeless mess.", "Good, but not very good.")
COLUMNS = (
    "network",
    "clients",
    "requests",
    "per_second",
    "p50",
    "p95",
    "p99",
    "request_bytes",
    "memory_mb_quarter",
    "memory_mb",
)


@dataclasses.dataclass(frozen=True)
class Options(harness.Options):
    """What is measured.

    Attributes:
        model: a name of the zoo or a model folder.
        protocol: ABY3, CHEETAH or SEMI2K.
        requests: of all clients together, one sentence each.
        clients: at once.
        network: loopback, or the rate of every party's own network namespace: 3gbit, 100mbit (needs root and iproute2).
    """

    model: str = zoo.DEFAULT
    protocol: str = "ABY3"
    requests: int = 200
    clients: int = 8
    network: str = "loopback"


@contextlib.contextmanager
def network(cluster: ClusterFile, rate: str) -> Iterator[tuple[ClusterFile, list[list[str]]]]:
    """The cluster with the parties' addresses in their own namespaces, and a command prefix for each.

    The namespaces hang on one bridge, each sending at `rate`. Loopback needs none.
    """
    ranks = range(len(cluster.party))
    if rate == "loopback":
        yield cluster, [[] for _ in ranks]
        return
    text = cluster.path.read_text()
    for entry in cluster.party:
        for address in (entry.control, entry.link):
            text = text.replace(address, f"10.77.0.{entry.rank + 1}:{address.rpartition(':')[2]}")
    cluster.path.write_text(text)
    bridge = [
        "link add flaxmpc type bridge",
        "addr add 10.77.0.254/24 dev flaxmpc",
        "link set flaxmpc up",
    ]
    hosts = [
        f"netns add flaxmpc{r}|link add flaxmpc{r} type veth peer name eth0 netns flaxmpc{r}|"
        f"link set flaxmpc{r} master flaxmpc up|-n flaxmpc{r} addr add 10.77.0.{r + 1}/24 dev eth0|"
        f"-n flaxmpc{r} link set eth0 up|-n flaxmpc{r} link set lo up"
        for r in ranks
    ]
    limit = f"tc qdisc add dev eth0 root tbf rate {rate} burst 64kb latency 300ms"
    try:
        for line in [*bridge, *(line for host in hosts for line in host.split("|"))]:
            subprocess.run(["ip", *line.split()], check=True)
        for r in ranks:
            subprocess.run(["ip", "netns", "exec", f"flaxmpc{r}", *limit.split()], check=True)
        yield ClusterFile.read(cluster.path), [["ip", "netns", "exec", f"flaxmpc{r}"] for r in ranks]
    finally:
        for r in ranks:
            subprocess.run(["ip", "netns", "del", f"flaxmpc{r}"], check=False)
        subprocess.run(["ip", "link", "del", "flaxmpc"], check=False)


def memory_mb(root: int) -> float:
    """Resident memory of a process and its descendants: here the supervisors' and workers'."""
    children: dict[int, list[int]] = {}
    resident: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
            resident[int(entry.name)] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    total, left = 0, [root]
    while left:
        pid = left.pop()
        total += resident.get(pid, 0)
        left += children.get(pid, [])
    return total / 1e6


def measure(options: Options) -> harness.Record:
    requests, clients = (8, 2) if options.quick else (options.requests, options.clients)
    loaded = folders.load(zoo.find(options.model))
    local = SecureClassifier(loaded, secure.InProcess(options.protocol))
    expected = {text: np.array(local.classify([text]).predictions[0].logits) for text in SENTENCES}
    with tempfile.TemporaryDirectory() as directory:
        local_cluster = write_local(Path(directory) / "cluster", options.protocol, allow_insecure_dealer=True)
        with network(local_cluster, options.network) as (cluster, prefixes):
            command = [sys.executable, "-m", "flaxmpc.cli", "party", "--cluster", str(cluster.path), "--rank"]
            processes = [
                subprocess.Popen([*prefix, *command, str(rank)], stderr=subprocess.DEVNULL)
                for rank, prefix in enumerate(prefixes)
            ]
            pids = [process.pid for process in processes]
            try:
                return _ask(options, cluster, loaded, pids, expected, requests, clients)
            finally:
                for process in processes:
                    process.terminate()
                for process in processes:
                    process.wait(120)


def _ask(
    options: Options, cluster: ClusterFile, loaded: folders.LoadedModel, pids: list[int], expected: Any, requests: int,
    clients: int,
) -> harness.Record:  # fmt: skip
    with secure.Cluster(cluster, "owner") as owner:
        serving.put(loaded, owner, lengths=(16,))
    seconds: list[float] = []
    differences: list[float] = []
    request_bytes: list[int] = []
    cost: list[secure.Cost] = []
    memory: list[float] = []
    errors: list[Exception] = []

    def work(number: int) -> None:
        try:
            with secure.Cluster(cluster, "client") as parties:
                classifier = serving.RemoteClassifier(parties)
                for i in range(number, requests, clients):
                    text = SENTENCES[i % len(SENTENCES)]
                    before, begin = parties.bytes_sent, time.perf_counter()
                    (prediction,) = classifier.classify([text])
                    seconds.append(time.perf_counter() - begin)
                    request_bytes.append(parties.bytes_sent - before)
                    differences.append(float(np.abs(prediction.logits - expected[text]).max()))
                    cost.append(prediction.cost)
                    if len(seconds) == requests // 4:
                        memory.append(sum(map(memory_mb, pids)))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = time.perf_counter() - begin
    if errors:
        raise errors[0]
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    names = {
        "model": zoo.find(options.model).name, "network": options.network, "clients": clients, "requests": len(seconds),
        "per_second": len(seconds) / total, "p50": cuts[49], "p95": cuts[94],
        "p99": cuts[98], "request_bytes": max(request_bytes), "max_difference": max(differences),
        "memory_mb_quarter": memory[0], "memory_mb": sum(map(memory_mb, pids)),
    }  # fmt: skip
    return harness.record(cost[-1], **names)


def jobs(options: Options) -> Iterable[tuple[str, Callable[[], harness.Record]]]:
    yield f"{options.requests} requests of {options.clients} clients", lambda: measure(options)


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    name = "deployment" if chosen.network == "loopback" else f"deployment_{chosen.network}"
    harness.Benchmark(name, lambda: jobs(chosen), (COLUMNS,)).run(chosen)
