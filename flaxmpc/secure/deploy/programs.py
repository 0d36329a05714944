"""Compiles a model's programs, for one request and for several at once; and knows those that a party approved."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flaxmpc import files
from flaxmpc.secure.deploy import disk
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.cluster import ClusterFile
from flaxmpc.secure.jit import jit
from flaxmpc.secure.party import Planned

_LINE = re.compile(r"([0-9a-f]{64})(\s|$)")


def compile_program(
    cluster: ClusterFile, fn: Callable[..., Any], weights: Planned, *inputs: Any, length: int
) -> m.ModelProgram:
    """Compiles a function for one request and for 2, 4, 8, ... that wait at the same time.

    The same function of the same shapes gives the same program wherever it is compiled with the same versions.

    Args:
        cluster: has the settings, and the limits, that it is compiled for.
        fn: (weights, *inputs) -> output; the first axis of every array of inputs and output is the row, and a row's
            output must not depend on the others.
        weights: shapes and dtypes of what the parties hold, or will hold.
        inputs: pytrees of arrays of a request's shapes and dtypes, secret; their values are not used.
        length: size of a row, for the parties' limits.

    Raises:
        SecureError: SPU cannot compile the function.
    """
    config = cluster.config
    settings: dict[str, Any] = {name: getattr(config, name) for name in ("ring", "fraction_bits", "exp_mode")}
    arrays = jax.tree.leaves(inputs)
    batch = arrays[0].shape[0]
    most = cluster.limits.max_batch_rows // batch
    counts = [2**i for i in range(1, most.bit_length()) if 2**i <= most]
    program = jit(fn, config.protocol, **settings).compile(weights, *inputs)
    together = jit(jointly(fn), config.protocol, **settings)
    return m.ModelProgram(
        program.code,
        _arrays(arrays),
        _arrays(jax.tree.leaves(program.output)),
        batch,
        length,
        {count: together.compile(weights, *[inputs] * count).code for count in counts},
    )


def jointly(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Makes of `fn` the same function of several requests at once, which takes the rounds of one.

    The requests' arrays are joined inside the program, on shares, where that costs nothing; nobody sees another's.

    Args:
        fn: (weights, *inputs) -> output; inputs and output are pytrees of arrays whose first axis is the row.

    Returns:
        (weights, *requests) -> list of the requests' outputs, each request a tuple of inputs.
    """

    def together(weights: Any, *requests: tuple[Any, ...]) -> list[Any]:
        output = fn(weights, *jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *requests))
        ends, outputs = 0, []
        for request in requests:
            start, ends = ends, ends + jax.tree.leaves(request)[0].shape[0]
            outputs.append(jax.tree.map(lambda leaf, rows=slice(start, ends): leaf[rows], output))
        return outputs

    return together


def _arrays(leaves: list[Any]) -> tuple[m.Array, ...]:
    return tuple(m.Array(leaf.shape, leaf.dtype.name) for leaf in leaves)


class Approved(NamedTuple):
    """The programs that a party takes: a file, every line of which begins with the digest of one.

    It is read anew for every model that is put, so what is added or taken out counts without a restart.
    """

    path: Path

    @classmethod
    def of(cls, cluster: ClusterFile) -> Approved | None:
        """The file that cluster.toml names; None: a party takes any program."""
        return None if cluster.programs is None else cls(cluster.file(cluster.programs))

    def digests(self) -> frozenset[str]:
        """The digests in the file. ValueError: it can't be read, or a line begins with something else than one or #."""
        try:
            lines = disk.read(self.path).decode("utf-8").splitlines()
        except (OSError, ValueError) as error:
            reason = f"{self.path} can't be read: {error}: it lists approved programs, `flaxmpc approve` writes it"
            raise ValueError(reason) from error
        found = {number: _LINE.match(line) for number, line in enumerate(lines, 1) if line and line[0] != "#"}
        if wrong := [number for number, match in found.items() if match is None]:
            # What stands there is not said: the owner is told too, and it may be a file that was named by mistake.
            raise ValueError(f"{self.path}, line {wrong[0]} does not begin with 64 hex digits")
        return frozenset(match[1] for match in found.values() if match)

    def add(self, model: str, programs: Mapping[str, m.ModelProgram]) -> None:
        """Adds a model's programs, a line for each that is new, to the file, which is made if need be.

        Raises:
            ValueError: the file is there, and `digests` can't read it.
            OSError: the file can't be written to.
        """
        if not self.path.exists():
            files.write_new(self.path, b"", 0o644)
        known = self.digests()
        remark = " ".join(model.split())  # a line break in it would begin a digest
        lines = [f"{program.digest}  {remark} {name}\n" for name, program in programs.items()]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(line for line in lines if line.split()[0] not in known)
