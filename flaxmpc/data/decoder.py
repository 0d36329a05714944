"""Decodes Parquet and Arrow to plain columns, as a program that `columnar` runs. It imports nothing of this project.

    python decoder.py parquet|arrow BYTES FILE ...

writes one table of all the files to standard output, as Arrow's stream; or an error of one line to standard error.
"""

import contextlib
import json
import os
import resource
import sys
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MOST_ROWS, MOST_COLUMNS = 10_000_000, 1_000

UNREAD, CLASS_NAMES = b"flaxmpc.unread", b"flaxmpc.class_names"
"""Keys of metadata: a column's has its type, if it is not read; a table's the names of classes by column."""

_SECONDS = 300


def limit(most: int) -> None:
    """Lets this process have so many bytes more than it has, where the system counts them; and leave no core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (now + most, now + most))


def read(form: str, files: Sequence[str]) -> pa.Table:
    """Reads files into one table, one below the other.

    Columns are text, numbers, true and false, or null; any other is null throughout, with its type as metadata.

    Raises:
        ValueError: names the file that is damaged, too large or unlike the first.
        MemoryError: it does not fit.
    """
    tables: list[pa.Table] = []
    for file in files:
        try:
            tables.append(_plain(_FORMS[form](file)))
        except MemoryError:
            raise
        except Exception as error:  # whatever pyarrow or JSON raise on a damaged file
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"{file} cannot be read as {form.capitalize()}: {reason}") from error
        here, first = tables[-1].schema, tables[0].schema
        if not here.equals(first, check_metadata=True):
            other = os.path.basename(files[0])
            raise ValueError(f"{file} has other columns than {other}: {_shown(here)}, not {_shown(first)}")
    return pa.concat_tables(tables)


def _shown(schema: pa.Schema) -> str:
    names = ", ".join(f"{field.name} ({field.type})" for field in list(schema)[:20])
    return f"{names}, classes {schema.metadata[CLASS_NAMES].decode()}"[:500]


def _parquet(file: str) -> pa.Table:
    parquet = pq.ParquetFile(file)  # read_table makes a column a of a folder named a=b
    schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
    _check(schema, rows)
    wanted = [field.name for field in schema if _is_plain(field.type)]
    return _whole(parquet.read(columns=wanted, use_threads=False), schema, rows)


def _arrow(file: str) -> pa.Table:
    with pa.memory_map(file) as source:
        table = pa.ipc.open_stream(source).read_all()
    _check(table.schema, table.num_rows)
    return _whole(table, table.schema, table.num_rows)


_FORMS = {"parquet": _parquet, "arrow": _arrow}


def _check(schema: pa.Schema, rows: int) -> None:
    if rows > MOST_ROWS:
        raise ValueError(f"it has {rows} rows; at most {MOST_ROWS} are read")
    if len(schema) > MOST_COLUMNS:
        raise ValueError(f"it has {len(schema)} columns; at most {MOST_COLUMNS} are read")
    if len(set(schema.names)) < len(schema):
        raise ValueError("two columns have one name")


def _is_plain(type_: pa.DataType) -> bool:
    kinds = pa.types
    value = type_.value_type if kinds.is_dictionary(type_) else type_
    of = (kinds.is_string, kinds.is_large_string, kinds.is_integer, kinds.is_floating, kinds.is_boolean, kinds.is_null)
    return any(kind(value) for kind in of)


def _whole(table: pa.Table, schema: pa.Schema, rows: int) -> pa.Table:
    """The columns of a schema: those that are read from the table, the others null."""
    fields, columns = [], []
    for field in schema:
        plain = _is_plain(field.type)
        unread = pa.field(field.name, pa.null(), metadata={UNREAD: str(field.type)[:100]})
        fields.append(field if plain else unread)
        columns.append(table.column(field.name) if plain else pa.nulls(rows, pa.null()))
    return pa.table(columns, schema=pa.schema(fields, metadata=schema.metadata))


def _plain(table: pa.Table) -> pa.Table:
    """The table with the names of categories in place of their numbers, and of HF's metadata only names of classes."""
    table.validate(full=True)
    for place, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            column = table.column(place).cast(field.type.value_type)
            table = table.set_column(place, pa.field(field.name, column.type), column)
    found = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    fields = [field.with_metadata({UNREAD: (field.metadata or {}).get(UNREAD, b"")}) for field in table.schema]
    names = class_names(found.get("info", {}).get("features", {}))
    return table.cast(pa.schema(fields, metadata={CLASS_NAMES: json.dumps(names)}))


def class_names(features: Any) -> dict[str, list[str]]:
    """The names of classes in the features that `datasets` writes, by the column whose integers stand for them."""
    classes = {name: part for name, part in (features or {}).items() if isinstance(part, dict)}
    return {name: list(map(str, part["names"])) for name, part in classes.items() if part.get("_type") == "ClassLabel"}


def main() -> None:
    form, most, *files = sys.argv[1:]
    limit(int(most))
    try:
        table = read(form, files)
        with pa.ipc.new_stream(sys.stdout.buffer, table.schema) as writer:
            writer.write_table(table)
    except MemoryError:
        raise SystemExit(f"{files[0]} cannot be read as {form.capitalize()}: it takes more than {most} bytes") from None
    except ValueError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
