"""The model of a network against runs over it: modelled seconds beside those of real parties, each in a namespace.

    python benchmarks/network.py [--json] [--show] [--quick]

A layer of our BERT-Base with its head, 128 tokens, on ABY3 and SEMI2K. The parties are processes that talk over SPU's
brpc, each on a host of its own, see namespaces.py: Linux, root, iproute2. In process (what the model starts from) and
over the network alternate, medians of three. About 4 minutes on 2 idle cores.
"""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import namespaces
import tyro
from harness import Benchmark, Options, Record, held, medians, model_parties, record
from style import figure, titled
from variants import Workload, workload

from flaxmpc import secure
from flaxmpc.secure._spu import load_spu, recorded_log
from flaxmpc.secure.cost import Profile
from flaxmpc.secure.deploy.messages import Share
from flaxmpc.secure.party import Party
from flaxmpc.secure.protocol import Config

NETWORKS = (secure.LAN, secure.Network("100 Mbit/s", 100e6, 0.0), secure.WAN)
TOLERANCE = 0.25
REPETITIONS = 3


class HostParties(secure.Parties):
    """One party on each host; use as a context."""

    def __init__(self, hosts: namespaces.Hosts, config: Config):
        super().__init__(config)
        self._session = secrets.token_hex(16)
        self._hosts = hosts

    def __enter__(self) -> "HostParties":
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory())  # SEMI2K leaves files where it runs
            paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).parent)]
            self._pipes: list[Connection] = []
            for host in range(self.config.world_size):
                ours, theirs = socket.socketpair()
                with theirs:
                    process = self._hosts.popen(
                        host,
                        [sys.executable, "-c", f"import network; network.serve({theirs.fileno()})"],
                        pass_fds=[theirs.fileno()],
                        cwd=directory,
                        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                    )
                stack.callback(_end, process)
                self._pipes.append(stack.enter_context(Connection(ours.detach())))
            addresses = [f"{address}:9000" for address in self._hosts.addresses]
            self._all([("join", self.config, self._session, addresses, rank) for rank in range(len(self._pipes))])
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _all(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Sends each party its command, and returns their answers."""
        for pipe, command in zip(self._pipes, commands, strict=True):
            pipe.send(command)
        return [pipe.recv() for pipe in self._pipes]

    def store(self, name: str, shares: Sequence[Any]) -> None:
        self._all([("store", name, Share.pack(share)) for share in shares])

    def fetch(self, name: str) -> list[Any]:
        return [share.unpack() for share in self._all([("fetch", name)] * len(self._pipes))]

    def delete(self, names: Sequence[str]) -> None:
        """Nothing: the parties end with this measurement."""

    def run(self, executable: Any) -> tuple[float, Profile]:
        parts = (list(executable.input_names), list(executable.output_names), executable.code)
        answers = self._all([("run", *parts)] * len(self._pipes))
        return max(seconds for seconds, _ in answers), Profile(tuple(total for _, total in answers), {})


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


def serve(fd: int) -> None:
    """A party's process: answers the commands of `HostParties` until it is gone."""
    spu = load_spu()
    pipe = Connection(fd)
    _, config, session, addresses, rank = pipe.recv()
    desc = spu.link.Desc()
    desc.id = session
    desc.recv_timeout_ms = desc.http_timeout_ms = 300_000
    for i, address in enumerate(addresses):
        desc.add_party(f"party{i}", address)
    link = spu.link.create_brpc(desc, rank)
    party = Party(link, config)

    def run(inputs: list[str], outputs: list[str], code: bytes) -> tuple[float, tuple[int, int]]:
        executable = spu.Executable(name="run", input_names=inputs, output_names=outputs, code=code)
        with recorded_log() as log:
            start = time.perf_counter()
            party.run(executable)
            link.barrier()  # sends are asynchronous: after it, what was sent has arrived
            return time.perf_counter() - start, Profile.parse(log.text(), 1).totals[0]

    actions: dict[str, Callable[..., Any]] = {
        "store": lambda name, share: party.store(name, share.unpack()),
        "fetch": lambda name: Share.pack(party.fetch(name)),
        "run": run,
    }
    pipe.send(None)
    with contextlib.suppress(EOFError):
        while True:
            name, *arguments = pipe.recv()
            pipe.send(actions[name](*arguments))


def measure(protocol: str, network: secure.Network, work: Workload) -> Record:
    """A record of the run in process, with `measured_seconds` over the network and how far the model is off."""
    here = model_parties(protocol)
    rate = f"{network.bandwidth_bits_per_second / 1e6:.0f}mbit"
    with (
        namespaces.hosts(here.config.world_size, rate=rate, rtt_seconds=network.rtt_seconds) as hosts,
        HostParties(hosts, here.config) as there,
    ):
        runs = []
        for _ in range(REPETITIONS):
            cost, over_network = work.run(here).cost, work.run(there).cost
            runs.append(record(cost, network=network.name) | {
                "modelled_seconds": network.seconds(cost),
                "measured_seconds": over_network.seconds,
            })  # fmt: skip
    found = medians(runs, ("seconds", "lan_seconds", "wan_seconds", "modelled_seconds", "measured_seconds"))
    found["relative_error"] = found["modelled_seconds"] / found["measured_seconds"] - 1
    return found


def jobs(quick: bool) -> Iterator[tuple[str, Callable[[], Record]]]:
    reason = namespaces.unavailable()
    if reason is not None:
        print(f"network.py is skipped: {reason}", file=sys.stderr)
        return
    work = workload("2quad_freediv", "tiny" if quick else "base", 1, tokens=16 if quick else 128, vocab_size=100)
    for protocol in ("ABY3",) if quick else ("ABY3", "SEMI2K"):
        for network in NETWORKS[-1:] if quick else NETWORKS:
            yield f"{protocol}, {network.name}", partial(measure, protocol, network, work)


def notes(records: list[Record]) -> list[str]:
    return [
        held(f"{r['protocol']}, {r['network']}: the model is off by at most {TOLERANCE:.0%}, in %",
             100 * abs(r["relative_error"]), most=100 * TOLERANCE)
        for r in records
    ]  # fmt: skip


def plot(records: list[Record]) -> Any:
    made, axes = figure(figsize=(8, 3.8))
    labels = [f"{r['protocol']}\n{r['network']}" for r in records]
    for shift, kind in ((-0.2, "modelled"), (0.2, "measured")):
        values = [r[f"{kind}_seconds"] for r in records]
        bars = axes[0][0].bar([i + shift for i in range(len(records))], values, 0.4, label=kind)
        axes[0][0].bar_label(bars, fmt="%.1f")
    axes[0][0].set_xticks(range(len(records)), labels)
    axes[0][0].set(ylabel="seconds")
    axes[0][0].margins(y=0.12)
    axes[0][0].legend()
    return titled(made, "A BERT-Base layer of 128 tokens: seconds over a network, modelled and measured", records)


def benchmark(quick: bool) -> Benchmark:
    columns = ("protocol", "network", "bytes_sent_total", "rounds", "seconds", "modelled_seconds", "measured_seconds")
    return Benchmark("network", partial(jobs, quick), (columns,), notes=notes, plots={"": plot})


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    benchmark(chosen.quick).run(chosen)
