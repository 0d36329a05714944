"""What every benchmark shares: measure or show, save with what made it, print a table or JSON, plot."""

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import resource
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from style import draw

from flaxmpc import secure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"

Record = dict[str, Any]
Jobs = Iterable[tuple[str, Callable[[], Record]]]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every benchmark.

    Attributes:
        show: print what is saved, without measuring.
        draw: make the figures of what is saved anew, without measuring.
        json: print the records as JSON in place of the table.
        quick: small: to see that it runs. Nothing is saved.
    """

    show: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    draw: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark: what it measures, and how that is shown.

    Attributes:
        name: of its files, without a hyphen.
        jobs: makes pairs of a description, shown as progress and unique, and what measures one record.
        tables: the columns of each table.
        finish: from the measured records to those that are saved and shown: medians, ratios, fits.
        notes: lines below the table.
        plots: figures by the end of their file name, "" for the first.
        libraries: those whose versions its files are named by.
    """

    name: str
    jobs: Callable[[], Jobs]
    tables: Sequence[Sequence[str]]
    finish: Callable[[list[Record]], list[Record]] = lambda records: records
    notes: Callable[[list[Record]], list[str]] = lambda records: []
    plots: Mapping[str, Callable[[list[Record]], "Figure"]] = dataclasses.field(default_factory=dict)
    libraries: Sequence[str] = ("spu",)

    def run(self, options: Options) -> list[Record]:
        """Measures (or reads what is saved), saves and prints; returns the records."""
        if options.show or options.draw:
            records = saved(self.name)
            if not records:
                raise SystemExit(f"{self.name} has no saved results: run the benchmark without --show first")
            if options.draw:
                self._draw(records)
        else:
            records = self.finish(self._measured(options))
            if records and not options.quick:
                self.save(records)
        if options.json:
            print(json.dumps(records))
        else:
            console = Console()
            for columns in self.tables:
                console.print(rich_table(_table(records, columns)))
            for note in self._notes(records):
                console.print(note, markup=False, highlight=False)
        return records

    def _measured(self, options: Options) -> list[Record]:
        """A record of every job. Those of a run that was interrupted are taken from it, unless it was a quick one."""
        console = Console(stderr=True)
        partial = RESULTS / f".{self.name}.partial.json"
        done: dict[str, Record] = {}
        if partial.is_file() and not options.quick:
            done = json.loads(partial.read_text("utf-8"))
            console.print(
                f"{len(done)} records are of the run that was interrupted; to measure them anew: rm {partial}"
            )
        for description, measure in track(list(self.jobs()), description=self.name, console=console):
            if description in done:
                continue
            console.print(description, highlight=False)
            # From here on ru_maxrss is this measurement's (Linux).
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
            done[description] = measure()
            if not options.quick:
                RESULTS.mkdir(exist_ok=True)
                partial.write_text(json.dumps(done), "utf-8")
        if not options.quick:
            partial.unlink(missing_ok=True)
        return list(done.values())

    def _notes(self, records: list[Record]) -> list[str]:
        protocols = dict.fromkeys(record["protocol"] for record in records if _indicative(record))
        return [*self.notes(records), *([_INDICATIVE.format(", ".join(protocols))] if protocols else [])]

    def save(self, records: list[Record]) -> None:
        """JSON, CSV, Markdown and figures, named by what made them."""
        import pandas as pd

        stem = self._stem(records)
        RESULTS.mkdir(exist_ok=True)
        Path(f"{stem}.json").write_text(json.dumps(records, indent=1) + "\n", "utf-8")
        flat = pd.json_normalize([{k: v for k, v in record.items() if k != "per_op"} for record in records])
        flat.to_csv(f"{stem}.csv", index=False)
        blocks = [markdown(_table(records, columns)) for columns in self.tables]
        blocks.append("\n".join(f"- {note}" for note in self._notes(records)))
        Path(f"{stem}.md").write_text("\n\n".join(blocks).rstrip() + "\n", "utf-8")
        self._draw(records)

    def _draw(self, records: list[Record]) -> None:
        for suffix, plot in self.plots.items():
            draw(plot, records, f"{self._stem(records)}{suffix and '-' + suffix}")

    def _stem(self, records: list[Record]) -> Path:
        """The start of the files' names, which says what made them."""
        first = records[0]
        made = [f"{library}{first['versions'][library]}" for library in self.libraries]
        if "protocol" in first:
            made = ["+".join(dict.fromkeys(record["protocol"] for record in records)), first["ring"], *made]
        made = "-".join([*made, f"{first['machine']['cpus']}cores"])
        return RESULTS / f"{self.name}-{made}"


def collected(
    name: str,
    found: list[Record],
    table: str,
    plot: Callable[[list[Record]], "Figure"],
    options: Options,
    printed: Sequence[list[list[str]]],
) -> None:
    """Shows a benchmark that measures nothing: what models left with them. Without --show and --quick it is saved too.

    Args:
        name: of its files.
        found: the records.
        table: the table of the records in Markdown, as it is saved.
        plot: makes the figure that is saved.
        options: the command's.
        printed: the tables that the terminal gets.
    """
    if not (options.show or options.quick):
        RESULTS.mkdir(exist_ok=True)
        draw(plot, found, RESULTS / name)
        (RESULTS / f"{name}.md").write_text(table + "\n", "utf-8")
    if options.json:
        print(json.dumps(found))
    else:
        for rows in printed:
            Console().print(rich_table(rows))


def saved(name: str) -> list[Record]:
    """The newest saved records of a benchmark; none if there are none."""
    found = [json.loads(path.read_text("utf-8")) for path in RESULTS.glob(f"{name}-*.json")]
    return max(found, key=lambda records: records[0]["date"], default=[])


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
        # Linux counts kilobytes. Of the whole process, all parties together.
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": cost.versions,
        "machine": cost.machine,
        "date": cost.date,
    }


def model_parties(protocol: str = "ABY3", **options: Any) -> secure.InProcess:
    """In this process, with the exponentials of models; options as of `secure.InProcess`."""
    return secure.InProcess(protocol, exp_mode=secure.MODEL_EXP_MODE, **options)


def per_op(cost: secure.Cost) -> dict[str, dict[str, float]]:
    """What each operation cost, for a record's field `per_op`."""
    return {name: dataclasses.asdict(op) for name, op in cost.per_op.items()}


def in_child(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)` in a fresh process, for honest peak memory and compile times. A function of a module."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def medians(records: Sequence[Record], fields: Sequence[str]) -> Record:
    """The first record, with the medians over all in `fields`."""
    return records[0] | {field: statistics.median(record[field] for record in records) for field in fields}


_RATIOS = {
    "time_ratio": "seconds",
    "bytes_ratio": "bytes_sent_total",
    "rounds_ratio": "rounds",
    "lan_ratio": "lan_seconds",
    "wan_ratio": "wan_seconds",
}


def ratios(base: Record | None, own: Record) -> Record:
    """How many times less than another a run takes, by the names of these ratios; None where there is no other."""
    return {name: None if base is None else base[field] / own[field] for name, field in _RATIOS.items()}


def held(claim: str, value: float, *, least: float | None = None, most: float | None = None) -> str:
    """A line that says whether `value` is within its bounds."""
    good = (least is None or value >= least) and (most is None or value <= most)
    return f"{'holds' if good else 'FAILS'}: {claim}: {value:.3g}"


def short(value: float) -> str:
    """Three figures, for a label."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# Headings short enough for 80 columns.
_HEADINGS = {
    "bytes_sent_total": "MB, all",
    "seconds": "s",
    "lan_seconds": "LAN s",
    "wan_seconds": "WAN s",
    "sentences_per_second": "sentences/s",
    "compile_seconds": "compile s",
    "compile_cached_seconds": "cached s",
    "peak_memory_bytes": "peak MB",
    "client_bytes": "client MB",
    "bytes_per_layer": "MB/layer",
    "rounds_per_layer": "rounds/layer",
    "accuracy": "accuracy %",
    "score": "test %",
    "teacher_accuracy": "teacher %",
    "public_layers": "public layers",
    "mean_error": "mean error",
    "num_tokens": "tokens",
    "num_layers": "layers",
    "time_ratio": "time x",
    "bytes_ratio": "bytes x",
    "rounds_ratio": "rounds x",
    "lan_ratio": "LAN x",
    "wan_ratio": "WAN x",
}


# Send actions that are no rounds make these no more than an indication.
_OF_ROUNDS = ("rounds", "lan_seconds", "wan_seconds")
_INDICATIVE = "~: indicative, as the send actions of {} are not rounds"


def _indicative(record: Record) -> bool:
    protocol = secure.PROTOCOLS.get(record.get("protocol", ""))  # none of a peer's own
    return protocol is not None and not protocol.rounds_exact


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column in ("error", "mean_error"):
        return f"{value:.1g}"
    if column.endswith("bytes") or column in ("bytes_sent_total", "bytes_per_layer"):
        value = value / 1e6
    elif column == "score" or column.endswith("accuracy"):
        value = 100 * value
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _table(records: Sequence[Record], columns: Sequence[str]) -> list[list[str]]:
    """Heading and rows."""
    rows = [
        ["~" * (column in _OF_ROUNDS and _indicative(row)) + _cell(column, row.get(column)) for column in columns]
        for row in records
    ]
    return [[_HEADINGS.get(column, column) for column in columns], *rows]


def markdown(rows: list[list[str]]) -> str:
    """Rows, the first the heading, as a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def rich_table(rows: list[list[str]]) -> Table:
    """Rows, the first the heading, for the terminal."""
    table = Table(*(Column(name, overflow="fold") for name in rows[0]))
    for row in rows[1:]:
        table.add_row(*row)
    return table
