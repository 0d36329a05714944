"""A party's shares on its own disk, encrypted: after a restart the parties go on without the owner."""

from __future__ import annotations

import itertools
import os
import secrets
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

_MAGIC = b"flaxmpc-shares-1"
_SALT_BYTES = 32
_LENGTH_BYTES = 4
_SUFFIX = ".shares"


class KeptShares:
    """A folder with a file per model: its put's header, its bundle, and this party's shares of its weights.

    A file is records, each encrypted with AES-256-GCM under a key of the file's own: HKDF-SHA256 of the party's key and
    a random salt. The nonce is the record's number, and the last is marked: nothing can be changed, reordered or cut.
    """

    def __init__(self, folder: Path, key: bytes):
        """Makes the folder (mode 0700) if need be, and checks all that is in it.

        Args:
            folder: of this party alone.
            key: 32 bytes.

        Raises:
            ValueError: a file that is damaged, or was written with another key.
            OSError: the folder can't be written to.
        """
        self._folder = folder
        self._key = key
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for unfinished in folder.glob(f"*{_SUFFIX}.new"):
            unfinished.unlink()
        for path in self.paths():
            for _ in self._records(path):
                pass

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

    def paths(self) -> list[Path]:
        """The files, one for each model."""
        return sorted(self._folder.glob(f"*{_SUFFIX}"))

    def write(self, header: m.Publish, bundle: bytes, weights: Iterable[m.Put]) -> None:
        """Keeps a model, in place of one of its name; the file is there whole (mode 0600) or not at all.

        `weights` are those that the header names.
        """
        path = self._folder / f"{header.name}{_SUFFIX}"
        new = path.with_name(f"{path.name}.new")
        new.unlink(missing_ok=True)
        salt = secrets.token_bytes(_SALT_BYTES)
        cipher = self._cipher(salt)
        try:
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(_MAGIC + salt)

                def add(number: int, content: bytes) -> None:
                    last = number == 1 + len(header.weights)
                    encrypted = cipher.encrypt(_nonce(number), content, _mark(last=last))
                    file.write(len(encrypted).to_bytes(_LENGTH_BYTES, "big") + encrypted)

                add(0, m.encode(header))
                add(1, bundle)
                for number, weight in enumerate(weights, 2):
                    add(number, m.encode(weight))
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)

    def read(self, path: Path) -> tuple[m.Publish, bytes, Iterator[m.Put]]:
        """What `write` was given, the shares one by one. ValueError: damaged meanwhile."""
        records = self._records(path)
        header = msgspec.msgpack.decode(next(records), type=m.Publish)
        return header, next(records), (msgspec.msgpack.decode(content, type=m.Put) for content in records)

    def _records(self, path: Path) -> Iterator[bytes]:
        """The decrypted records. ValueError: see above."""
        size = path.stat().st_size
        with path.open("rb") as file:
            magic, salt = file.read(len(_MAGIC)), file.read(_SALT_BYTES)
            cipher = self._cipher(salt)
            number = 0
            while file.tell() < size or number == 0:
                length = int.from_bytes(file.read(_LENGTH_BYTES), "big")
                encrypted = file.read(length)
                try:
                    if magic != _MAGIC:
                        raise InvalidTag
                    content = cipher.decrypt(_nonce(number), encrypted, _mark(last=file.tell() >= size))
                except (InvalidTag, ValueError) as error:
                    raise ValueError(
                        f"{path} is damaged, or was written with another key: give the right key, or remove the file "
                        "and let the owner put the model again"
                    ) from error
                yield content
                number += 1

    def _cipher(self, salt: bytes) -> AESGCM:
        return AESGCM(HKDF(hashes.SHA256(), 32, salt, _MAGIC).derive(self._key))


def _drawn(key: bytes) -> bool:
    """Whether 32 bytes may be random: such, and the steps between them, have 30 different values, all but never 15."""
    steps = {(after - before) % 256 for before, after in itertools.pairwise(key)}
    return min(len({*key}), len(steps)) > 15


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "big")


def _mark(*, last: bool) -> bytes:
    return b"last" if last else b"more"
