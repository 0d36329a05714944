"""A party's shares on its own disk, encrypted: after a restart the parties go on without the owner."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
from nacl import bindings as sodium
from nacl.exceptions import CryptoError

from flaxmpc import files
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.cluster import ClusterFile, PartyEntry

KEY_VARIABLE = "FLAXMPC_SHARES_KEY"

_MAGIC = b"flaxmpc-shares-3"
_LENGTH_BYTES = 4
_PIECE = 1 << 20
_TAG_BYTES = sodium.crypto_secretstream_xchacha20poly1305_ABYTES
# How a piece ends.
_MORE = sodium.crypto_secretstream_xchacha20poly1305_TAG_MESSAGE
_RECORD = sodium.crypto_secretstream_xchacha20poly1305_TAG_PUSH
_FILE = sodium.crypto_secretstream_xchacha20poly1305_TAG_FINAL

_AGAIN = "remove the file and let the owner put the model again"


class KeptShares:
    """A folder with a file per put of a model: its header, its bundle, and this party's shares of its weights.

    MODEL.shares is the put that is served. MODEL.HASH.staged is one that may take its place, by a change of its name.

    A file is records, in pieces of at most 1 MiB, as one stream of libsodium (secretstream, XChaCha20-Poly1305). It
    numbers the pieces and marks the ends of a record and of the file: nothing can be changed, reordered or cut.

    Attributes:
        models: hash of the put that is served, by name.
    """

    def __init__(self, folder: Path, key: bytes):
        """Makes the folder (mode 0700) if need be, and checks all that is in it.

        Args:
            folder: this party's alone.
            key: this party's, 32 bytes.

        Raises:
            ValueError: a file that is damaged, no regular one, renamed, or was written with another key.
            OSError: the folder can't be written to.
        """
        self._folder = folder
        self._key = key
        self.models: dict[str, str] = {}
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for unfinished in folder.glob("*.new"):
            unfinished.unlink()
        for path in sorted([*folder.glob("*.shares"), *self._staged()]):
            header, _, weights = self._read(path)
            for _ in weights:
                pass
            if path == self._path(header.name):
                self.models[header.name] = header.hash
            elif path != self._path(header.name, header.hash):
                raise ValueError(f"{path} holds put {header.hash[:16]} of model {header.name!r}: its name was changed")

    @classmethod
    def of(cls, cluster: ClusterFile, entry: PartyEntry) -> KeptShares | None:
        """Opens a party's folder as cluster.toml says; None if it keeps nothing.

        The key is taken out of the environment, so that no child process has it.

        Raises:
            ValueError: no key, none of 64 hex digits, or one that nobody drew at random; or as `KeptShares` raises it.
        """
        text, source = os.environ.pop(KEY_VARIABLE, None), KEY_VARIABLE
        if entry.keep_shares is None:
            return None
        if entry.shares_key is not None:
            content = cluster.read_file(entry.shares_key, secret=True)
            text, source = content.decode("ascii", "replace"), entry.shares_key
        if text is None:
            raise ValueError(
                f"party {entry.rank} keeps its shares in {entry.keep_shares}, but has no key for them: "
                f"say shares_key in {cluster.path.name}, or set {KEY_VARIABLE}"
            )
        try:
            key = bytes.fromhex(text)
        except ValueError:
            key = b""
        if len(key) != 32:
            raise ValueError(f"{source} holds no key of 64 hex digits, as `openssl rand -hex 32` makes")
        if not _drawn(key):
            raise ValueError(f"{source} holds a key that can be guessed: make one with `openssl rand -hex 32`")
        return cls(cluster.file(entry.keep_shares), key)

    def stage(self, header: m.Publish, bundle: bytes, weights: Iterable[m.Put]) -> None:
        """Keeps a put that is not served yet; the file is there whole (mode 0600) or not at all.

        `weights` are those that the header names.
        """
        with files.replacing(self._path(header.name, header.hash), os.O_EXCL, 0o600) as file:
            stream = sodium.crypto_secretstream_xchacha20poly1305_state()
            file.write(_MAGIC + sodium.crypto_secretstream_xchacha20poly1305_init_push(stream, self._key))
            contents = itertools.chain((m.encode(header), bundle), (m.encode(weight) for weight in weights))
            for piece, mark in _pieces(contents, 2 + len(header.weights)):
                encrypted = sodium.crypto_secretstream_xchacha20poly1305_push(stream, piece, tag=mark)
                file.write(len(encrypted).to_bytes(_LENGTH_BYTES, "big") + encrypted)

    def commit(self, name: str, hash_: str) -> None:
        """Puts a staged put in the place of the one that is served. OSError: it is not there, or the disk can't."""
        os.replace(self._path(name, hash_), self._path(name))
        self.models[name] = hash_
        files.sync(self._folder)

    def discard(self, name: str, hash_: str) -> None:
        """Removes a staged put, which may be gone already."""
        with contextlib.suppress(OSError):  # then `sweep` does it
            self._path(name, hash_).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes all that is staged."""
        for path in self._staged():
            with contextlib.suppress(OSError):
                path.unlink()

    def read(self, name: str) -> tuple[m.Publish, bytes, Iterator[m.Put]]:
        """The put that is served, as `stage` was given it; the shares one by one.

        Raises:
            ValueError: damaged meanwhile, or of another version of flaxmpc.
            OSError: it is not there.
        """
        return self._read(self._path(name))

    def _read(self, path: Path) -> tuple[m.Publish, bytes, Iterator[m.Put]]:
        records = self._records(path)

        def decode(kind: type[m.T]) -> m.T:
            try:
                return m.decode(next(records), kind)
            except msgspec.MsgspecError as error:
                raise ValueError(f"{path} is of another version of flaxmpc: {_AGAIN}") from error

        header = decode(m.Publish)
        return header, next(records), (decode(m.Put) for _ in header.weights)

    def _records(self, path: Path) -> Iterator[bytes]:
        """A file's records, decrypted. ValueError: it is damaged, no regular one, or of another key or version."""
        if not stat.S_ISREG(path.lstat().st_mode):  # a pipe would be waited for
            raise ValueError(f"{path} is no regular file: remove it")
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ValueError(f"{path} is of another version of flaxmpc, or is damaged: {_AGAIN}")
            try:
                yield from _decrypted(file, self._key)
            except CryptoError as error:
                reason = f"is damaged, or was written with another key: give the right key, or {_AGAIN}"
                raise ValueError(f"{path} {reason}") from error

    def _path(self, name: str, staged: str | None = None) -> Path:
        """The file of the put of a model that is served, or of a staged one by its hash."""
        return self._folder / (f"{name}.shares" if staged is None else f"{name}.{staged}.staged")

    def _staged(self) -> list[Path]:
        return list(self._folder.glob("*.staged"))


def _decrypted(file: BinaryIO, key: bytes) -> Iterator[bytes]:
    """The records of a stream that has come to its header. CryptoError: it is not whole, or of another key."""
    stream = sodium.crypto_secretstream_xchacha20poly1305_state()
    header = file.read(sodium.crypto_secretstream_xchacha20poly1305_HEADERBYTES)
    sodium.crypto_secretstream_xchacha20poly1305_init_pull(stream, header, key)
    record, mark = bytearray(), _MORE
    while mark != _FILE:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "big")
        if length > _PIECE + _TAG_BYTES:
            raise CryptoError("a piece is longer than any that is written")
        piece, mark = sodium.crypto_secretstream_xchacha20poly1305_pull(stream, file.read(length))
        record += piece
        if mark == _FILE and file.read(1):
            raise CryptoError("something follows the end")
        if mark != _MORE:
            yield bytes(record)
            record.clear()


def _pieces(records: Iterable[bytes], count: int) -> Iterator[tuple[bytes, int]]:
    """The pieces of `count` records, each with its mark."""
    for number, record in enumerate(records, 1):
        for start in range(0, max(1, len(record)), _PIECE):
            ends = start + _PIECE >= len(record)
            yield record[start : start + _PIECE], _MORE if not ends else _RECORD if number < count else _FILE


def _drawn(key: bytes) -> bool:
    """Whether 32 bytes may be random: such, and the steps between them, all but never have 15 values or fewer."""
    steps = {(after - before) % 256 for before, after in itertools.pairwise(key)}
    return min(len({*key}), len(steps)) > 15
