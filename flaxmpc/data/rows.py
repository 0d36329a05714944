"""Reads rows of text files, with the lines that they start on: CSV, TSV, JSONL, JSON. An error names the line.

`datasets` names no line, and copies the file into a cache; `csv` reads no field over 131,072 characters unless the
whole process allows it, and names no line of a quote left open. A line ends in LF or CR LF and nowhere else.
"""

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flaxmpc.errors import brief

_MOST_BYTES = 512 << 20  # of a file: its rows take several times as much memory

# Encodings by the mark at the start of a file. UTF-32's come first, as they start with those of UTF-16.
_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(file: Path) -> str:
    """Reads a file of UTF-8, without the mark that some programs put before it.

    Raises:
        ValueError: it is too large, empty, or no UTF-8 (names the line).
    """
    if (size := file.stat().st_size) > _MOST_BYTES:
        raise ValueError(f"{file} has {size} bytes; at most {_MOST_BYTES} are read")
    data = file.read_bytes()
    for mark, encoding in _ENCODINGS.items():
        if data.startswith(mark):
            raise ValueError(f"{file} is {encoding}: save it as UTF-8")
    text = decode(data, str(file))
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{file}, line {line}: a NUL byte, which UTF-16 has and text in UTF-8 has not")
    if not text.strip():
        raise ValueError(f"{file} is empty")
    return text


def decode(data: bytes, name: str) -> str:
    """Decodes UTF-8, without the mark that some programs put before it.

    Raises:
        ValueError: it is none; the message has `name` and the line.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name}, line {line}: not UTF-8 (byte {data[error.start]:#04x})") from error


def twice(names: Sequence[str]) -> str | None:
    """The first name that stands twice, for a message; None: none does."""
    if len(set(names)) == len(names):
        return None
    seen: set[str] = set()
    return next(brief(name) for name in names if name in seen or seen.add(name))


# ----------------------------------------------------------------------------------------------------------- CSV, TSV

_RETURN = "a carriage return without a line feed; a line ends in LF or CR LF"
_QUOTED = re.compile(r'"([^"]*(?:""[^"]*)*)"(?!")')
_FIELD = re.compile(rf'(?:{_QUOTED.pattern}|((?!")[^,\r\n]*))(,|\r?\n|\Z)')


def csv_rows(file: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of CSV: the line that each starts on, and its fields."""
    place, line = 0, 1
    while place < len(text):
        start, fields, end = line, [], ","
        quoted = None
        while end == ",":
            match = _FIELD.match(text, place)
            if match is None:
                raise ValueError(f"{file}, line {line}: {_what_is_no_field(text, place)}")
            quoted, plain, end = match.groups()
            fields.append(plain if quoted is None else quoted.replace('""', '"'))
            line += match[0].count("\n")
            place = match.end()
        if fields != [""] or quoted is not None:
            yield start, fields


def _what_is_no_field(text: str, place: int) -> str:
    if text[place] != '"':
        return _RETURN
    quoted = _QUOTED.match(text, place)
    if quoted is None:
        return "a quote opens here that never closes"
    return f"after the quoted field that starts here stands {text[quoted.end()]!r}, not a comma or the end of a line"


def tsv_rows(file: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of TSV: the line of each, and its fields, which are never quoted."""
    for line, row in enumerate(text.split("\n"), 1):
        row = row.removesuffix("\r")
        if "\r" in row:
            raise ValueError(f"{file}, line {line}: {_RETURN}")
        if row:
            yield line, row.split("\t")


# --------------------------------------------------------------------------------------------------------------- JSON

_SPACE = re.compile(r"[ \t\n\r]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if name := twice([name for name, _ in pairs]):
        raise ValueError(f"an object has the key {name} twice")
    return dict(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _value(text: str, place: int) -> tuple[Any, int]:
    """Reads the JSON value at a place. Returns it, and the place after it and the space that follows.

    Raises:
        ValueError: no JSON (then a JSONDecodeError), or what could not be used: a name twice, half a surrogate pair.
    """
    try:
        value, end = _DECODER.raw_decode(text, place)
        if _SURROGATE.search(text, place, end):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair, {error.object[error.start]!r}, is no character") from error
    return value, _skip(text, end)


def _skip(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    return match.end() if match else place


def jsonl_rows(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    """The rows of JSONL: the line of each, and its value."""
    for line, row in enumerate(text.split("\n"), 1):
        start = _skip(row, 0)
        if start == len(row):
            continue
        try:
            value, end = _value(row, start)
            if end < len(row):
                raise json.JSONDecodeError("Extra data", row, end)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {line}: not JSON: {error.msg}, column {error.colno}") from error
        except ValueError as error:
            raise ValueError(f"{file}, line {line}: {error}") from error
        yield line, value


def json_rows(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    """The values of a JSON list, read one by one: so the line is known that each starts on."""
    line, counted = 1, 0
    place = _skip(text, _skip(text, 0) + 1)
    more = text[place : place + 1] != "]"
    try:
        while more:
            line, counted = line + text.count("\n", counted, place), place
            value, place = _value(text, place)
            more = text[place : place + 1] == ","
            if not more and text[place : place + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
            yield line, value
            if more:
                place = _skip(text, place + 1)
        place = _skip(text, place + 1)
        if place < len(text):
            raise json.JSONDecodeError("Extra data", text, place)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {error.lineno}: not JSON: {error.msg}, column {error.colno}") from error
    except ValueError as error:
        raise ValueError(f"{file}, line {line}: {error}") from error
