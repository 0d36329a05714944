"""Files: those of others are read whole and up to a stated size, ours are written whole or not at all.

A folder that was downloaded may hold links, and its files may name paths: what they lead to would be read with our
rights, and a part of it published to clients. So a link is read only where the hub's client makes links itself.
"""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

JSON_BYTES = 4 << 20
"""The most that a file of settings has; a tokenizer's, or a table, may have more."""

# Of JSON: how deep it is nested, and how many lists and objects it has, which take 20 times their bytes when read.
_MOST_DEEP, _MOST_PARTS = 64, 2_000_000


def inside(path: Path, root: Path | None = None) -> Path:
    """The file itself, of a folder that somebody gave.

    Links are refused, but for those of a hub cache: there snapshots/COMMIT/... are links to blobs/ beside snapshots/.

    Args:
        path: the file.
        root: the folder that was given, which may be reached through links; by default the file's own.

    Raises:
        FileNotFoundError: it is not there, or a link leads to nothing.
        ValueError: a link, or in a folder within `root` that is one; or no regular file.
    """
    root = path.parent if root is None else root
    home = root.resolve()
    try:
        real = path.resolve(strict=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist{', it is a link to nothing' * path.is_symlink()}") from error
    except (OSError, RuntimeError) as error:  # links in a circle
        raise ValueError(f"{path} cannot be read: {error}") from error
    if real != home / path.relative_to(root) and real.parent not in _blobs(home):
        raise ValueError(
            f"{path} is a link to {real}: of a folder only its own files are read (in a hub cache, its blobs); "
            "put the file itself there"
        )
    if not real.is_file():  # a FIFO would be waited for
        raise ValueError(f"{path} is no regular file")
    return real


def _blobs(home: Path) -> list[Path]:
    """Where the links of a folder of a hub cache lead: models--OWNER--NAME/blobs for .../snapshots/COMMIT."""
    commits = [folder for folder in (home, *home.parents) if folder.parent.name == "snapshots"]
    return [commit.parents[1] / "blobs" for commit in commits if "--" in commit.parents[1].name]


def read(path: Path, most: int, root: Path | None = None) -> bytes:
    """The content of a file, see `inside`.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: see `inside`; or it has more than `most` bytes.
    """
    with inside(path, root).open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} has more than {most} bytes, the most that is read of it")
    return content


def read_json(path: Path, most: int = JSON_BYTES, root: Path | None = None) -> Any:
    """The value in a JSON file, see `read`.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: see `read`; or no JSON in UTF-8, or one that is nested deeply or takes much memory.
    """
    content = read(path, most, root)
    if (parts := content.count(b"[") + content.count(b"{")) > _MOST_PARTS:
        raise ValueError(f"{path} has {parts} lists and objects; at most {_MOST_PARTS} are read")
    try:
        value = json.loads(content.decode("utf-8"))
        if _levels(value) <= _MOST_DEEP:
            return value
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    except RecursionError:
        pass
    raise ValueError(f"{path} is nested more than {_MOST_DEEP} deep")


def read_object(path: Path, most: int = JSON_BYTES, root: Path | None = None, *, mend: str = "") -> dict[str, Any]:
    """The object in a JSON file; see `read_json`.

    Raises:
        ValueError: it holds something else; says how to `mend` that, where it is known.
    """
    try:
        value = read_json(path, most, root)
        if not isinstance(value, dict):
            raise ValueError(f"{path} holds no JSON object")
    except ValueError as error:
        raise ValueError(f"{error}: {mend}" if mend else str(error)) from error
    return value


def _levels(value: Any) -> int:
    """How deep lists and objects are nested; stops beyond the most."""
    count, level = 0, [value]
    while level := [part for part in level if isinstance(part, (dict, list))]:
        count += 1
        if count > _MOST_DEEP:
            break
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]
    return count


@contextlib.contextmanager
def replacing(path: Path, flags: int = os.O_TRUNC, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Gives a file to write, in place of one that is there, which stays until the new one is whole on the disk.

    One writer at a time. Where the block raises, nothing is written.

    Args:
        path: the file. Until it is whole it has the name PATH.new.
        flags: `os.O_EXCL` refuses to begin where PATH.new is there; by default what a killed writer left is in nobody's
            way.
        mode: the file's mode, but for what the umask takes.

    Raises:
        OSError: it cannot be written.
    """
    new = path.with_name(f"{path.name}.new")
    file = os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | flags, mode), "wb")
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    sync(path.parent)


def write(path: Path, content: bytes | str) -> None:
    """Writes a file as `replacing` does.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_new(path: Path, content: bytes, mode: int) -> None:
    """Writes a file that was not there, nor a link of that name; FileExistsError if it was."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)


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


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The folder is this run's, until the context or the process ends. A file FOLDER.lock beside it says whose it is.

    Raises:
        ValueError: another run has it; says which process, on which host.
        OSError: the file cannot be written, or the file system has no locks.
    """
    folder = folder.resolve()
    path = folder.with_name(f"{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(path.open("a+", encoding="utf-8", errors="replace"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                whose = file.read().strip() or "another process"
                raise ValueError(f"{whose} writes to {folder}: wait until it ends, or name another folder") from error
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break  # else it was removed meanwhile, by the run that had it
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        stack.callback(path.unlink, missing_ok=True)
        yield
