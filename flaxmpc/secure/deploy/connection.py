"""The two ends of a connection that goes through a party: plain to its own processes, TLS to everybody else.

asyncio's own TLS tells a peer nothing whose certificate it refuses, and its servers flood the log when no more files
can be opened; so sockets and `ssl` are used as they are.
"""

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from flaxmpc.secure.deploy.cluster import split

_CHUNK = 1 << 18
_BACKLOG = 512
_NO_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PAUSE = 1.0  # seconds, when no more files can be opened


class Tasks:
    """Tasks that end together."""

    def __init__(self):
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Starts a task."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Ends all tasks."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Plain:
    """A connection without TLS. Who closes it must not be waiting in it."""

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._loop = asyncio.get_running_loop()

    async def read(self) -> bytes:
        """Some bytes; none at the end. OSError: the connection is lost."""
        return await self._loop.sock_recv(self._connection, _CHUNK)

    async def write(self, content: bytes) -> None:
        """Waits until the system has taken all bytes. OSError: the connection is lost."""
        await self._loop.sock_sendall(self._connection, content)

    def close(self) -> None:
        self._connection.close()


class Secure(Plain):
    """A connection over TLS."""

    def __init__(self, connection: socket.socket, context: ssl.SSLContext, *, server: bool, silent_seconds: float):
        """A peer that takes nothing for `silent_seconds`, or is gone so long, is given up."""
        super().__init__(connection)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silent_seconds * 1000))
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=server)
        self._sending = asyncio.Lock()

    async def handshake(self) -> None:
        """Begins. OSError: the other end's certificate is refused, or ours, or it speaks no TLS (then ssl.SSLError)."""
        while True:
            try:
                return self._tls.do_handshake()
            except ssl.SSLWantReadError:
                pass
            finally:
                await self._flush()  # the other end is told, too, what is wrong
            await self._receive()

    @property
    def certificate(self) -> bytes:
        """The other end's certificate in DER; its names and times are in `facts`."""
        return self._tls.getpeercert(binary_form=True) or b""

    @property
    def facts(self) -> dict:
        """The other end's certificate as ssl.SSLSocket.getpeercert has it."""
        return self._tls.getpeercert() or {}

    @property
    def application(self) -> str | None:
        """The name that both ends agreed on for what is spoken (ALPN)."""
        return self._tls.selected_alpn_protocol()

    async def read(self) -> bytes:
        content = bytearray()
        while not content:
            try:
                while part := self._tls.read(_CHUNK):
                    content += part
            except ssl.SSLWantReadError:
                pass
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                break
            else:
                break
            if self._out.pending:  # the other end wants new keys
                await self._flush()
            if not content:
                await self._receive()
        return bytes(content)

    async def write(self, content: bytes) -> None:
        self._tls.write(content)
        await self._flush()

    async def _receive(self) -> None:
        if received := await super().read():
            self._in.write(received)
        else:
            self._in.write_eof()

    async def _flush(self) -> None:
        async with self._sending:  # records must not mix
            if content := self._out.read():
                await super().write(content)

    def close(self) -> None:
        """Closes the connection; tells the other end if that needs no waiting."""
        with contextlib.suppress(OSError):
            self._tls.unwrap()
        with contextlib.suppress(OSError):
            if not self._sending.locked():
                self._connection.send(self._out.read())
        super().close()


async def relay(one: Plain, other: Plain) -> None:
    """Copies all bytes both ways until either end is done; the caller closes both."""

    async def copy(source: Plain, to: Plain) -> None:
        with contextlib.suppress(OSError):
            while content := await source.read():
                await to.write(content)
                await asyncio.sleep(0)  # what need not wait lets others go on all the same

    ways = [asyncio.create_task(copy(*ends)) for ends in ((one, other), (other, one))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


async def connect(address: str) -> socket.socket:
    """A connection to HOST:PORT. OSError: there is none."""
    loop = asyncio.get_running_loop()
    host, port = split(address)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:  # a name, which may take time; a number does not wait for others' names
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    failed = OSError(f"{host} has no address")
    for family, kind, protocol, _, place in found:
        connection = socket.socket(family, kind, protocol)
        connection.setblocking(False)
        try:
            await loop.sock_connect(connection, place)
            return connection
        except BaseException as error:
            connection.close()
            if not isinstance(error, OSError):
                raise
            failed = error
    raise failed


async def listen(host: str, port: int) -> list[socket.socket]:
    """Listens on all addresses of a host that this machine has. OSError: on none, or the port is taken."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listeners: list[socket.socket] = []
    failed = OSError(f"{host} has no address")
    for family, place in sorted({(each[0], each[4]) for each in found}):
        try:
            listeners.append(socket.create_server(place, family=family, backlog=_BACKLOG))
        except OSError as error:
            failed = error
            if error.errno == errno.EADDRINUSE:
                listeners.clear()
                break
    if not listeners:
        raise failed
    return listeners


async def accept(listener: socket.socket, full: Callable[[OSError], bool]) -> AsyncIterator[socket.socket]:
    """The connections that come, for ever. With no files left it waits: those that come wait too, and nothing spins.

    Args:
        listener: one of those that `listen` gives.
        full: is told that no more can be accepted; says whether it closed another one.
    """
    listener.setblocking(False)
    while True:
        try:
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
        except OSError as error:
            await asyncio.sleep(_PAUSE if error.errno in _NO_FILES and not full(error) else 0)
        else:
            yield connection
            await asyncio.sleep(0)  # others go on meanwhile
