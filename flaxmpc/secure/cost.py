"""What a secure run cost: seconds, bytes, rounds, per operation, as one record."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import operator
import os
import platform
import re
from pathlib import Path
from typing import Any

from flaxmpc.secure.protocol import Config


@dataclasses.dataclass(frozen=True)
class OpCost:
    """One kind of operation in a run.

    Attributes:
        count: how often each party executed it.
        seconds: time in it, averaged over the parties.
        bytes_sent: sum over the parties.
        rounds: send actions, averaged over the parties.
    """

    count: int
    seconds: float
    bytes_sent: int
    rounds: float

    def __add__(self, other: OpCost) -> OpCost:
        return OpCost(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))


@dataclasses.dataclass(frozen=True)
class Cost:
    """One run. Seconds differ from run to run; bytes and rounds do not (CHEETAH: by 0.01 %, its first run adds set-up).

    Attributes:
        protocol: name of the protocol.
        ring: ring of the shares.
        fraction_bits: bits after the binary point.
        exp_mode: how exponentials were computed.
        parties: number of computing parties.
        seconds: wall-clock time of the program at the parties, until everything sent has arrived. Making the shares
            and opening the result are not in it.
        compile_seconds: what this call spent on compiling; 0 if the program was in memory.
        bytes_sent: payload sent between the parties, sum over them. On the wire 0.4 to 8 % more.
        bytes_sent_per_party: the same for each party, the busiest first (SPU's log does not say who is who). In ABY3
            a party's share of the sum varies from run to run; the sum is exact.
        rounds: send actions per party, averaged over the parties: the number of one-way latencies that a run waits
            for (see Protocol.rounds_exact).
        per_op: OpCost by operation, as SPU's compiled program names it ("pphlo.dot"), the most bytes first.
        versions: the versions of flaxmpc, spu, jax, numpy and python.
        machine: {"platform", "processor", "cpus"}.
        date: end of the run, UTC, ISO 8601.
    """

    protocol: str
    ring: str
    fraction_bits: int
    exp_mode: str
    parties: int
    seconds: float
    compile_seconds: float
    bytes_sent: int
    bytes_sent_per_party: tuple[int, ...]
    rounds: float
    per_op: dict[str, OpCost]
    versions: dict[str, str]
    machine: dict[str, str | int]
    date: str

    @classmethod
    def from_profile(cls, config: Config, profile: Profile, seconds: float, compile_seconds: float) -> Cost:
        """The record of a run of `seconds` with settings `config` that logged `profile`."""
        n = config.world_size
        per_op = {
            name: OpCost(round(count / n), time / n, sent, actions / n)
            for name, (count, time, sent, actions) in profile.ops.items()
        }
        sent = tuple(sorted((sent for sent, _ in profile.totals), reverse=True))
        return cls(
            protocol=config.protocol,
            ring=config.ring,
            fraction_bits=config.fraction_bits,
            exp_mode=config.exp_mode,
            parties=n,
            seconds=seconds,
            compile_seconds=compile_seconds,
            bytes_sent=sum(sent),
            bytes_sent_per_party=sent,
            rounds=sum(actions for _, actions in profile.totals) / n,
            per_op=_most_bytes_first(per_op),
            **provenance(),
        )

    def __add__(self, other: Cost) -> Cost:
        """Of two runs with the same settings, one after the other."""
        per_op = dict(self.per_op)
        for name, op in other.per_op.items():
            per_op[name] = per_op[name] + op if name in per_op else op
        return dataclasses.replace(
            other,
            seconds=self.seconds + other.seconds,
            compile_seconds=self.compile_seconds + other.compile_seconds,
            bytes_sent=self.bytes_sent + other.bytes_sent,
            bytes_sent_per_party=tuple(
                a + b for a, b in zip(self.bytes_sent_per_party, other.bytes_sent_per_party, strict=True)
            ),
            rounds=self.rounds + other.rounds,
            per_op=_most_bytes_first(per_op),
        )

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, in plain Python types."""
        return dataclasses.asdict(self) | {"bytes_sent_per_party": list(self.bytes_sent_per_party)}

    def to_json(self) -> str:
        """`as_dict` as one line of JSON."""
        return json.dumps(self.as_dict())


def _most_bytes_first(per_op: dict[str, OpCost]) -> dict[str, OpCost]:
    return dict(sorted(per_op.items(), key=lambda item: (-item[1].bytes_sent, -item[1].seconds)))


def _processor() -> str:
    """The processor's name: on Linux the kernel has it, `platform` has not."""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor()


def provenance() -> dict[str, Any]:
    """Where a measurement comes from: `versions`, `machine` and `date` as in a `Cost`."""
    return {
        "versions": dict(versions()),
        "machine": {"platform": platform.platform(), "processor": _processor(), "cpus": os.cpu_count() or 1},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


_OP = re.compile(
    r"- (pphlo\..+?), executed (\d+) times, duration ([\d.e+-]+)s, send bytes (\d+) recv bytes \d+, send actions (\d+),"
)
_TOTAL = re.compile(r"Link details: total send bytes (\d+), recv bytes \d+, send actions (\d+),")


@dataclasses.dataclass(frozen=True)
class Profile:
    """SPU's profile of a run, read from the log of one or more parties.

    The parties of one process write to one log, line by line in any order and without their rank, so operations are
    only known summed.

    Attributes:
        totals: (bytes sent, send actions) of each party, in no order.
        ops: (times executed, seconds, bytes sent, send actions) by operation, summed over the parties.
    """

    totals: tuple[tuple[int, int], ...]
    ops: dict[str, tuple[int, float, int, int]]

    @classmethod
    def parse(cls, log: str, num_parties: int) -> Profile:
        """Reads the lines of one run by `num_parties` parties; RuntimeError if the log has not so many summaries."""
        totals = tuple((int(sent), int(actions)) for sent, actions in _TOTAL.findall(log))
        if len(totals) != num_parties:
            raise RuntimeError(
                f"SPU's log has {len(totals)} run summaries for {num_parties} parties: "
                "was libspu.logging set up anew by someone else in this process?"
            )
        ops: dict[str, tuple[int, float, int, int]] = {}
        for name, count, seconds, sent, actions in _OP.findall(log):
            old = ops.get(name, (0, 0.0, 0, 0))
            ops[name] = (old[0] + int(count), old[1] + float(seconds), old[2] + int(sent), old[3] + int(actions))
        return cls(totals, ops)


@functools.cache
def versions() -> dict[str, str]:
    """Of what decides what a run computes and costs, by package."""
    found = {"python": platform.python_version()}
    for package in ("flaxmpc", "spu", "jax", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # flaxmpc used from a source tree
            found[package] = "not installed"
    return found
