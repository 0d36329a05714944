"""Parts of CrypTen, MPCFormer, SHAFT and SecFormer on CrypTen's shares, beside ours on SPU's: the same real inputs.

    python benchmarks/peers.py [--json] [--show] [--quick] [--python PYTHON]

Two parties on both sides, of which the first deals the triples, so that nothing is sent for them: CrypTen's trusted
first party, in two processes that talk over the loopback interface, and SEMI2K, in this process. Three units, in the
sizes of BERT-Base and 128 tokens:

- attention: from scores (12 x 128 x 128) and values (12 x 128 x 64) to the context;
- activation: of 128 x 3072 numbers;
- layer: a whole encoder layer. Its weights are new, and the first run (cold) opens them, which SEMI2K does only once.

Scores, values and activations are those of all six layers of the zoo's default model on sentences of its test set,
joined to texts of 128 tokens: a run for each layer, the median of their seconds. `error` is the largest distance from
the function in the clear that a part stands for (exact softmax, say), and `mean_error` the mean one, both by that
function's standard deviation; CrypTen comes with 16 fraction bits, ours have 18. Scores of "2quad_freediv" and inputs
of our "quad" are as a folded model has them. Ours have a secret mask, of which the division-free ones have nothing
left; the peers' benchmarks have none.

`rounds` are one-way latencies. CrypTen counts `openings`, each an all_reduce of PyTorch's gloo: four latencies, of its
two phases (reduce-scatter, all-gather) in which a message waits until the receiver has said that it is ready. This is
measured too, where there may be network namespaces: the slope of a run's time against the latency, few numbers. Many
numbers take more, as gloo sends them in pieces, two at a time. Bytes are those that CrypTen counts, on the wire 0.3 %
more.

What a part is, and its settings, is in crypten_party.py, which runs in a Python of its own: `make bench-peers` makes it
(requirements/peers.txt), --python names another one. About 10 minutes on 2 idle cores.
"""

import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
import namespaces
import numpy as np
import tyro
from harness import Benchmark, Record, held, model_parties, record
from peer_cases import OURS, REPETITIONS, THEIRS, Case, activations, attentions, layers
from variants import SHARED_RECIPROCAL

from flaxmpc import secure
from flaxmpc.secure.cost import provenance

HERE = Path(__file__).parent
PYTHON = HERE.parent / ".venv-peers" / "bin" / "python"
PARTIES = 2
LATENCIES = 4  # of an all_reduce
QUICK = ("2quad_freediv", ", quad", "quad, mended", "quad + quad", "freediv + quad")  # what is run then
RTTS = (0.04, 0.08)  # seconds, of the two runs whose difference measures latencies


@dataclasses.dataclass(frozen=True)
class Options(harness.Options):
    """Options of this benchmark.

    Attributes:
        python: that has CrypTen, see requirements/peers.txt.
    """

    python: Path = PYTHON


@dataclasses.dataclass(frozen=True)
class Runs:
    """A case's runs: outputs, costs, and the most memory of CrypTen's processes (ours is read from this one)."""

    outputs: np.ndarray
    costs: Sequence[secure.Cost]
    peak_memory_bytes: int | None = None

    def only(self, part: slice) -> "Runs":
        return dataclasses.replace(self, outputs=self.outputs[part], costs=self.costs[part])


def on_spu(case: Case, parties: secure.Parties) -> Runs:
    """With resident weights."""
    weights = parties.put(case.weights)
    run = secure.jit(case.part, parties=parties, shared_reciprocal=SHARED_RECIPROCAL).run  # pyright: ignore[reportArgumentType]
    found = [run(weights, *inputs, *case.mask) for inputs in zip(*case.inputs, strict=True)]
    return Runs(np.stack([output for output, _ in found]), [cost for _, cost in found])


def on_crypten(case: Case, python: Path, libraries: Mapping[str, str], hosts: namespaces.Hosts | None = None) -> Runs:
    """Two processes of CrypTen on this machine, or one on each host."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        threads = max(1, (os.cpu_count() or 1) // PARTIES)
        (folder / "job.json").write_text(json.dumps({"part": case.part, "threads": threads}), "utf-8")
        np.savez(folder / "weights.npz", **(case.weights or {}))
        np.savez(folder / "inputs.npz", *(array.astype(np.float32) for array in case.inputs))
        popen: Any = (lambda _, args, **options: subprocess.Popen(args, **options)) if hosts is None else hosts.popen
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo" if hosts is None else "eth0"}
        processes = [
            popen(rank, [str(python), str(HERE / "crypten_party.py"), directory, str(rank)], env=environment,
                  stderr=subprocess.PIPE, text=True)
            for rank in range(PARTIES)
        ]  # fmt: skip
        try:
            said = [process.communicate(timeout=900)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        for process, stderr in zip(processes, said, strict=True):
            if process.returncode:
                raise RuntimeError(f"a party of CrypTen ended with {process.returncode}: {stderr}")
        parties = [json.loads((folder / f"{rank}.json").read_text("utf-8")) for rank in range(PARTIES)]
        outputs = np.load(folder / "output.npy")
    found = []
    for runs in zip(*(party["runs"] for party in parties), strict=True):
        sent = [run["bytes_sent"] for run in runs]
        made = provenance()
        made["versions"] |= libraries
        found.append(
            secure.Cost(
                protocol=THEIRS,
                ring="FM64",
                fraction_bits=16,
                exp_mode="limit",
                parties=PARTIES,
                seconds=max(run["seconds"] for run in runs),
                compile_seconds=0.0,
                bytes_sent=sum(sent),
                bytes_sent_per_party=tuple(sent),
                rounds=float(LATENCIES * runs[0]["openings"]),
                per_op={},
                **made,
            )
        )
    return Runs(outputs, found, sum(party["peak_memory_bytes"] for party in parties))


def summary(case: Case, runs: Runs, warm: bool | None = None, **names: Any) -> Record:
    """The record of a case's runs, of all or, of a layer of ours, of those that are cold or warm."""
    outputs, costs, peak = runs.outputs, runs.costs, runs.peak_memory_bytes
    distances = [np.abs(output - exact) / exact.std() for output, exact in zip(outputs, case.exact, strict=False)]
    cost = dataclasses.replace(costs[-1], seconds=statistics.median(cost.seconds for cost in costs))
    temperature = "" if warm is None else ", warm" if warm else ", cold"
    place = " on CrypTen" if case.system == "flaxmpc" and cost.protocol == THEIRS else ""
    found = record(
        cost,
        unit=case.unit,
        system=case.system,
        variant=f"{case.system}{place}: {case.variant}{temperature}",
        warm=warm,
        num_tokens=case.inputs[0].shape[-2],
        error=float(np.max(distances)),
        mean_error=float(np.mean(distances)),
        openings=cost.rounds / (LATENCIES if cost.protocol == THEIRS else 1),
        repetitions=len(costs),
        **names,
    )
    return found if peak is None else found | {"peak_memory_bytes": peak}


def jobs(quick: bool, python: Path) -> Iterator[tuple[str, Callable[[], Record]]]:
    libraries = versions(python)
    if libraries is None:
        print(
            f"peers.py is skipped: {python} has no CrypTen: make bench-peers, or name another one with --python",
            file=sys.stderr,
        )
        return
    parties = model_parties(OURS)
    for cases in (attentions, activations, layers):
        for case in cases(quick):
            name = f"{case.unit}, {case.system}, {case.variant}"
            if quick and not name.endswith(QUICK):
                continue
            if isinstance(case.part, str):
                yield (
                    f"{name}, {THEIRS}",
                    lambda case=case: summary(case, on_crypten(case, python, libraries)),
                )
                continue
            runs = functools.cache(partial(on_spu, case, parties))
            if case.weights is None:
                yield f"{name}, {OURS}", lambda case=case, runs=runs: summary(case, runs())
                continue
            for temperature, warm, part in (("cold", False, np.s_[:1]), ("warm", True, np.s_[1:])):
                yield (
                    f"{name}, {OURS}, {temperature}",
                    lambda case=case, runs=runs, warm=warm, part=part: summary(case, runs().only(part), warm),
                )
    if quick:
        return
    if reason := namespaces.unavailable():
        print(f"latencies are left out: {reason}", file=sys.stderr)
        return
    yield "latencies of an opening", partial(latency, python, libraries)


def latency(python: Path, libraries: Mapping[str, str]) -> Record:
    """With `measured_rounds`, by the slope between two hosts: of small numbers, so that nothing else is in it."""
    case = next(case for case in attentions(True) if case.part == "2quad")
    several = [np.concatenate([array] * REPETITIONS) for array in (case.exact, *case.inputs)]
    case = case._replace(unit="latency", exact=several[0], inputs=tuple(several[1:]))

    def measured(rtt: float) -> Runs:
        with namespaces.hosts(PARTIES, rtt_seconds=rtt) as hosts:
            return on_crypten(case, python, libraries, hosts).only(np.s_[1:])

    near, far = map(measured, RTTS)
    seconds = [statistics.median(cost.seconds for cost in runs.costs) for runs in (near, far)]
    return summary(case, far, measured_rounds=(seconds[1] - seconds[0]) / ((RTTS[1] - RTTS[0]) / 2))


def versions(python: Path) -> dict[str, str] | None:
    """Of CrypTen and PyTorch in a Python; None if it has none, or is none."""
    try:
        said = subprocess.run([python, HERE / "crypten_party.py"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return json.loads(said.stdout)


def notes(records: list[Record]) -> list[str]:
    """Of each unit the peer that sends the least, against ours that does; and what an opening takes."""
    found = []
    for unit in dict.fromkeys(r["unit"] for r in records if "measured_rounds" not in r):
        own = [r for r in records if r["unit"] == unit and r["protocol"] == OURS]
        peers = [r for r in records if r["unit"] == unit and r["protocol"] == THEIRS and r["system"] != "flaxmpc"]
        us, them = (min(group, key=lambda r: r["bytes_sent_total"]) for group in (own, peers))
        ratios = ", ".join(
            f"{them[field] / us[field]:.2g} x the {name}"
            for field, name in (("bytes_sent_total", "bytes"), ("rounds", "rounds"), ("seconds", "seconds"),
                                ("mean_error", "mean error"))
        )  # fmt: skip
        found.append(f"{unit}: {them['variant']}: {ratios} of {us['variant']}")
    for r in records:
        if "measured_rounds" in r:
            claim = f"one-way latencies of an opening, counted as {LATENCIES}"
            found.append(held(claim, r["measured_rounds"] / r["openings"], least=0.9 * LATENCIES, most=1.1 * LATENCIES))
    return found


def benchmark(quick: bool, python: Path = PYTHON) -> Benchmark:
    columns = ("unit", "variant", "error", "mean_error", "bytes_sent_total", "rounds", "seconds", "wan_seconds")
    return Benchmark("peers", partial(jobs, quick, python), (columns,), notes=notes)


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    benchmark(chosen.quick, chosen.python).run(chosen)
