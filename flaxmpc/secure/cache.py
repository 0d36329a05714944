"""The cache folder, of compiled programs and what clients need of models: trusted, so nobody else may write there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
from pathlib import Path

from flaxmpc import files

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_dir() -> Path | None:
    """$FLAXMPC_CACHE, or a folder in the user's cache; None for a user without a home: nothing is kept then.

    Raises:
        ValueError: it is a link, belongs to another user, or others may write to it or put another in its place.
    """
    try:
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flaxmpc" / "programs"
    except RuntimeError:
        default = None
    own = os.environ.get("FLAXMPC_CACHE")
    folder = Path(own) if own else default
    if folder is not None and (reason := _untrusted(folder)):
        raise ValueError(f"the cache folder {folder} {reason}, or let FLAXMPC_CACHE name another")
    return folder


def _untrusted(folder: Path) -> str:
    """Why what is in a folder may be another's, and what to do; empty if it is not, or is not there."""
    try:
        found = folder.lstat()
    except OSError:
        found = None
    if found is not None:
        if stat.S_ISLNK(found.st_mode):
            return "is a link: give what it leads to"
        if found.st_uid not in _ours():
            return f"belongs to another user (id {found.st_uid}): remove it"
        if stat.S_ISDIR(found.st_mode) and found.st_mode & _OTHERS_WRITE:
            return f"may be written to by others (mode {stat.S_IMODE(found.st_mode):04o}): chmod go-w it"
    for parent in folder.absolute().parents:
        with contextlib.suppress(OSError):
            mode = parent.stat().st_mode
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                return f"is in {parent}, where anybody may put another in its place: chmod o-w that"
    return ""


def _ours() -> tuple[int, int]:
    return 0, os.geteuid()


def content_of(path: Path) -> bytes | None:
    """What is in a file of the cache. None: there is none, or it may be another's."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            trusted = stat.S_ISREG(found.st_mode) and found.st_uid in _ours() and not found.st_mode & _OTHERS_WRITE
            return file.read() if trusted else None
    except OSError:
        return None


def read(path: Path) -> bytes | None:
    """What `write` kept; None if there is none, or it is not whole, or may be another's."""
    content = content_of(path) or b""
    digest, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def write(path: Path, code: bytes) -> None:
    """Keeps code on disk, after its sha256; a cache that can't be written to is no reason to fail.

    Whatever the umask, others may not write to the folder or the file.
    """
    with contextlib.suppress(OSError):
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o755, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")  # not by tempfile: others may read a cache
        try:
            files.write_new(temporary, hashlib.sha256(code).digest() + code, 0o644)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
