"""A party's public ports: TLS that shows who is at the other end, and that keeps anyone from taking all of a port."""

import asyncio
import collections
import contextlib
import dataclasses
import resource
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple

from flaxmpc.secure.deploy.certificates import role_of
from flaxmpc.secure.deploy.cluster import ClusterFile, PartyEntry
from flaxmpc.secure.deploy.connection import Plain, Secure, Tasks, accept, connect, listen, relay

GRPC, LINK = "h2", "flaxmpc-link"  # what is spoken over a connection, in TLS's words (ALPN)

_HANDSHAKES = 64  # at once; one more ends the oldest, since an honest one is soon done
_HANDSHAKE_SECONDS = 10.0
EACH = 32  # connections of one certificate
_FILES_OF_ONE = 3  # a connection takes so many: our end, and both ends of the one behind it
_OTHER_FILES = 320  # room for handshakes, the owner's and the parties' connections, and what a process has open anyway
_FEWEST = 8  # connections, however few files may be open
_OWNER = "owner"


class _TurnedAway(Exception):
    """A connection does not go on."""


class Caller(NamedTuple):
    """The holder of the certificate behind a connection.

    Attributes:
        name: the certificate's common name.
        role: "owner", "client", "leader" (party 0) or "party"; empty for a stranger.
        expires: the certificate's end, in seconds since the epoch.
    """

    name: str
    role: str
    expires: float


def fingerprints(cluster: ClusterFile) -> dict[int, bytes]:
    """Every party's certificate in DER, by rank. ValueError: a file holds none."""
    found = {}
    for entry in cluster.party:
        try:
            found[entry.rank] = ssl.PEM_cert_to_DER_cert(cluster.read_file(entry.certificate).decode("ascii").strip())
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{cluster.file(entry.certificate)} holds no certificate: {error}") from error
    return found


def tls(cluster: ClusterFile, own: PartyEntry, purpose: int, *spoken: str) -> ssl.SSLContext:
    """TLS 1.3 only, with a party's certificate, for peers that have one of the authority's.

    A session is never resumed: the other end's certificate is looked at with every connection.

    Args:
        cluster: names the files.
        own: the party that uses it.
        purpose: ssl.PROTOCOL_TLS_SERVER or ssl.PROTOCOL_TLS_CLIENT.
        spoken: what may be spoken over it: GRPC, LINK.

    Raises:
        ValueError: a file is not there, or is no certificate or key.
    """
    context = ssl.SSLContext(purpose)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # a client has none; a party's whole certificate is compared
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(list(spoken))
    if purpose == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    try:
        context.load_verify_locations(cluster.file(cluster.ca))
        context.load_cert_chain(cluster.file(own.certificate), cluster.file(own.key))
    except OSError as error:
        raise ValueError(f"{cluster.path}: certificate or key of {own.name}, or ca: {error}") from error
    return context


def by_name(_: bytes, names: list[str]) -> str:
    """The role of an owner or a client, by its certificate's common name."""
    return role_of(names[0]) if len(names) == 1 else ""


def by_certificate(cluster: ClusterFile, rank: int) -> Callable[[bytes, list[str]], str | None]:
    """Gives other parties than `rank` a role by their very certificates, others None. ValueError: a file holds none."""
    pinned = {der: peer for peer, der in fingerprints(cluster).items() if peer != rank}

    def role(certificate: bytes, _: list[str]) -> str | None:
        peer = pinned.get(certificate)
        return None if peer is None else "leader" if peer == 0 else "party"

    return role


class Inner:
    """The loopback port where a party's gRPC server listens, behind the gate.

    gRPC says with every call which port it came from, and so who called. A stranger does not come through the gate.

    Attributes:
        address: HOST:PORT.
    """

    def __init__(self):
        self.address = ""
        self._callers: dict[str, Caller] = {}

    def caller(self, peer: str) -> Caller | None:
        """The caller at a connection, by gRPC's name for it; None: it did not come through the gate, or is gone."""
        return self._callers.get(peer)

    @contextlib.asynccontextmanager
    async def connected(self, caller: Caller) -> AsyncIterator[Plain]:
        """A connection for `caller`. OSError: the server is not there."""
        connection = await connect(self.address)
        host, port = connection.getsockname()
        peer = f"ipv4:{host}:{port}"
        with contextlib.closing(Plain(connection)) as end:
            self._callers[peer] = caller
            try:
                yield end
            finally:
                del self._callers[peer]  # before the port may be another's


Way = Callable[[Caller], AbstractAsyncContextManager[Plain]]


@dataclasses.dataclass(eq=False)
class Gate(Tasks):
    """A public port, and the connections there. Behind it are ways to what is spoken over them.

    Attributes:
        port: the port's name, for the log.
        context: TLS as `tls` makes it.
        role: gives a certificate in DER and its common names a role of Caller's; None turns it away.
        ways: what goes on with a connection, by what is spoken over it.
        log: is told of what is refused; limited in rate.
        connections: the most of all callers but the owner, who has room of its own.
        silent_seconds: a peer that takes nothing for so long is given up.
    """

    port: str
    context: ssl.SSLContext
    role: Callable[[bytes, list[str]], str | None]
    ways: Mapping[str, Way]
    log: Callable[..., None]
    _: dataclasses.KW_ONLY
    connections: int
    silent_seconds: float

    def __post_init__(self):
        super().__init__()
        self._open: collections.Counter[str] = collections.Counter()
        self._shaking: dict[asyncio.Task[None], None] = {}

    async def start(self, host: str, port: int) -> None:
        """Listens. OSError: it can't."""
        for listener in await listen(host, port):
            self.spawn(self._accept(listener))

    async def _accept(self, listener: socket.socket) -> None:
        with listener:
            async for connection in accept(listener, self._full):
                if len(self._shaking) >= _HANDSHAKES:
                    self.log("connection_refused", port=self.port, reason=f"{_HANDSHAKES} newer handshakes began")
                    self._give_up_oldest()
                self._shaking[self.spawn(self._come_in(connection))] = None

    def _full(self, error: OSError) -> bool:
        self.log("accept_failed", port=self.port, reason=error.strerror)
        return self._give_up_oldest()

    def _give_up_oldest(self) -> bool:
        """Ends the handshake that takes longest; returns whether there was one."""
        oldest = next(iter(self._shaking), None)
        if oldest is not None:
            del self._shaking[oldest]
            oldest.cancel()
        return oldest is not None

    async def _come_in(self, connection: socket.socket) -> None:
        with connection:
            try:
                end = Secure(connection, self.context, server=True, silent_seconds=self.silent_seconds)
                with contextlib.closing(end):
                    await self._shake(end)
                    caller = self._caller(end)
                    with self._counted(caller):
                        await self._go_on(end, caller)
            except (OSError, _TurnedAway) as error:
                self.log("connection_refused", port=self.port, reason=str(error))

    async def _shake(self, end: Secure) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            await asyncio.wait_for(end.handshake(), _HANDSHAKE_SECONDS)
        except asyncio.TimeoutError:
            raise _TurnedAway(f"its handshake took more than {_HANDSHAKE_SECONDS:g} s") from None
        finally:
            self._shaking.pop(task, None)

    def _caller(self, end: Secure) -> Caller:
        facts = end.facts
        names = [value for part in facts.get("subject", ()) for key, value in part if key == "commonName"]
        role = self.role(end.certificate, names)
        if role is None:
            raise _TurnedAway(f"the certificate of {names} is no other party's")
        return Caller(" ".join(names), role, ssl.cert_time_to_seconds(facts["notAfter"]))

    @contextlib.contextmanager
    def _counted(self, caller: Caller) -> Iterator[None]:
        others = sum(self._open.values()) - self._open[_OWNER]
        if self._open[caller.name] >= EACH:
            raise _TurnedAway(f"{caller.name!r} has {EACH} connections")
        if caller.name != _OWNER and others >= self.connections:
            raise _TurnedAway(f"there are {others} connections")
        self._open[caller.name] += 1
        try:
            yield
        finally:
            self._open -= collections.Counter([caller.name])  # and forgets who has none

    async def _go_on(self, end: Secure, caller: Caller) -> None:
        way = self.ways.get(end.application or "")
        if way is None:
            raise _TurnedAway(f"{end.application!r} is not spoken here")
        async with way(caller) as behind:
            with contextlib.suppress(asyncio.TimeoutError):  # a connection ends with its certificate
                await asyncio.wait_for(relay(end, behind), caller.expires - time.time())


def make_room(connections: int) -> int:
    """Raises this process's limit of open files for so many connections; returns those that there is room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES_OF_ONE * connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return connections
    return min(connections, max(_FEWEST, (soft - _OTHER_FILES) // _FILES_OF_ONE))
