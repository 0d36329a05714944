"""A party's shares on its own disk, encrypted: after a restart the parties go on without the owner."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.cluster import ClusterFile, PartyEntry

KEY_VARIABLE = "FLAXMPC_SHARES_KEY"

_MAGIC = b"flaxmpc-shares-2"
_SALT_BYTES = 32
_LENGTH_BYTES = 4
_PIECE = 1 << 20
_TAG_BYTES = 16
# How a piece ends; the byte before it.
_MORE, _RECORD, _FILE = b"\0", b"\1", b"\2"

_AGAIN = "remove the file and let the owner put the model again"


class KeptShares:
    """A folder with a file per put of a model: its header, its bundle, and this party's shares of its weights.

    MODEL.shares is the put that is served. MODEL.HASH.staged is one that may take its place, by a change of its name.

    A file is records, in pieces of at most 1 MiB, each encrypted with AES-256-GCM under a key of the file's own:
    HKDF-SHA256 of the party's key and a random salt. The nonce is the piece's number, and the ends of a record and of
    the file are marked: nothing can be changed, reordered or cut.

    Attributes:
        models: hash of the put that is served, by name.
    """

    def __init__(self, folder: Path, key: bytes):
        """Makes the folder (mode 0700) if need be, and checks all that is in it.

        Args:
            folder: of this party alone.
            key: 32 bytes.

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
        """What cluster.toml says of a party. Takes the key from the environment, so that no child process has it.

        Raises:
            ValueError: no key, none of 64 hex digits, or one that nobody drew at random; or see above.
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
        path = self._path(header.name, header.hash)
        new = path.with_name(f"{path.name}.new")
        file = os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        try:
            with file:
                salt = secrets.token_bytes(_SALT_BYTES)
                file.write(_MAGIC + salt)
                cipher = self._cipher(salt)
                contents = itertools.chain((m.encode(header), bundle), (m.encode(weight) for weight in weights))
                for number, (piece, mark) in enumerate(_pieces(contents, 2 + len(header.weights))):
                    encrypted = cipher.encrypt(_nonce(number), piece, mark)
                    file.write(mark + len(encrypted).to_bytes(_LENGTH_BYTES, "big") + encrypted)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
            self._sync()
        finally:
            new.unlink(missing_ok=True)

    def commit(self, name: str, hash_: str) -> None:
        """A staged put takes the place of the one that is served. OSError: it is not there, or the disk can't."""
        os.replace(self._path(name, hash_), self._path(name))
        self.models[name] = hash_
        self._sync()

    def discard(self, name: str, hash_: str) -> None:
        """A staged put is not needed; it may be gone already."""
        with contextlib.suppress(OSError):  # then `sweep` does it
            self._path(name, hash_).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes all that is staged."""
        for path in self._staged():
            with contextlib.suppress(OSError):
                path.unlink()

    def read(self, name: str) -> tuple[m.Publish, bytes, Iterator[m.Put]]:
        """What `stage` was given of the put that is served, the shares one by one.

        Raises:
            ValueError: damaged meanwhile, or of another version of flaxmpc.
            OSError: it is not there.
        """
        return self._read(self._path(name))

    def _read(self, path: Path) -> tuple[m.Publish, bytes, Iterator[m.Put]]:
        records = self._records(path)

        def decode(kind: type[m.T]) -> m.T:
            try:
                return msgspec.msgpack.decode(next(records), type=kind)
            except msgspec.MsgspecError as error:
                raise ValueError(f"{path} is of another version of flaxmpc: {_AGAIN}") from error

        header = decode(m.Publish)
        return header, next(records), (decode(m.Put) for _ in header.weights)

    def _records(self, path: Path) -> Iterator[bytes]:
        """The decrypted records. ValueError: see above."""
        if not stat.S_ISREG(path.lstat().st_mode):  # a pipe would be waited for
            raise ValueError(f"{path} is no regular file: remove it")
        with path.open("rb") as file:
            magic, salt = file.read(len(_MAGIC)), file.read(_SALT_BYTES)
            cipher = self._cipher(salt)
            content, mark, number = [], _MORE, 0
            while mark != _FILE:
                mark, length = file.read(1), int.from_bytes(file.read(_LENGTH_BYTES), "big")
                try:
                    if magic != _MAGIC or length > _PIECE + _TAG_BYTES:
                        raise InvalidTag
                    content.append(cipher.decrypt(_nonce(number), file.read(length), mark))
                    if mark == _FILE and file.read(1):
                        raise InvalidTag
                except (InvalidTag, ValueError) as error:
                    reason = f"is damaged, or was written with another key: give the right key, or {_AGAIN}"
                    raise ValueError(f"{path} {reason}") from error
                number += 1
                if mark != _MORE:
                    yield b"".join(content)
                    content = []

    def _path(self, name: str, staged: str | None = None) -> Path:
        """Of the put of a model that is served, or of a staged one by its hash."""
        return self._folder / (f"{name}.shares" if staged is None else f"{name}.{staged}.staged")

    def _staged(self) -> list[Path]:
        return list(self._folder.glob("*.staged"))

    def _sync(self) -> None:
        """New names of files are on disk, too."""
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _cipher(self, salt: bytes) -> AESGCM:
        return AESGCM(HKDF(hashes.SHA256(), 32, salt, _MAGIC).derive(self._key))


def _pieces(records: Iterable[bytes], count: int) -> Iterator[tuple[bytes, bytes]]:
    """The pieces of `count` records, each with its mark."""
    for number, record in enumerate(records, 1):
        for start in range(0, max(1, len(record)), _PIECE):
            ends = start + _PIECE >= len(record)
            yield record[start : start + _PIECE], _MORE if not ends else _RECORD if number < count else _FILE


def _drawn(key: bytes) -> bool:
    """Whether 32 bytes may be random: such, and the steps between them, have 30 different values, all but never 15."""
    steps = {(after - before) % 256 for before, after in itertools.pairwise(key)}
    return min(len({*key}), len(steps)) > 15


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "big")
