"""Tables of labelled text from files: CSV, TSV, JSONL, JSON, Parquet, Arrow. Nothing is written beside them.

Text formats are parsed here and not by `datasets`, which names no line when a row is broken and copies the file into
a cache.
"""

import csv
import dataclasses
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ALL = ""
"""In place of the name of a split: a table that is not split yet."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns of equal length, and where each of their rows stands.

    Attributes:
        source: a file, or a split of a data set; starts every message about a row.
        columns: by name; `column[:]` reads one whole.
        lines: the line of the file that a row starts on; None where rows have no lines.
        class_names: of the columns whose integers stand for classes with names.
    """

    source: str
    columns: Mapping[str, Any]
    lines: Sequence[int] | None = None
    class_names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def at(self, row: int) -> str:
        """Where a row stands, for a message."""
        return f"{self.source}, row {row} (from 0)" if self.lines is None else f"{self.source}, line {self.lines[row]}"


def from_dataset(dataset: Any, source: str) -> Table:
    """The table of a `datasets.Dataset`. Its columns are read when they are asked for."""
    import datasets

    features = dataset.features.items()
    return Table(
        source,
        {name: dataset[name] for name in dataset.column_names},
        class_names={name: tuple(part.names) for name, part in features if isinstance(part, datasets.ClassLabel)},
    )


def read(path: str | Path) -> dict[str, Table]:
    """The tables of a path by the name of their split; a single table that is not split is `ALL`.

    Args:
        path: a file (.csv, .tsv, .jsonl, .json, .parquet), a folder with such files whose names are those of splits
            (train.csv, dev.csv, test.csv, train-00000-of-00002.parquet), or a folder of `datasets.save_to_disk`.

    CSV and TSV start with a line of column names; CSV is quoted as usual, TSV is never quoted, as GLUE's. JSONL is one
    object a line, JSON a list of objects. Text is UTF-8.

    Raises:
        FileNotFoundError: there is no such path, or nothing in the folder that could be read.
        ValueError: a file that is broken; names the file, and for text the line.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file():
        return {ALL: _read_file(path)}
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _read_saved(path)
    tables = {}
    for split, files in sorted(_by_split(path).items()):
        if all(file.suffix.lower() == ".parquet" for file in files):
            tables[split] = _read_parquet(files)
        elif len(files) == 1:
            tables[split] = _read_file(files[0])
        else:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"{path} has {len(files)} files for the split {split}: {names}; one is needed")
    if not tables:
        raise FileNotFoundError(
            f"{path} has neither files of data ({', '.join(sorted(_READERS))}) nor what datasets.save_to_disk writes"
        )
    return tables


def _by_split(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder that can be read, by their names without suffix and number of shard."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in _READERS and file.is_file():
            split = re.sub(r"-\d+-of-\d+$", "", file.stem.lower())
            found.setdefault(split, []).append(file)
    return found


def _read_file(file: Path) -> Table:
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise ValueError(f"{file} is none of the formats that can be read: {', '.join(sorted(_READERS))}")
    return reader(file)


def _read_text(file: Path) -> str:
    """The text of a file, without the mark that some programs put before UTF-8."""
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: not UTF-8 (byte {data[error.start]:#04x})") from error
    if not text.strip():
        raise ValueError(f"{file} is empty")
    return text


def _read_csv(file: Path, **dialect: Any) -> Table:
    reader = csv.reader(io.StringIO(_read_text(file), newline=""), strict=True, **dialect)
    rows: list[list[str]] = []
    lines: list[int] = []
    line = 1
    try:
        for fields in reader:
            if rows and fields and len(fields) != len(rows[0]):
                raise ValueError(
                    f"{file}, line {line}: {len(fields)} fields, but the first line names {len(rows[0])} columns"
                )
            if fields:  # a blank line is no row
                rows.append(fields)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{file}, line {line}: {error}") from error
    names, *rows = rows
    if len(set(names)) < len(names):
        raise ValueError(f"{file}, line {lines[0]}: a column name stands twice in {', '.join(names)}")
    columns = zip(*rows, strict=True) if rows else [()] * len(names)
    return Table(str(file), dict(zip(names, columns, strict=True)), lines[1:])


def _read_tsv(file: Path) -> Table:
    return _read_csv(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _objects(file: Path, rows: Sequence[Any], lines: Sequence[int] | None) -> Table:
    """The table of JSON objects; what an object lacks is None."""
    names: dict[str, None] = {}
    table = Table(str(file), {}, lines)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{table.at(number)}: not a JSON object with the columns as keys")
        names.update(dict.fromkeys(row))
    return dataclasses.replace(table, columns={name: [row.get(name) for row in rows] for name in names})


def _read_jsonl(file: Path) -> Table:
    rows, lines = [], []
    for line, text in enumerate(_read_text(file).split("\n"), 1):
        if text.strip():
            try:
                rows.append(json.loads(text))
            except ValueError as error:
                raise ValueError(f"{file}, line {line}: not JSON: {error}") from error
            lines.append(line)
    return _objects(file, rows, lines)


def _read_json(file: Path) -> Table:
    """A list of objects; or JSONL, which often is named so too."""
    text = _read_text(file)
    if not text.lstrip().startswith("["):
        return _read_jsonl(file)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {error.lineno}: not JSON: {error.msg}") from error
    return _objects(file, rows, None)


def _read_parquet(files: Sequence[Path]) -> Table:
    """The table of a file, or of all shards of a split."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets.table import InMemoryTable

    shards = []
    for file in files:
        try:
            shards.append(pq.read_table(file))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file} cannot be read as Parquet: {error}") from error
    try:
        table = InMemoryTable(pa.concat_tables(shards))
    except pa.ArrowException as error:
        raise ValueError(f"the shards from {files[0]} on have different columns: {error}") from error
    return from_dataset(datasets.Dataset(table), str(files[0]) if len(files) == 1 else f"{files[0]} and shards")


def _read_saved(folder: Path) -> dict[str, Table]:
    """What `datasets.save_to_disk` wrote; mapped into memory, not copied."""
    import datasets

    try:
        saved: Any = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever datasets, pyarrow or JSON raise on a damaged folder
        raise ValueError(f"{folder} cannot be read as a folder of datasets.save_to_disk: {error}") from error
    if not isinstance(saved, datasets.DatasetDict):
        return {ALL: from_dataset(saved, str(folder))}
    return {str(split): from_dataset(dataset, str(folder / str(split))) for split, dataset in saved.items()}


_READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": lambda file: _read_parquet([file]),
}
