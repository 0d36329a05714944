"""The small files of a cluster, such as certificates and keys: read if they are what they should be."""

import os
import stat
from pathlib import Path

_LARGEST = 1 << 20


def read(path: Path, *, secret: bool = False) -> bytes:
    """A file's content, of at most 1 MiB.

    Args:
        path: the file, or a link to it, as a secret store makes them.
        secret: whether others may not even read it; where root owns it, its group may.

    Raises:
        OSError: it is not there, or may not be read.
        ValueError: it is another thing than a file (a pipe would never end), or larger, or others may change it.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path} is not a file")
        if found.st_size > _LARGEST:
            raise ValueError(f"{path} has {found.st_size} bytes, more than {_LARGEST}")
        mode = f"(mode {stat.S_IMODE(found.st_mode):04o})"
        if secret and found.st_mode & (0o027 if found.st_uid == 0 else 0o077):
            raise ValueError(f"{path} is secret, but others may read it {mode}: chmod 600 {path}")
        if found.st_mode & stat.S_IWOTH:
            raise ValueError(f"anybody may change {path} {mode}: chmod o-w {path}")
        return file.read(_LARGEST)
