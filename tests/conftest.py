"""Array shapes are checked while testing, nothing reaches for a hub, and parties are started once."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import jaxtyping
import pytest

# Before anything of the project, or transformers, is imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
jaxtyping.install_import_hook(["flaxmpc.nn", "flaxmpc.models"], "beartype.beartype")

# What is started in the background ignores Ctrl-C, and so would the processes that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]

# A busy machine is no failure.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


def pytest_addoption(parser):
    parser.addoption(
        "--record",
        action="store_true",
        help="write what transformers' Flax models give to tests/models/data, for versions without these models",
    )


@pytest.fixture(scope="session", autouse=True)
def program_cache(tmp_path_factory):
    """Where compiled secure programs go: a directory of the session."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("programs")
        patch.setenv("FLAXMPC_CACHE", str(path))
        yield path


@pytest.fixture(scope="session")
def group():
    """group(protocol) -> the session's parties for it."""
    from flaxmpc import secure

    return functools.cache(secure.InProcess)


class Running:
    """A cluster whose parties are processes."""

    def __init__(self, directory: Path, protocol: str, timeout: float):
        from flaxmpc.secure.cluster import write_local

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
            script = f"{code or ''}\nfrom flaxmpc import cli\ncli.main({command})"
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
        from flaxmpc.secure.cluster import ClusterFile

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
def _running(
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


@pytest.fixture(scope="session")
def running():
    """running(directory, ...) -> context of a Running whose parties have started.

    Optional: protocol, timeout, changes of cluster.toml (pairs of old and new text), and code, a function of the rank.
    """
    return _running


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The HF folder of the pre-trained MiniLM-L6."""
    from flaxmpc.recipes import minilm_l6

    return minilm_l6()


@pytest.fixture(scope="session")
def write_classifier():
    """write_classifier(folder, **config) -> a model folder in it: a small random classifier of 20 tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", "."]
    words = ["a", "the", "film", "movie", "acted", "beautifully", "gripping", "tedious", "lifeless", "mess"]
    vocabulary = [*special, *words, "good", "bad", "very"]

    def write(folder: Path, **changes) -> Path:
        from flaxmpc.models import folder as folders
        from flaxmpc.models.bert import BertForSequenceClassification, init_params
        from flaxmpc.models.config import BertConfig

        (folder / "source").mkdir(parents=True)
        (folder / "source" / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        parts = {"attention": "2quad_freediv", "hidden_act": "quad", "id2label": ("negative", "positive")}
        size = {"vocab_size": len(vocabulary), "max_position_embeddings": 24, "initializer_range": 0.2}
        model = BertForSequenceClassification(BertConfig(**{**shape, **parts, **size, **changes}))
        params = init_params(model, seed=3)
        for layer in range(model.config.num_hidden_layers):
            attention = params["bert"][f"layer_{layer}"]["attention"]
            if "scale" in attention:
                attention["scale"] = attention["scale"] / 30
        return folders.save(folder / "model", model, params, folder / "source")

    return write


@pytest.fixture(scope="session")
def write_diverging(write_classifier):
    """write_diverging(folder, **config) -> the same, but a text with the word "mess" leaves its LayerNorms' range."""

    def write(folder: Path, **changes) -> Path:
        import numpy as np
        from safetensors.numpy import load_file, save_file

        norm = {"name": "layer_norm_newton", "low": 0.5, "high": 20.0, "steps": 4}
        model = write_classifier(folder, layer_norm=norm, **changes)
        tensors = load_file(model / "model.safetensors")
        mess = np.resize([1.0, -1.0], 32)
        tensors["bert.embeddings.word_embeddings.weight"][16] = 20 * mess
        tensors["bert.encoder.layer.0.intermediate.dense.weight"][0] = mess
        save_file(tensors, model / "model.safetensors")
        return model

    return write
