"""A hostile client beside two others, for `deployment.py --attack`: what it costs them, and the parties.

Three parties on this machine hold the zoo's default model. Three clients have certificates of their own. Two of them
ask the model at 16 tokens, one text after another: first for a minute by themselves, then for a minute beside each
attack of the third, which is a process of its own (attacker.py). --quick: seconds in place of minutes.

A record says of the third: how many tries there were, and how they ended. Of the two: their answers, how many were
wrong (other than in process by more than the runs of secret shares differ) or errors, and how long they took. Of the
parties: sessions lost, and the resident memory of each before, at most, and after.

`late_turns` is the longest wait for an answer, less the longest in the minute without attacks (in which the two wait
for each other already), in turns. A turn is the longest secure run of the same minute, at party 0.
"""

import contextlib
import functools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import attacker
import harness
import numpy as np
from parties import MOST_DIFFERENCE, Running, Workload, sentences

from flaxmpc import secure
from flaxmpc.secure.deploy.local import issue_client

_HONEST, _HOSTILE = ("alice", "bob"), "mallory"
_QUIET = "none"
_MOST_LATE = 3  # turns
_MOST_MB = 100  # that a party may take while it is attacked


class Asked(NamedTuple):
    """One text of an honest client.

    Attributes:
        seconds: until its answer, or its error.
        difference: of the logits from those in process; None: an error.
        error: empty if there was none.
    """

    seconds: float
    difference: float | None
    error: str = ""


class Deployment:
    """Running parties that hold the model, and the two honest clients, connected and warm."""

    def __init__(self, workload: Workload, stack: contextlib.ExitStack):
        """All ends with `stack`."""
        self.running = stack.enter_context(Running(None, 8, timeout_seconds=30))
        with secure.Cluster(self.running.cluster, "owner") as owner:
            workload.put(owner)
        self.hostile = self._as_client(_HOSTILE)
        self._asks = []
        for name in _HONEST:
            client = stack.enter_context(secure.Cluster(self._as_client(name), "client"))
            self._asks.append(workload.connect(client))
        for _ in range(5):
            for ask in self._asks:
                ask(0)

    def _as_client(self, name: str) -> Path:
        """cluster.toml as a client with a new certificate of that name has it."""
        path = self.running.cluster.path
        issue_client(path.parent, name)
        own = path.with_name(f"{name}.toml")
        text = path.read_text()
        for kind in ("pem", "key"):
            text = text.replace(f'"client.{kind}"', f'"client.{name}.{kind}"')
        own.write_text(text)
        return own

    def beside(self, busy: Callable[[], bool]) -> harness.Record:
        """What the honest clients, and the parties, see for as long as `busy` says."""
        asked: list[Asked] = []
        over = threading.Event()

        def work(ask: Callable[[int], tuple[secure.Cost, float]]) -> None:
            i = 0
            while not over.is_set():
                begin = time.perf_counter()
                try:
                    _, difference = ask(i)
                except (secure.SecureError, ValueError) as error:
                    asked.append(Asked(time.perf_counter() - begin, None, str(error)))
                    time.sleep(0.1)
                else:
                    asked.append(Asked(time.perf_counter() - begin, difference))
                i += 1

        runs, lost = len(self.running.runs()), self.running.sessions_lost()
        memory = [self.running.memory_mb()]
        threads = [threading.Thread(target=work, args=(ask,)) for ask in self._asks]
        for thread in threads:
            thread.start()
        while busy():
            memory.append(self.running.memory_mb())
            time.sleep(1)
        over.set()
        for thread in threads:
            thread.join()
        memory.append(self.running.memory_mb())
        waits = [each.seconds for each in asked]
        differences = [each.difference for each in asked if each.difference is not None]
        return {
            "answers": len(differences),
            "wrong": sum(difference > MOST_DIFFERENCE for difference in differences),
            "errors": len(asked) - len(differences),
            "said": sorted({each.error for each in asked if each.error}),
            "max_difference": max(differences, default=0.0),
            "p50": statistics.median(waits),
            "longest": max(waits),
            "longest_run": max(self.running.runs()[runs:], default=0.0),
            "sessions_lost": self.running.sessions_lost() - lost,
            "party_memory_mb_before": memory[0],
            "party_memory_mb_most": np.max(memory, axis=0).tolist(),
            "party_memory_mb_after": memory[-1],
        }


def quiet(deployment: Deployment, seconds: float) -> harness.Record:
    end = time.monotonic() + seconds
    return {"tries": 0, "refused": 0, "answered": 0, "unanswered": 0, "replies": []} | deployment.beside(
        lambda: time.monotonic() < end
    )


def attacked(deployment: Deployment, name: str, seconds: float) -> harness.Record:
    command = [sys.executable, attacker.__file__, str(deployment.hostile), name, str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # it is connected
            seen = deployment.beside(lambda: process.poll() is None)
            told = process.stdout.read()
            if process.returncode:
                raise SystemExit(f"attack {name}: the attacker ended with {process.returncode}")
            return json.loads(told) | seen
        finally:
            process.kill()


def jobs(model: str, quick: bool, stack: contextlib.ExitStack) -> harness.Jobs:
    """The deployment is made when it is needed, and ends with `stack`."""
    seconds = 5.0 if quick else 60.0
    workload = functools.cache(lambda: sentences(model))
    deployment = functools.cache(lambda: Deployment(workload(), stack))

    def measure(name: str) -> harness.Record:
        seen = quiet(deployment(), seconds) if name == _QUIET else attacked(deployment(), name, seconds)
        made = workload()
        return harness.record(made.cost, workload=made.name, attack=name, clients=len(_HONEST) + 1, **seen)

    for name in (_QUIET, *attacker.ATTACKS):
        yield f"attack: {name}", functools.partial(measure, name)


def finish(records: Sequence[harness.Record]) -> list[harness.Record]:
    """With how late answers were."""
    usual = next(row["longest"] for row in records if row["attack"] == _QUIET)
    return [row | {"late_turns": (row["longest"] - usual) / row["longest_run"]} for row in records]


def notes(records: Sequence[harness.Record]) -> list[str]:
    lines = []
    for row in records:
        title = f"attack {row['attack']}"
        grown = max(np.subtract(row["party_memory_mb_most"], row["party_memory_mb_before"]))
        told: list[tuple[str, float, float]] = [
            ("others' answers wrong", row["wrong"], 0),
            ("others' errors", row["errors"], 0),
            ("others' logits beside those in process", row["max_difference"], 0.01),
            ("turns that an answer was late", row["late_turns"], _MOST_LATE),
            ("sessions lost", row["sessions_lost"], 0),
            ("MB that a party took", float(grown), _MOST_MB),
        ]
        if row["attack"] not in (_QUIET, "absent"):  # which sends some requests that are as they should be
            told.append(("hostile requests answered", row["answered"], 0))
        lines += [harness.held(f"{title}: {claim}", value, most=most) for claim, value, most in told]
        lines += [f"{title}: replies: {reply}" for reply in row["replies"][:4]]
    return lines


def benchmark(model: str, quick: bool, stack: contextlib.ExitStack) -> harness.Benchmark:
    hostile = ("attack", "tries", "refused", "answered", "unanswered")
    others = ("attack", "answers", "wrong", "errors", "p50", "longest", "longest_run", "late_turns")
    parties = ("attack", "sessions_lost", *(f"party_memory_mb_{when}" for when in ("before", "most", "after")))
    return harness.Benchmark("attack", lambda: jobs(model, quick, stack), (hostile, others, parties), finish, notes)
