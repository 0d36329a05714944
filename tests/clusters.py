"""Clusters whose parties are processes, and the small model that tests put there."""

import contextlib
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxmpc import secure

ROOT = Path(__file__).parents[1]
# Of the clusters; every fault must end within a small multiple of it.
TIMEOUT = 6.0
SHORT = 4.0
X = np.arange(8, dtype=np.float32).reshape(2, 4)
W = np.eye(4, dtype=np.float32) * 3


def affine(w, x):
    return x @ w + 1


def publish(owner: secure.Cluster, name: str = "affine", w: np.ndarray = W) -> None:
    """Puts `affine` as a model of one program."""
    weights = owner.put(w)
    owner.publish(name, weights, {"2x4": owner.program(affine, weights, X, length=4)}, b"public " * 3)


def ask(client: secure.Cluster, x: np.ndarray = X) -> np.ndarray:
    name, model = client.find("affine")
    return client.infer(name, model, "2x4", x).outputs[0]


def follow(client: secure.Cluster) -> np.ndarray:
    """Asks; again where the model was put anew meanwhile."""
    while True:
        name, model = client.find("affine")
        try:
            return client.infer(name, model, "2x4", X).outputs[0]
        except secure.SecureError:
            if client.find("affine")[1].hash == model.hash:
                raise


def check_served(parties) -> None:
    """Puts and asks anew, as after a repair."""
    with parties.connect() as owner:
        publish(owner)
    with parties.connect("client") as client:
        np.testing.assert_allclose(ask(client), X * 3 + 1, atol=1e-3)


def level(parties, before: dict[int, float], seconds: float) -> None:
    """The parties come to hold no more values than before."""
    end = time.monotonic() + seconds
    while (now := values(parties)) and any(now[rank] > before[rank] for rank in now):
        assert time.monotonic() < end, (before, now)
        time.sleep(0.1)


def values(parties) -> dict[int, float]:
    return {rank: parties.metrics(rank)["flaxmpc_values"] for rank in parties.processes}


class Running:
    """A cluster whose parties are processes."""

    def __init__(self, directory: Path, protocol: str, timeout: float):
        from flaxmpc.secure.deploy.local import write_local

        self.directory = directory
        self.cluster = write_local(directory, protocol, timeout_seconds=timeout, allow_insecure_dealer=True)
        self.processes: dict[int, subprocess.Popen] = {}
        self._altered: set[int] = set()

    def start(self, *ranks: int, code: str | None = None, path: Path | None = None) -> None:
        """Starts parties (by default all); `code` runs before, in their processes; `path` is another cluster.toml."""
        for rank in ranks or range(len(self.cluster.party)):
            if code or path:
                self._altered.add(rank)
            command = ["party", "--cluster", str(path or self.cluster.path), "--rank", str(rank)]
            script = f"{code or ''}\nfrom flaxmpc.cli.main import main\nmain({command})"
            with open(self.log_of(rank), "wb") as log:
                self.processes[rank] = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=log)

    def log_of(self, rank: int) -> Path:
        return self.directory / f"party{rank}.log"

    def events(self, rank: int, event: str) -> list[dict]:
        """What a party logged since it was started last."""
        lines = self.log_of(rank).read_text().splitlines()
        return [record for line in lines if line.startswith("{") and (record := json.loads(line))["event"] == event]

    def worker_of(self, rank: int) -> int:
        """Process id of a party's worker."""
        return self.events(rank, "session")[-1]["worker"]

    def wait_for(self, rank: int, event: str, count: int = 1, seconds: float = 90.0) -> dict:
        end = time.monotonic() + seconds
        while len(found := self.events(rank, event)) < count:
            assert time.monotonic() < end, f"party {rank} logged no {event}: {self.log_of(rank).read_text()}"
            time.sleep(0.05)
        return found[-1]

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> int:
        process = self.processes.pop(rank)
        process.send_signal(number)
        return process.wait(30)

    def restart(self, *ranks: int, path: Path | None = None, code: str | None = None) -> None:
        """Ends parties and starts them again, see `start`."""
        for rank in ranks:
            if rank in self.processes:
                self.kill(rank)
        self._altered.difference_update(ranks)
        self.start(*ranks, path=path, code=code)

    def restore(self) -> None:
        """All parties run as they did at first."""
        for rank in range(len(self.cluster.party)):
            if rank in self._altered or rank not in self.processes or self.processes[rank].poll() is not None:
                self.restart(rank)

    def metrics(self, rank: int) -> dict[str, float]:
        """What /metrics of a party says."""
        with urllib.request.urlopen(f"http://{self.cluster.party[rank].metrics}/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        return {name: float(value) for name, value in (line.split() for line in lines if line[0] != "#")}

    def wait_for_requests(self, count: int) -> None:
        """Until so many wait or run at every party."""
        end = time.monotonic() + 60
        while any(self.metrics(rank)["flaxmpc_queue"] < count for rank in self.processes):
            assert time.monotonic() < end, f"there are no {count} requests"
            time.sleep(0.02)

    def connect(self, role: str = "owner", patience: float = 90.0) -> Any:
        """Connects once the group has formed, however busy the machine is."""
        from flaxmpc import secure

        end = time.monotonic() + patience
        while True:
            try:
                return secure.Cluster(self.cluster, role)
            except secure.SecureError:
                if time.monotonic() > end:
                    raise

    def changed(self, name: str, *changes: tuple[str, str]) -> Any:
        """Another cluster.toml beside this one, with replaced text."""
        from flaxmpc.secure.deploy.cluster import ClusterFile

        text = self.cluster.path.read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = self.directory / name
        path.write_text(text)
        return ClusterFile.read(path)

    def stop(self) -> None:
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()


@contextlib.contextmanager
def running(
    directory: Path, protocol: str = "ABY3", timeout: float = 6.0, changes: Sequence[tuple[str, str]] = (), **start: Any
) -> Iterator[Running]:
    parties = Running(directory, protocol, timeout)
    parties.cluster = parties.changed("cluster.toml", *changes)
    try:
        for rank in range(len(parties.cluster.party)):
            parties.start(rank, **{name: value(rank) for name, value in start.items()})
        yield parties
    finally:
        parties.stop()
