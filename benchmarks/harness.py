"""What every benchmark shares: measure or show, save with what made it, print a table or JSON."""

import dataclasses
import json
import resource
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from flaxmpc import secure

RESULTS = Path(__file__).parent / "results"

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every benchmark.

    Attributes:
        show: print what is saved, without measuring.
        json: print the records as JSON in place of the table.
        quick: small: to see that it runs. Nothing is saved.
    """

    show: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def record(cost: secure.Cost, **names: Any) -> Record:
    """A flat record of a run: `names` say what ran; seconds over LAN and WAN are modelled."""
    return {
        **names,
        "protocol": cost.protocol,
        "ring": cost.ring,
        "fraction_bits": cost.fraction_bits,
        "bytes_sent_total": cost.bytes_sent,
        "rounds": cost.rounds,
        "seconds": cost.seconds,
        "compile_seconds": cost.compile_seconds,
        "lan_seconds": secure.LAN.seconds(cost),
        "wan_seconds": secure.WAN.seconds(cost),
        # Linux counts kilobytes. Of the whole process, all parties together, up to here.
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": cost.versions,
        "machine": cost.machine,
        "date": cost.date,
    }


def run(
    name: str,
    options: Options,
    jobs: Callable[[], Iterable[tuple[str, Callable[[], Record]]]],
    columns: Sequence[str],
) -> list[Record]:
    """Measures the jobs (or reads the saved records), saves and prints them, and returns them.

    Args:
        name: of the benchmark: its records are results/NAME.json.
        options: of the command line.
        jobs: makes pairs of a description, shown as progress, and what measures one record.
        columns: of the table.
    """
    path = RESULTS / f"{name}.json"
    if options.show:
        if not path.is_file():
            raise SystemExit(f"{path.name} does not exist: run the benchmark without --show first")
        records = json.loads(path.read_text("utf-8"))
    else:
        console = Console(stderr=True)
        records = []
        for description, measure in track(list(jobs()), description=name, console=console):
            console.print(description)
            records.append(measure())
        if not options.quick:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(records, indent=1) + "\n", "utf-8")
    if options.json:
        print(json.dumps(records))
    else:
        Console().print(_table(records, columns))
    return records


# Headings short enough for 80 columns.
_HEADINGS = {"bytes_sent_total": "MB, all", "seconds": "s", "lan_seconds": "LAN s", "wan_seconds": "WAN s"}


def _table(records: Sequence[Record], columns: Sequence[str]) -> Table:
    table = Table(*(_HEADINGS.get(column, column) for column in columns))
    for row in records:
        cells = []
        for column in columns:
            value = row[column]
            if column == "bytes_sent_total":
                value = value / 1e6
            cells.append(f"{value:.1f}" if isinstance(value, float) else str(value))
        table.add_row(*cells)
    return table
