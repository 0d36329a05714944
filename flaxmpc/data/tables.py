"""Reads tables of labelled text from files: CSV, TSV, JSONL, JSON, CoNLL, Parquet, Arrow. Nothing is written beside
them.
"""

import dataclasses
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxmpc import files
from flaxmpc.data import columnar
from flaxmpc.data.rows import csv_rows, json_rows, jsonl_rows, read_text, tsv_rows, twice
from flaxmpc.errors import brief

ALL = ""
"""Stands in place of the name of a split, for a table that is not split yet."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns of equal length, and where each of their rows stands.

    Attributes:
        source: the file, or the split of a data set, that every message about a row starts with.
        columns: the columns by name; `column[:]` reads one whole.
        lines: the line of the file that each row starts on; None where rows have no lines.
        class_names: the names of classes, by the column whose integers stand for them.
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
    """Makes a table of a `datasets.Dataset`, whose columns are read when they are asked for."""
    import datasets

    features = dataset.features.items()
    return Table(
        source,
        {name: dataset[name] for name in dataset.column_names},
        class_names={name: tuple(part.names) for name, part in features if isinstance(part, datasets.ClassLabel)},
    )


def read(path: str | Path, splits: Container[str] | None = None, unnamed: Sequence[str] = ()) -> dict[str, Table]:
    """Reads a file or a folder: its tables by the name of their split; a single table that is not split is `ALL`.

    Args:
        path: a file (.csv, .tsv, .jsonl, .json, .conll, .parquet), a folder with such files whose names are those of
            splits (train.csv, dev.csv, test.csv, train-00000-of-00002.parquet), or a folder of `datasets.save_to_disk`.
        splits: the names of the files of a folder that are read; None: all.
        unnamed: the columns of CSV and TSV files that come without a line of names: those whose first line has as many
            fields, but none of these names.

    CSV and TSV start with a line of column names; CSV is quoted as usual, TSV is never quoted, as GLUE's. JSONL is one
    object a line, JSON a list of objects. Text is UTF-8. A line ends in LF or CR LF and nowhere else; in CSV and TSV a
    blank one is no row. A carriage return on its own is text within the quotes of CSV, and refused elsewhere. CoNLL has
    a word and its tag on a line, first and last of fields that tabs or spaces part, and a blank line after a sentence:
    a row of the columns tokens and tags, each a list.

    Raises:
        FileNotFoundError: there is no such path, or nothing in the folder that could be read.
        ValueError: a file that is broken; names the file, and for text the line.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file():
        return {ALL: _read_file(path, unnamed)}
    if not path.is_dir():
        raise ValueError(f"{path} is neither a file nor a folder")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _read_saved(path)
    found = _by_split(path)
    if not found:
        raise FileNotFoundError(
            f"{path} has neither files of data ({', '.join(sorted(_READERS))}) nor what datasets.save_to_disk writes"
        )
    tables = {}
    for split, parts in sorted(found.items()):
        if splits is not None and split not in splits:
            continue
        names = ", ".join(part.name for part in parts)
        if len(parts) > 1 and {part.suffix.lower() for part in parts} != {".parquet"}:
            raise ValueError(f"{path} has {len(parts)} files for the split {split}: {names}; one is needed")
        if not _whole(parts):
            raise ValueError(f"{path} has not one file, or every shard once, for the split {split}: {names}")
        for part in parts:
            files.inside(part, path)
        tables[split] = _read_file(parts[0], unnamed) if len(parts) == 1 else _read_parquet(parts)
    if not tables:
        raise FileNotFoundError(f"{path} has no file that is named as a split, such as train.csv: {', '.join(found)}")
    return tables


_SHARD = re.compile(r"-(\d+)-of-(\d+)$")


def _by_split(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder that can be read, by their names without suffix and number of shard."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in _READERS and not file.is_dir():  # a link to nothing is an error when it is read
            found.setdefault(_SHARD.sub("", file.stem).lower(), []).append(file)
    return found


def _whole(parts: Sequence[Path]) -> bool:
    """Whether a split's files are one file, or each of its shards once."""
    shards = [match.groups() for part in parts if (match := _SHARD.search(part.stem))]
    numbers = sorted((int(number), int(count)) for number, count in shards)
    return numbers == [(number, len(parts)) for number in range(len(parts))] or (len(parts) == 1 and not shards)


def _read_file(file: Path, unnamed: Sequence[str]) -> Table:
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise ValueError(f"{file} is none of the formats that can be read: {', '.join(sorted(_READERS))}")
    return reader(file, unnamed)


def _fields(file: Path, rows: Iterable[tuple[int, list[str]]], unnamed: Sequence[str]) -> Table:
    """Makes a table of rows of fields. The first names the columns, unless `unnamed` does."""
    lines, found = zip(*rows, strict=True)
    if len(found[0]) == len(unnamed) and not set(found[0]) & set(unnamed):
        names = unnamed
    else:
        names, found, lines = found[0], found[1:], lines[1:]
    if name := twice(names):
        raise ValueError(f"{file}: two columns are named {name}")
    for line, fields in zip(lines, found, strict=True):
        if len(fields) != len(names):
            raise ValueError(f"{file}, line {line}: {len(fields)} fields, but the first line has {len(names)}")
    columns = zip(*found, strict=True) if found else [()] * len(names)
    return Table(str(file), dict(zip(names, columns, strict=True)), list(lines))


_MOST_COLUMNS = 1_000


def _objects(file: Path, rows: Iterable[tuple[int, Any]]) -> Table:
    """Makes a table of JSON objects; what an object lacks is None."""
    names: dict[str, None] = {}
    found, lines = [], []
    for line, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {line}: not a JSON object with the columns as keys")
        names.update(dict.fromkeys(row))
        if len(names) > _MOST_COLUMNS:  # every row has all
            raise ValueError(f"{file}, line {line}: more than {_MOST_COLUMNS} columns")
        found.append(row)
        lines.append(line)
    if found and not names:
        raise ValueError(f"{file}, line {lines[0]}: rows without a column")
    return Table(str(file), {name: [row.get(name) for row in found] for name in names}, lines)


def _read_json(file: Path) -> Table:
    """Reads a list of objects; or JSONL, which often is named .json too."""
    text = read_text(file)
    rows = json_rows if text.lstrip(" \t\r\n").startswith("[") else jsonl_rows
    return _objects(file, rows(file, text))


def _read_conll(file: Path) -> Table:
    """Reads sentences of words with tags. A line -DOCSTART- begins a document, and is no word."""
    found: list[tuple[int, list[str], list[str]]] = []
    goes_on = False
    for number, line in enumerate(read_text(file).split("\n"), 1):
        line = line.removesuffix("\r")
        fields = line.split("\t") if "\t" in line else line.split(" ")
        if not line.strip() or fields[0] == "-DOCSTART-":
            goes_on = False
            continue
        if len(fields) < 2 or not fields[0].strip() or not fields[-1].strip():
            raise ValueError(f"{file}, line {number}: {brief(line)} is no word and tag, with a tab or space between")
        if not goes_on:
            found.append((number, [], []))
        goes_on = True
        found[-1][1].append(fields[0])
        found[-1][2].append(fields[-1])
    lines, words, tags = zip(*found, strict=True) if found else ((), (), ())
    return Table(str(file), {"tokens": list(words), "tags": list(tags)}, list(lines))


def _read_parquet(parts: Sequence[Path]) -> Table:
    """Reads a file, or all shards of a split, as one table."""
    source = str(parts[0]) if len(parts) == 1 else f"{parts[0]} and shards"
    found = columnar.read("parquet", parts)
    return Table(source, found.columns, class_names=found.class_names)


def _read_saved(folder: Path) -> dict[str, Table]:
    """Reads a folder that `datasets.save_to_disk` wrote: its tables by the name of their split."""
    try:
        splits = ("",)
        if (folder / "dataset_dict.json").is_file():
            splits = _names(files.read_object(folder / "dataset_dict.json").get("splits"))
        return {split: _read_split(folder, folder / split) for split in splits}
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} cannot be read as a folder of datasets.save_to_disk: {reason}") from error


def _read_split(folder: Path, split: Path) -> Table:
    """Reads a split of such a folder: the Arrow files that its state names, and its features' names of classes."""
    from flaxmpc.data import decoder

    state = files.read_object(split / "state.json", root=folder)
    named = state.get("_data_files")
    data: list[Any] = named if isinstance(named, list) else [None]
    if not all(isinstance(each, dict) for each in data) or state.get("_indices_data_files"):
        raise ValueError(f"{split / 'state.json'} names no data files, or an order of their rows: save it anew")
    parts = [files.inside(split / name, folder) for name in _names([each.get("filename") for each in data])]
    features = files.read_object(split / "dataset_info.json", root=folder).get("features")
    try:
        names = decoder.class_names(features)
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{split / 'dataset_info.json'}: features are {brief(features)}") from error
    found = columnar.read("arrow", parts)
    return Table(str(split), found.columns, class_names={name: tuple(of) for name, of in names.items()})


def _names(names: Any) -> list[str]:
    """The names that a file of a folder gives. ValueError: no list of names of what stands in the folder itself."""
    if not isinstance(names, list) or not names:
        raise ValueError(f"{brief(names)} is no list of names")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"it names {brief(name)}: all of it stands in its folder")
    return names


_READERS: dict[str, Callable[[Path, Sequence[str]], Table]] = {
    ".csv": lambda file, unnamed: _fields(file, csv_rows(file, read_text(file)), unnamed),
    ".tsv": lambda file, unnamed: _fields(file, tsv_rows(file, read_text(file)), unnamed),
    ".jsonl": lambda file, unnamed: _objects(file, jsonl_rows(file, read_text(file))),
    ".json": lambda file, unnamed: _read_json(file),
    ".conll": lambda file, unnamed: _read_conll(file),
    ".parquet": lambda file, unnamed: _read_parquet([file]),
}
