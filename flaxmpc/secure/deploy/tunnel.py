"""The way of SPU's traffic between the parties: entrances on loopback, and TLS from there to the peers' links.

SPU's own port trusts whoever reaches it, and its TLS port takes plain text too. So it listens on loopback only: a party
connects to a local entrance per peer, which goes on over TLS to the peer's public port, and there (see `Gate`) to the
peer's link. Each side accepts just the other's certificate.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping

from flaxmpc.secure.deploy.cluster import ClusterFile
from flaxmpc.secure.deploy.connection import Plain, Secure, Tasks, accept, connect, relay
from flaxmpc.secure.deploy.gate import LINK, Caller, fingerprints, tls


class Tunnel(Tasks):
    """One party's end of the ways to all others, and the connections there.

    Attributes:
        link: the worker's loopback address, where peers come out; changes with every session.
        entrances: loopback addresses HOST:PORT that lead to the peers, by rank.
    """

    def __init__(self, cluster: ClusterFile, rank: int, log: Callable[..., None]):
        """Reads the certificates. `log`, limited in rate, is told of what fails. ValueError: one can't be read."""
        super().__init__()
        self._peers = {entry.rank: entry for entry in cluster.party if entry.rank != rank}
        self._pinned: Mapping[int, bytes] = fingerprints(cluster)
        self._context = tls(cluster, cluster.party[rank], ssl.PROTOCOL_TLS_CLIENT, LINK)
        self._timeout = cluster.timeout_seconds
        self._log = log
        self.link: str | None = None
        self.entrances: dict[int, str] = {}

    async def start(self) -> None:
        """Opens the entrances."""
        for rank in self._peers:
            listener = socket.create_server(("127.0.0.1", 0))
            host, port = listener.getsockname()
            self.entrances[rank] = f"{host}:{port}"
            self.spawn(self._accept(rank, listener))

    @contextlib.asynccontextmanager
    async def connected(self, _: Caller) -> AsyncIterator[Plain]:
        """The worker's end of a connection that a peer made through the gate. OSError: the worker is not there."""
        if self.link is None:
            raise OSError("this party is in no session")
        with contextlib.closing(Plain(await asyncio.wait_for(connect(self.link), self._timeout))) as end:
            yield end

    async def _accept(self, rank: int, listener: socket.socket) -> None:
        def full(error: OSError) -> bool:
            self._log("accept_failed", port=f"entrance to party {rank}", reason=error.strerror)
            return False

        with listener:
            async for connection in accept(listener, full):
                self.spawn(self._go_out(rank, connection))

    async def _go_out(self, rank: int, connection: socket.socket) -> None:
        with contextlib.closing(Plain(connection)) as here:
            try:
                there = await asyncio.wait_for(self._reach(rank), self._timeout)
            except (OSError, asyncio.TimeoutError) as error:
                self._log("tunnel_failed", party=rank, reason=str(error) or type(error).__name__)
                return
            with contextlib.closing(there):
                if there.certificate == self._pinned[rank]:
                    await relay(here, there)
                else:
                    self._log("tunnel_refused", party=rank, reason="the certificate is another one")

    async def _reach(self, rank: int) -> Secure:
        connection = await connect(self._peers[rank].link)
        end = Secure(connection, self._context, server=False, silent_seconds=2 * self._timeout)
        try:
            await end.handshake()
        except BaseException:
            end.close()
            raise
        return end
