"""Trains on several hosts together (`jax.distributed`): they compute the same, and the first keeps what is kept."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Training on several hosts: give each the same command, with its own --process-id.

    Attributes:
        coordinator: HOST:PORT of the first host, that the others reach; without it, this host trains alone.
        num_processes: the number of hosts.
        process_id: the number of this host. Number 0 writes what is made; the others write nothing.
    """

    coordinator: str | None = None
    num_processes: int = 1
    process_id: int = 0

    def __post_init__(self):
        if self.coordinator is None and (self.num_processes, self.process_id) != (1, 0):
            raise ValueError(f"{self.num_processes} hosts need a --coordinator HOST:PORT, the address of the first")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"process_id {self.process_id} is not one of the {self.num_processes} hosts: "
                f"0 to {self.num_processes - 1}"
            )

    def join(self) -> None:
        """Waits for the others (5 minutes at most); from here on `jax.devices()` are those of all hosts.

        To be called before anything computes. A host that ends with an error lets the others wait for 5 minutes.

        Raises:
            ConnectionError: not all hosts came.
        """
        if self.coordinator is None:
            return
        try:
            jax.distributed.initialize(self.coordinator, self.num_processes, self.process_id)
        except RuntimeError as error:
            raise ConnectionError(
                f"not all of the {self.num_processes} hosts came to {self.coordinator}: {error}"
            ) from error
        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # says nothing to other devices


def first() -> bool:
    """Whether this host keeps checkpoints, metrics and results."""
    return jax.process_index() == 0


def from_first(tree: T) -> T:
    """Gives every host the first host's tree of arrays, whose shapes are the same on all; all hosts call it."""
    return multihost_utils.broadcast_one_to_all(tree)


def agreed(digests: Mapping[str, str]) -> Mapping[str, str]:
    """Makes sure that digests are the same on every host, and returns them; all hosts call it.

    Raises:
        ValueError: on a host whose inputs are not the first's; names them.
    """
    theirs = from_first({name: np.frombuffer(bytes.fromhex(digest), np.uint8) for name, digest in digests.items()})
    other = [
        name for name, digest in digests.items() if np.asarray(theirs[name]).astype(np.uint8).tobytes().hex() != digest
    ]
    if other:
        raise ValueError(f"the {' and the '.join(other)} of this host and of the first host are not the same")
    return digests


@contextlib.contextmanager
def kept(config: Any) -> Iterator[Any]:
    """The config as it is; on all hosts but the first with a folder for `out` and `runs` that is removed after."""
    if first():
        yield config
        return
    with tempfile.TemporaryDirectory() as folder:
        yield dataclasses.replace(config, out=Path(folder) / "out", runs=Path(folder) / "runs")
