"""Groups of parties are started once; compiled programs go to a directory of the test session."""

import contextlib
import functools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flaxmpc import secure
from flaxmpc.secure.cluster import ClusterFile, write_local

ROOT = Path(__file__).parents[2]


class Running:
    """A cluster whose parties are processes."""

    def __init__(self, directory: Path, protocol: str = "ABY3", timeout: float = 6.0):
        self.directory = directory
        self.cluster = write_local(directory, protocol, timeout_seconds=timeout, allow_insecure_dealer=True)
        self.processes: dict[int, subprocess.Popen] = {}

    def start(self, *ranks: int, code: str | None = None, path: Path | None = None) -> None:
        """Starts parties (by default all); `code` runs before, in their processes."""
        path = path or self.cluster.path
        for rank in ranks or range(len(self.cluster.party)):
            command = ["party", "--cluster", str(path), "--rank", str(rank)]
            script = f"{code or ''}\nfrom flaxmpc import cli\ncli.main({command})"
            with open(self.log_of(rank), "ab") as log:
                self.processes[rank] = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=log)

    def log_of(self, rank: int) -> Path:
        return self.directory / f"party{rank}.log"

    def events(self, rank: int, event: str) -> list[dict]:
        lines = self.log_of(rank).read_text().splitlines()
        return [record for line in lines if line.startswith("{") and (record := json.loads(line))["event"] == event]

    def worker_of(self, rank: int) -> int:
        """Process id of a party's worker."""
        return self.events(rank, "session")[-1]["worker"]

    def wait_for(self, rank: int, event: str, count: int = 1, seconds: float = 30.0) -> dict:
        end = time.monotonic() + seconds
        while len(found := self.events(rank, event)) < count:
            assert time.monotonic() < end, f"party {rank} logged no {event}: {self.log_of(rank).read_text()}"
            time.sleep(0.05)
        return found[-1]

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> int:
        process = self.processes.pop(rank)
        process.send_signal(number)
        return process.wait(30)

    def connect(self, role: str = "owner", patience: float = 40.0) -> secure.Cluster:
        """Connects once the group has formed, however busy the machine is."""
        end = time.monotonic() + patience
        while True:
            try:
                return secure.Cluster(self.cluster, role)
            except secure.SecureError:
                if time.monotonic() > end:
                    raise

    def changed(self, name: str, *changes: tuple[str, str]) -> ClusterFile:
        """Another cluster.toml beside this one, with replaced text."""
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
def _running(directory: Path, *ranks: int, protocol: str = "ABY3", timeout: float = 6.0) -> Iterator[Running]:
    parties = Running(directory, protocol, timeout)
    try:
        parties.start(*ranks)
        yield parties
    finally:
        parties.stop()


@pytest.fixture(scope="session")
def running():
    """running(directory, *ranks, protocol, timeout) -> context of a Running whose parties (default: all) started."""
    return _running


@pytest.fixture(scope="session", autouse=True)
def program_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("programs")
        patch.setenv("FLAXMPC_CACHE", str(path))
        yield path


@pytest.fixture(scope="session")
def group():
    """group(protocol) -> the session's parties for it."""
    return functools.cache(secure.InProcess)
