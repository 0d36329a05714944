"""cluster.toml: the one file that describes a cluster, the same at every party, owner and client."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from flaxmpc.errors import unknown
from flaxmpc.secure.deploy import disk
from flaxmpc.secure.protocol import Config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

FILE_NAME = "cluster.toml"
CLIENT = r"client(\.[A-Za-z0-9_\-]{1,57})?"  # a client's common name, which has at most 64 characters

Address = Annotated[str, Meta(pattern=r"^([^\s:/\[\]]+|\[[^\s/\[\]]+\]):[0-9]{1,5}\Z")]
Count = Annotated[int, Meta(ge=1, le=1 << 30)]
Seconds = Annotated[float, Meta(ge=1, le=3600)]
FileName = Annotated[str, Meta(pattern=r"^[^\0]+\Z")]
ClientName = Annotated[str, Meta(pattern=rf"^{CLIENT}\Z")]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Identity(_Table, frozen=True):
    """Certificate and private key file of the owner, a client or a party."""

    certificate: FileName
    key: FileName


class PartyEntry(Identity, frozen=True):
    """A computing host, as cluster.toml describes it.

    Attributes:
        rank: 0, 1, 2; rank 0 decides the order of the requests.
        control: HOST:PORT where owner and clients connect; "[::1]:7100" in IPv6.
        link: HOST:PORT where the other parties do.
        metrics: loopback HOST:PORT of /health and /metrics; none by default.
        certificate: its file; others accept just this one as the party's.
        key: the private key's file, on the party's own host only.
        listen: the address that control and link listen on where it is not their host: "0.0.0.0" or "::" behind a NAT.
        keep_shares: folder where the party keeps its shares of models, encrypted, over a restart; none by default.
        shares_key: file of the key for them, 64 hex digits; by default the environment variable FLAXMPC_SHARES_KEY.
    """

    rank: Annotated[int, Meta(ge=0)]
    control: Address
    link: Address
    metrics: Address | None = None
    listen: Annotated[str, Meta(pattern=r"^[^\s/\[\]]+\Z")] | None = None
    keep_shares: FileName | None = None
    shares_key: FileName | None = None

    @property
    def name(self) -> str:
        """The common name of its certificate."""
        return f"party{self.rank}"

    @property
    def machine(self) -> str:
        """Parties for which this is the same run on one machine, as far as their addresses say."""
        return "this" if is_loopback(self.control) else split(self.control)[0]


class Limits(_Table, frozen=True):
    """The most that a party accepts.

    Attributes:
        max_batch: rows of a request.
        max_batch_rows: rows of several requests that run together when they wait; 1: each runs alone.
        max_length: size of a row.
        max_request_bytes: bytes of a request's shares, or of one value of a model.
        queue: requests that wait or run.
        calls_per_client: calls of one certificate that are under way, its waiting requests among them.
        connections: connections of all clients together; one certificate has at most 32.
        run_seconds: seconds that a run may take; a longer one ends with the session.
    """

    max_batch: Count = 32
    max_batch_rows: Count = 8
    max_length: Count = 512
    max_request_bytes: Count = 256 << 20
    queue: Count = 64
    calls_per_client: Count = 16
    connections: Count = 256
    run_seconds: Count = 600


class ClusterFile(_Table, frozen=True):
    """The content of a cluster.toml. File names in it are relative to it.

    Attributes:
        protocol, ring, fraction_bits, exp_mode, network: settings of the secure computation, as Config has them.
        ca: file of the authority's certificate, which signed every certificate.
        party: the computing hosts, by rank.
        owner, client: identities, where they are at hand.
        models: names of the models that an owner may put; None allows any.
        clients: common names of the certificates that may ask, "client" or "client.NAME"; None allows any of the
            authority's.
        programs: file of the digests of programs that a party approved, see `flaxmpc.secure.deploy.programs`; None
            allows any.
        timeout_seconds: the bound on waiting for a party that is absent or silent.
        allow_insecure_dealer: whether SEMI2K, which hides nothing from party 0, is allowed.
        path: the file that was read.
    """

    protocol: str
    ca: FileName
    party: tuple[PartyEntry, ...]
    ring: str = "FM64"
    fraction_bits: int = 18
    exp_mode: str = "auto"
    network: str = "wan"
    owner: Identity | None = None
    client: Identity | None = None
    models: tuple[str, ...] | None = None
    clients: tuple[ClientName, ...] | None = None
    programs: FileName | None = None
    timeout_seconds: Seconds = 30.0
    allow_insecure_dealer: bool = False
    limits: Limits = Limits()
    path: Path = Path(FILE_NAME)

    def parties_beside(self, rank: int) -> int:
        """The number of parties on the host of this one, itself included."""
        machines = [entry.machine for entry in self.party]
        return machines.count(machines[rank])

    @classmethod
    def read(cls, path: str | Path) -> ClusterFile:
        """Reads a cluster.toml, or the one in a directory.

        Raises:
            ValueError: it does not exist, is no TOML, or says something that is not allowed: file, key, value.
        """
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        try:
            text = disk.read(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        try:
            content = tomllib.loads(text.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not TOML: {error}") from error
        try:
            if "path" in content:
                raise msgspec.ValidationError("Object contains unknown field `path`")
            self = msgspec.convert(content, cls)
            self = msgspec.structs.replace(self, path=path, party=tuple(sorted(self.party, key=lambda p: p.rank)))
            self._check()
        except msgspec.ValidationError as error:
            raise ValueError(f"{path}: {_explained(str(error), content)}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return self

    def _check(self) -> None:
        if self.protocol == "REF2K":
            raise ValueError("protocol REF2K is one party that sees everything: not for a cluster")
        ranks = [entry.rank for entry in self.party]
        if ranks != list(range(self.config.world_size)):
            raise ValueError(f"protocol {self.protocol} takes party ranks 0..{self.config.world_size - 1}, not {ranks}")
        seen: dict[Any, str] = {}

        def once(where: str, value: str, key: Any) -> None:
            if key in seen:
                raise ValueError(f"{where} {value!r} is also {seen[key]}")
            seen[key] = where

        for entry in self.party:
            party = f"party {entry.rank}:"
            for field in ("control", "link", "metrics"):
                if (address := getattr(entry, field)) is not None:
                    _check_address(f"{party} {field}", address)
                    # A metrics port is of each machine's own loopback.
                    machine = entry.machine if field == "metrics" else None
                    once(f"{party} {field}", address, (machine, *split(address)))
            if entry.metrics is not None and not is_loopback(entry.metrics):
                raise ValueError(f"{party} metrics {entry.metrics!r} must be 127.0.0.1:PORT: it has no TLS")
            once(f"{party} certificate", entry.certificate, os.path.normpath(self.file(entry.certificate)))
            if entry.keep_shares is not None:
                folder = os.path.normpath(self.file(entry.keep_shares))
                once(f"{party} keep_shares", entry.keep_shares, (entry.machine, folder))

    @property
    def config(self) -> Config:
        """The settings of the secure computation."""
        return Config(self.protocol, self.ring, self.fraction_bits, self.exp_mode, self.network)

    def file(self, name: str) -> Path:
        """The path of a file that cluster.toml names."""
        return self.path.parent / name

    def read_file(self, name: str, *, secret: bool = False) -> bytes:
        """The content of a file that cluster.toml names; ValueError if it is not there, or `disk.read` refuses it."""
        try:
            return disk.read(self.file(name), secret=secret)
        except OSError as error:
            raise ValueError(f"{self.path} names {self.file(name)}: {error.strerror}") from error

    def identity(self, role: str) -> Identity:
        """The files of "owner" or "client"; ValueError if cluster.toml names none."""
        if role not in ("owner", "client"):
            raise unknown("role", role, ("owner", "client"))
        identity: Identity | None = getattr(self, role)
        if identity is None:
            raise ValueError(f"{self.path} names no certificate and key for the {role}: add [{role}]")
        return identity


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT can only be reached from this machine."""
    return split(address)[0] in ("127.0.0.1", "::1", "localhost")


def split(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; the host is written in one way, an IPv6 address without its brackets."""
    host, _, port = address.rpartition(":")
    host = host.lower()
    if host.startswith("["):
        with contextlib.suppress(ValueError):
            host = str(ipaddress.IPv6Address(host[1:-1]))
    return host, int(port)


def _check_address(where: str, address: str) -> None:
    host, port = split(address)
    if not 1 <= port <= 65535:
        raise ValueError(f"{where} {address!r} has no port in 1..65535")
    if host.startswith("["):
        raise ValueError(f"{where} {address!r} has no IPv6 address in its brackets")


def _explained(message: str, content: Any) -> str:
    """msgspec's message with the value that it is about, or with the keys that there are."""
    reason, _, place = message.partition(" - at `$")
    place = place.lstrip(".").rstrip("`")
    where = f"{place}: " if place else ""
    if key := re.fullmatch(r"Object contains unknown field `(.*)`", reason):
        table = {"": ClusterFile, "limits": Limits, "owner": Identity, "client": Identity}.get(place, PartyEntry)
        return f"{where}{unknown('key', key[1], {*table.__struct_fields__} - {'path'})}"
    value = content
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", place):
        try:
            value = value[int(index)] if index else value[name]
        except (KeyError, IndexError, TypeError):
            return message
    shown = f", not {value!r:.200}" if not isinstance(value, (dict, list)) else ""
    return f"{where}{reason}{shown}"
