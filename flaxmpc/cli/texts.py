"""Reads the texts for `infer`: from the command line, a file or standard input. Each is known by where it stands."""

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flaxmpc.data.batches import Text
from flaxmpc.data.rows import decode
from flaxmpc.errors import unknown

TEXT = "text"
FORMATS = (TEXT, "csv", "tsv", "jsonl", "json", "parquet")


class Given(NamedTuple):
    """Texts, or pairs of them, and where each stands, for a message."""

    texts: list[Text]
    places: list[str]

    def __add__(self, other: "Given") -> "Given":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Given(self.texts + other.texts, self.places + other.places)


def of_arguments(texts: Sequence[str], pairs: Sequence[tuple[str, str]] = ()) -> Given:
    """Takes the texts, and pairs of texts, that stand on the command line.

    Raises:
        ValueError: an argument whose bytes are not UTF-8.
    """
    places = [f"text {number}" for number in range(1, len(texts) + 1)]
    places += [f"pair {number}" for number in range(1, len(pairs) + 1)]
    given = Given([*texts, *pairs], places)
    for place, text in zip(places, given.texts, strict=True):
        for side in (text,) if isinstance(text, str) else text:
            for character in side:
                if "\udc80" <= character <= "\udcff":  # how Python hands over a byte that it can't decode
                    raise ValueError(f"{place} is not UTF-8: it has the byte {ord(character) - 0xDC00:#04x}")
    return given


def of_file(file: Path, format_: str | None = None, columns: Sequence[str] = ()) -> Given:
    """Reads the texts of a file.

    In plain text each line that is not blank is a text; a line ends in LF or CR LF and nowhere else. The other formats
    are tables, see `flaxmpc.data.tables.read`.

    Args:
        file: the file; "-" is standard input. Its suffix says the format, unless `format_` does: none, as .txt, is
            plain text.
        format_: one of `FORMATS`.
        columns: a table's column of texts, or two of pairs; by default the first usual names that it has.

    Raises:
        ValueError: a file that can't be read, is broken or holds no text, with the line where there is one; an unknown
            format; columns that a table does not have.
    """
    name = "standard input" if str(file) == "-" else str(file)
    suffix = file.suffix.lower().removeprefix(".")
    if format_ is None:
        format_ = TEXT if suffix in ("", "txt") else suffix
        if format_ not in FORMATS:
            known = ", ".join(FORMATS)
            raise ValueError(f"{name}: what is {file.suffix}? Say --format, one of {known}")
    if format_ not in FORMATS:
        raise unknown("format", format_, FORMATS)
    if format_ == TEXT and columns:
        raise ValueError(f"{name} is plain text, it has no columns {' and '.join(columns)}")
    given = _lines(file, name) if format_ == TEXT else _table(file, format_, name, columns)
    if not given.texts:
        raise ValueError(f"{name} holds no text")
    return given


def _read(file: Path, name: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error


def _lines(file: Path, name: str) -> Given:
    given = Given([], [])
    for number, line in enumerate(decode(_read(file, name), name).split("\n"), 1):
        line = line.removesuffix("\r")
        for mark, what in (("\r", "a carriage return without a line feed"), ("\0", "a NUL byte")):
            if mark in line:
                raise ValueError(f"{name}, line {number}: {what}; plain text is UTF-8, a line ends in LF or CR LF")
        if line.strip():
            given.texts.append(line)
            given.places.append(f"{name}, line {number}")
    return given


def _table(file: Path, format_: str, name: str, columns: Sequence[str]) -> Given:
    # Imported here: for texts on the command line they are not needed.
    from flaxmpc.data import tables
    from flaxmpc.data.columns import require, text_columns, texts

    if file.is_dir():
        raise ValueError(f"{name} is a folder, not a file")
    with tempfile.TemporaryDirectory() as directory:
        if str(file) == "-" or file.suffix.lower() != f".{format_}":  # readers go by the suffix
            content, file = _read(file, name), Path(directory) / f"table.{format_}"
            file.write_bytes(content)
        try:
            table = dataclasses.replace(tables.read(file)[tables.ALL], source=name)
        except ValueError as error:
            raise ValueError(str(error).replace(str(file), name)) from error
    only = tuple(table.columns) if len(table.columns) == 1 else ()
    columns = text_columns(table, columns or only)
    require(table, columns)
    return Given(texts(table, columns), [table.at(row) for row in range(len(table))])
