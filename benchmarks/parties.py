"""Parties of a cluster on this machine, and what they are asked, for the benchmarks of deployments."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import namespaces
import numpy as np

from flaxmpc import secure
from flaxmpc.models import folder as folders
from flaxmpc.models import zoo
from flaxmpc.secure._spu import thread_limit
from flaxmpc.secure.deploy.cluster import ClusterFile
from flaxmpc.secure.deploy.local import write_local
from flaxmpc.serve import remote
from flaxmpc.serve.private import SecureClassifier

SENTENCES = ("A gripping, beautifully acted film.", "A tedious, lifeless mess.", "Good, but not very good.")
MOST_DIFFERENCE = 0.05  # of two runs' outputs: the truncation of shares is random


@dataclasses.dataclass(frozen=True)
class Workload:
    """What parties are asked.

    Attributes:
        name: for the table.
        cost: of one request, in process.
        put: the owner's part.
        connect: the client's part: makes a function that sends the i-th request, and returns its cost and how far its
            output is from that in process.
        numbers: that a request shares.
    """

    name: str
    cost: secure.Cost
    put: Callable[[secure.Cluster], Any]
    connect: Callable[[secure.Cluster], Callable[[int], tuple[secure.Cost, float]]]
    numbers: int


def sentences(model: str) -> Workload:
    """The demo: a sentence of up to 16 tokens."""
    loaded = folders.load(zoo.find(model))
    local = SecureClassifier(loaded, secure.InProcess(exp_mode=secure.MODEL_EXP_MODE))
    expected = [local.classify([text]) for text in SENTENCES]

    def connect(parties: secure.Cluster) -> Callable[[int], tuple[secure.Cost, float]]:
        classifier = remote.RemoteClassifier(parties)

        def ask(i: int) -> tuple[secure.Cost, float]:
            (prediction,), cost = classifier.classify([SENTENCES[i % len(SENTENCES)]])
            logits = expected[i % len(SENTENCES)].predictions[0].logits
            return cost, float(np.abs(np.subtract(prediction.logits, logits)).max())

        return ask

    run = local.run(local.encode(SENTENCES[:1]), [0], 1)
    inputs = local.share(run.ids, run.mask)
    return Workload(
        zoo.find(model).name,
        expected[-1].cost,
        lambda parties: remote.put(loaded, parties, lengths=(16,)),
        connect,
        sum(leaf.size for leaf in jax.tree.leaves(inputs)),
    )


def resident_mb(root: int) -> int:
    """Resident memory of a process and its descendants: a party's supervisor and worker."""
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
    return round(total / 1e6)


class Running:
    """The parties of a cluster, each a process; on this machine, or each in a namespace. Use as a context."""

    def __init__(self, rate: str | None, together: int, timeout_seconds: float = 120):
        """`rate` of each namespace; `together`: requests that may run together; the rest: see `write_local`."""
        self._rate = rate
        self._together = together
        self._timeout = timeout_seconds
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Running":
        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "cluster"
            cluster = write_local(directory, timeout_seconds=self._timeout)
            text = cluster.path.read_text().replace(
                f"max_batch_rows = {cluster.limits.max_batch_rows}", f"max_batch_rows = {self._together}"
            )
            place: Callable[[int, Sequence[str]], Sequence[str]] = lambda _, command: command  # noqa: E731
            if self._rate is not None:
                hosts = stack.enter_context(namespaces.hosts(len(cluster.party), rate=self._rate))
                place = hosts.command
                for entry, address in zip(cluster.party, hosts.addresses, strict=True):
                    for own in (entry.control, entry.link):
                        text = text.replace(own, own.replace("127.0.0.1", address))
            cluster.path.write_text(text)
            self.cluster = ClusterFile.read(cluster.path)
            self._log = directory / "party0.log"
            self._processes = []
            for rank in range(len(cluster.party)):
                command = [sys.executable, "-m", "flaxmpc", "party", "--cluster", str(cluster.path), "--rank"]
                log = stack.enter_context((directory / f"party{rank}.log").open("wb"))
                # Hosts in namespaces share the cores of this machine.
                env = os.environ | thread_limit(len(cluster.party))
                process = subprocess.Popen(place(rank, [*command, str(rank)]), stderr=log, env=env)
                stack.callback(process.wait)
                stack.callback(process.terminate)
                self._processes.append(process)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def memory_mb(self) -> list[int]:
        """Of each party."""
        return [resident_mb(process.pid) for process in self._processes]

    def runs(self) -> list[float]:
        """Seconds of each secure run of clients' requests so far; one may serve several."""
        lines = [line for line in self._log.read_text().splitlines() if '"event": "run"' in line]
        return [json.loads(line)["seconds"] for line in lines]

    def sessions_lost(self) -> int:
        """By all parties together."""
        return sum(self._metric(rank, "sessions_lost_total") for rank in range(len(self._processes)))

    def _metric(self, rank: int, name: str) -> int:
        address = self.cluster.party[rank].metrics
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        return next(int(float(line.split()[1])) for line in lines if line.startswith(f"flaxmpc_{name} "))
