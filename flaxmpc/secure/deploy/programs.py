"""A model's programs: compiled for one request and for several at once; and those that a party approved."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from flaxmpc.secure.deploy import disk
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.cluster import ClusterFile
from flaxmpc.secure.deploy.joint import jointly
from flaxmpc.secure.jit import jit
from flaxmpc.secure.party import Planned

_LINE = re.compile(r"([0-9a-f]{64})(\s|$)")


def compile_program(
    cluster: ClusterFile,
    fn: Callable[..., Any],
    weights: Planned,
    *inputs: Any,
    length: int,
    shared_reciprocal: bool = False,
) -> m.Program:
    """Compiles a function for one request and for 2, 4, 8, ... that wait at the same time.

    The same function of the same shapes gives the same program wherever it is compiled with the same versions.

    Args:
        cluster: whose settings, and limits, it is compiled for.
        fn: (weights, *inputs) -> output; the first axis of every array of inputs and output is the sentence, and a
            sentence's output must not depend on the others.
        weights: what the parties will hold, or hold.
        inputs: pytrees of arrays of a request's shapes and dtypes, secret; their values are not used.
        length: tokens of a sentence, for the parties' limits.
        shared_reciprocal: see `secure.jit`.

    Raises:
        SecureError: SPU cannot compile the function.
    """
    config = cluster.config
    settings = {
        "ring": config.ring,
        "fraction_bits": config.fraction_bits,
        "exp_mode": config.exp_mode,
        "shared_reciprocal": shared_reciprocal,
    }
    arrays = jax.tree.leaves(inputs)
    batch = arrays[0].shape[0]
    most = cluster.limits.max_batch_sentences // batch
    counts = [2**i for i in range(1, most.bit_length()) if 2**i <= most]
    program = jit(fn, config.protocol, **settings).compile(weights, *inputs)
    together = jit(jointly(fn), config.protocol, **settings)
    return m.Program(
        program.code,
        _arrays(arrays),
        _arrays(jax.tree.leaves(program.output)),
        batch,
        length,
        {count: together.compile(weights, *[inputs] * count).code for count in counts},
    )


def _arrays(leaves: list[Any]) -> tuple[m.Array, ...]:
    return tuple(m.Array(leaf.shape, leaf.dtype.name) for leaf in leaves)


class Approved:
    """The programs that a party takes: a file, every line of which begins with the digest of one.

    It is read anew for every model that is put, so what is added or taken out counts without a restart.
    """

    def __init__(self, path: Path):
        self._path = path

    @classmethod
    def of(cls, cluster: ClusterFile) -> Approved | None:
        """What cluster.toml names; None: a party takes any program."""
        return None if cluster.programs is None else cls(cluster.file(cluster.programs))

    def digests(self) -> frozenset[str]:
        """ValueError: see `disk.read`; or a line begins with something else, and is no remark (#)."""
        try:
            lines = disk.read(self._path).decode("utf-8").splitlines()
        except (OSError, ValueError) as error:
            reason = f"{self._path} can't be read: {error}: it lists approved programs, `flaxmpc approve` writes it"
            raise ValueError(reason) from error
        found = {number: _LINE.match(line) for number, line in enumerate(lines, 1) if line and line[0] != "#"}
        if wrong := [number for number, match in found.items() if match is None]:
            # What stands there is not said: the owner is told too, and it may be a file that was named by mistake.
            raise ValueError(f"{self._path}, line {wrong[0]} does not begin with 64 hex digits")
        return frozenset(match[1] for match in found.values() if match)

    def add(self, model: str, programs: Mapping[str, m.Program]) -> None:
        """Adds a model's programs, a line for each that is new, to the file, which is made if need be.

        Raises:
            ValueError: see `digests`.
            OSError: the file can't be written to.
        """
        if not self._path.exists():
            disk.write_new(self._path, b"", 0o644)
        known = self.digests()
        remark = " ".join(model.split())  # a line break in it would begin a digest
        lines = [f"{program.digest}  {remark} {name}\n" for name, program in programs.items()]
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(line for line in lines if line.split()[0] not in known)
