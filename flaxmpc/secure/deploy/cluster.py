"""cluster.toml: the one file that describes a cluster, the same at every party, owner and client."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import re
import socket
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from flaxmpc.errors import unknown
from flaxmpc.secure.deploy import disk
from flaxmpc.secure.deploy.certificates import CLIENT, Authority
from flaxmpc.secure.protocol import PROTOCOLS, Config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

FILE_NAME = "cluster.toml"

Address = Annotated[str, Meta(pattern=r"^([^\s:/\[\]]+|\[[^\s/\[\]]+\]):[0-9]{1,5}\Z")]
Positive = Annotated[int, Meta(ge=1, le=1 << 30)]
Seconds = Annotated[float, Meta(ge=1, le=3600)]
FileName = Annotated[str, Meta(pattern=r"^[^\0]+\Z")]
ClientName = Annotated[str, Meta(pattern=rf"^{CLIENT}\Z")]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class PartyEntry(_Table, frozen=True):
    """One computing host.

    Attributes:
        rank: 0, 1, 2; rank 0 decides the order of the requests.
        control: HOST:PORT where owner and clients connect; "[::1]:7100" in IPv6.
        link: HOST:PORT where the other parties do.
        metrics: loopback HOST:PORT of /health and /metrics; none by default.
        certificate: file; others accept just this one as the party's.
        key: file of the private key, on the party's own host only.
        listen: address that control and link listen on where it is not their host: "0.0.0.0" or "::" behind a NAT.
        keep_shares: folder for the party's shares of models, encrypted, to have them after a restart; none by default.
        shares_key: file of the key for it, 64 hex digits; by default the environment variable FLAXMPC_SHARES_KEY.
    """

    rank: Annotated[int, Meta(ge=0)]
    control: Address
    link: Address
    certificate: FileName
    key: FileName
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


class Identity(_Table, frozen=True):
    """Certificate and private key file of the owner or a client, where they are at hand."""

    certificate: FileName
    key: FileName


class Limits(_Table, frozen=True):
    """What a party accepts.

    Attributes:
        max_batch: sentences in a request.
        max_batch_sentences: sentences of several requests that run together when they wait; 1: each runs alone.
        max_length: tokens of a sentence.
        max_request_bytes: shares of a request, or of one value of a model.
        queue: requests that wait or run.
        calls_per_client: calls of one certificate that are under way, its waiting requests among them.
        connections: of all clients together; one certificate has at most 32.
        run_seconds: of a run; a longer one ends with the session.
    """

    max_batch: Positive = 32
    max_batch_sentences: Positive = 8
    max_length: Positive = 512
    max_request_bytes: Positive = 256 << 20
    queue: Positive = 64
    calls_per_client: Positive = 16
    connections: Positive = 256
    run_seconds: Positive = 600


class ClusterFile(_Table, frozen=True):
    """What cluster.toml says. File names in it are relative to it.

    Attributes:
        protocol, ring, fraction_bits, exp_mode: see Config.
        ca: the authority that signed every certificate.
        party: the computing hosts, by rank.
        owner, client: identities, on the hosts that have them.
        models: names that an owner may put; None allows any.
        clients: common names of the certificates that may ask, "client" or "client.NAME"; None allows any of the
            authority's.
        programs: file of the digests of programs that a party approved, see `flaxmpc.secure.deploy.programs`; None
            allows any.
        timeout_seconds: the bound on waiting for a party that is absent or silent.
        allow_insecure_dealer: whether SEMI2K, which hides nothing from party 0, is allowed.
        path: where the file was read.
    """

    protocol: str
    ca: FileName
    party: tuple[PartyEntry, ...]
    ring: str = "FM64"
    fraction_bits: int = 18
    exp_mode: str = "taylor"
    owner: Identity | None = None
    client: Identity | None = None
    models: tuple[str, ...] | None = None
    clients: tuple[ClientName, ...] | None = None
    programs: str | None = None
    timeout_seconds: Seconds = 30.0
    allow_insecure_dealer: bool = False
    limits: Limits = Limits()
    path: Path = Path(FILE_NAME)

    def parties_beside(self, rank: int) -> int:
        """How many parties have the host of this one, itself included."""
        machines = [entry.machine for entry in self.party]
        return machines.count(machines[rank])

    @classmethod
    def read(cls, path: str | Path) -> ClusterFile:
        """Reads a cluster.toml, or that of a directory.

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
        if "path" in content:
            raise ValueError(f"{path}: Object contains unknown field `path`")
        try:
            self = msgspec.convert(content, cls)
            self = msgspec.structs.replace(self, path=path, party=tuple(sorted(self.party, key=lambda p: p.rank)))
            self._check()
        except msgspec.ValidationError as error:
            raise ValueError(f"{path}: {_with_value(str(error), content)}") from error
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
        return Config(self.protocol, self.ring, self.fraction_bits, len(self.party), self.exp_mode)

    def file(self, name: str) -> Path:
        """A file that cluster.toml names."""
        return self.path.parent / name

    def read_file(self, name: str, *, secret: bool = False) -> bytes:
        """Its content; ValueError if it is not there, or `disk.read` refuses it."""
        try:
            return disk.read(self.file(name), secret=secret)
        except OSError as error:
            raise ValueError(f"{self.path} names {self.file(name)}: {error.strerror}") from error

    def identity(self, role: str) -> Identity:
        """Files of "owner" or "client"; ValueError if the file names none."""
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
    """Host, in one way of writing, and port; an IPv6 address without its brackets."""
    host, _, port = address.rpartition(":")
    host = host.lower()
    if host.startswith("["):
        with contextlib.suppress(ValueError):
            host = str(ipaddress.IPv6Address(host[1:-1]))
    return host, int(port)


def join(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_address(where: str, address: str) -> None:
    host, port = split(address)
    if not 1 <= port <= 65535:
        raise ValueError(f"{where} {address!r} has no port in 1..65535")
    if host.startswith("["):
        raise ValueError(f"{where} {address!r} has no IPv6 address in its brackets")


def _with_value(message: str, content: Any) -> str:
    """msgspec's message with the value that it is about."""
    found = re.search(r" - at `\$(.*)`$", message)
    if not found:
        return message
    value = content
    for key, index in re.findall(r"\.([^.\[]+)|\[(\d+)\]", found.group(1)):
        try:
            value = value[int(index)] if index else value[key]
        except (KeyError, IndexError, TypeError):
            return message
    shown = f", not {value!r:.200}" if not isinstance(value, (dict, list)) else ""
    return f"{found.group(1).lstrip('.')}: {message[: found.start()]}{shown}"


def write_local(
    directory: str | Path,
    protocol: str = "ABY3",
    *,
    timeout_seconds: float = 30.0,
    allow_insecure_dealer: bool = False,
) -> ClusterFile:
    """Writes a cluster of this machine that works: cluster.toml, an authority, a certificate for every role.

    Args:
        directory: made if need be.
        protocol: a name in PROTOCOLS; it says how many parties there are.
        timeout_seconds, allow_insecure_dealer: see ClusterFile.

    Raises:
        FileExistsError: there is a cluster already.
        ValueError: an unknown protocol, or one that makes no cluster; seconds that are not allowed.
    """
    directory = Path(directory)
    path = directory / FILE_NAME
    num_parties = Config(protocol).world_size
    if protocol == "REF2K":
        raise ValueError("protocol REF2K is one party that sees everything: not for a cluster")
    try:
        msgspec.convert(timeout_seconds, Seconds)
    except msgspec.ValidationError as error:
        raise ValueError(f"timeout_seconds: {error}, not {timeout_seconds}") from error
    names = ("owner", "client", *(f"party{rank}" for rank in range(num_parties)))
    for made in (FILE_NAME, *(f"{name}.{suffix}" for name in ("ca", *names) for suffix in ("pem", "key"))):
        if os.path.lexists(directory / made):
            raise FileExistsError(f"{directory / made} exists already")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority = Authority()
    authority.write(directory)
    for name in names:
        authority.issue(directory, name, server=name.startswith("party"))
    seconds = str(timeout_seconds).removesuffix(".0")
    ports = iter(_free_ports(3 * num_parties))
    lines = [
        "# The same file at every party, owner and client. Each host has only its own .key file;",
        "# ca.key signs further certificates and belongs on none of them.",
        f'protocol = "{protocol}"  # {", ".join(name for name in PROTOCOLS if name != "REF2K")}',
        'ring = "FM64"',
        "fraction_bits = 18",
        f"timeout_seconds = {seconds}  # how long a party that is absent or silent is waited for",
        'ca = "ca.pem"',
        '# models = ["NAME"]  # what an owner may put; without this line anything',
        '# clients = ["client", "client.NAME"]  # who may ask; without this line all that have a certificate',
        '# programs = "programs.txt"  # what `flaxmpc approve` wrote: models of other programs are refused',
        f"allow_insecure_dealer = {str(allow_insecure_dealer).lower()}",
        "",
        "[limits]",
        *(f"{field} = {value}" for field, value in msgspec.structs.asdict(Limits()).items()),
        "",
    ]
    for role in ("owner", "client"):
        lines += [f"[{role}]", f'certificate = "{role}.pem"', f'key = "{role}.key"', ""]
    for rank in range(num_parties):
        lines += ["[[party]]", f"rank = {rank}"]
        lines += [f'{field} = "127.0.0.1:{next(ports)}"' for field in ("control", "link", "metrics")]
        lines += [f'certificate = "party{rank}.pem"', f'key = "party{rank}.key"', ""]
    disk.write_new(path, "\n".join(lines).encode(), 0o644)
    return ClusterFile.read(path)


def issue_client(directory: str | Path, name: str) -> Path:
    """Issues the certificate of one more client from the authority that `write_local` made.

    Args:
        directory: that holds ca.pem and ca.key.
        name: of up to 57 letters, digits, "_" and "-"; the certificate's common name is "client.NAME".

    Returns:
        The certificate, client.NAME.pem; its key (mode 0600) is beside it.

    Raises:
        FileExistsError: there is one of that name.
        ValueError: another kind of name, or no authority in the directory.
    """
    directory = Path(directory)
    if not re.fullmatch(CLIENT, f"client.{name}"):
        raise ValueError(f"a client's name has up to 57 letters, digits, '_' and '-', not {name!r}")
    Authority.read(directory).issue(directory, f"client.{name}", server=False)
    return directory / f"client.{name}.pem"


def _free_ports(count: int) -> list[int]:
    """Free now, and outside the range that systems take outgoing connections' ports from."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.append(port)
        if len(ports) == count:
            break
    return ports
