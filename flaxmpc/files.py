"""Files that are there whole or not at all, whenever the process is killed, and JSON whose errors name the file."""

import json
import os
from pathlib import Path
from typing import Any


def write(path: Path, content: bytes | str) -> None:
    """Writes a file, in place of one that is there, which stays until the new one is whole on the disk.

    One writer at a time.

    Raises:
        OSError: it cannot be written.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Returns when the file, or the names in the folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes an object as `write` does, indented. ValueError: a number that JSON has not."""
    write(path, json.dumps(record, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, mend: str = "restore it from a copy, or make its folder anew") -> dict[str, Any]:
    """The object in a file.

    Args:
        path: the file.
        mend: what to do about a damaged one, for the error.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds no JSON object; names the file.
    """
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): {mend}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} is damaged (it holds no JSON object): {mend}")
    return record
