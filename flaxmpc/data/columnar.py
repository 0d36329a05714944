"""Reads columns of Parquet and Arrow files, which a process of its own decodes.

A file of 0.1 MB may hold 5 GB, and say otherwise; and what is damaged may end the process that decodes it. So that one
has a limit of memory, and hands over what it found without compression.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Bytes of memory for each byte of a file, as text is rarely packed more than tenfold; and the least for any file.
_TIMES, _LEAST_BYTES = 20, 256 << 20

# The decoder's own threads and pools would take of its memory.
_SINGLE = {"ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Column:
    """A column of text, numbers, true and false; read when it is asked for."""

    def __init__(self, name: str, values: Any, unread: str):
        """`name` is the column's, with its file, for a message. `unread` is its type, if it is none of the above."""
        self._name, self._values, self._unread = name, values, unread

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, rows: slice) -> list[Any]:
        """ValueError: its type is none of the above."""
        if self._unread:
            raise ValueError(f"{self._name} is {self._unread}; text, numbers, true and false are read")
        return self._values[rows].to_pylist()


class Columns(NamedTuple):
    """Columns by name, and the names of classes of those whose integers stand for one."""

    columns: dict[str, Column]
    class_names: Mapping[str, tuple[str, ...]]


def read(form: str, files: Sequence[Path]) -> Columns:
    """Reads files of one form, "parquet" or "arrow" (the stream that `datasets` saves), one below the other.

    Raises:
        ValueError: a file that is damaged, unlike the first, or takes more memory than 20 times its size and 256 MB.
    """
    import pyarrow as pa

    from flaxmpc.data import decoder

    most = _LEAST_BYTES + _TIMES * sum(file.stat().st_size for file in files)
    command = [sys.executable, "-I", "-W", "ignore", decoder.__file__, form, str(most), *map(os.fspath, files)]
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env={**os.environ, **_SINGLE}
        ) as process:
            assert process.stdout is not None
            try:
                table = pa.ipc.open_stream(process.stdout).read_all()
            except (pa.ArrowInvalid, OSError):  # it ended before
                table = None
        if table is None or process.returncode:
            errors.seek(0)
            said = errors.read().decode(errors="replace").splitlines()
            code = process.returncode
            ended = f"{files[0]} cannot be read as {form.capitalize()}: it is damaged, or takes more than {most} bytes"
            raise ValueError(said[-1] if said and code == 1 else f"{ended} (its reader ended with {code})")
    names = json.loads(table.schema.metadata[decoder.CLASS_NAMES])
    columns = {
        field.name: Column(
            f"{files[0]}: column {field.name}", table.column(place), field.metadata[decoder.UNREAD].decode()
        )
        for place, field in enumerate(table.schema)
    }
    return Columns(columns, {name: tuple(of) for name, of in names.items()})
