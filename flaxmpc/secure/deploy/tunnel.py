"""A mutual-TLS tunnel between the parties' links.

SPU's own port trusts whoever reaches it, and its TLS port takes plain text too. So it listens on loopback only: a party
connects to a local entrance per peer, which goes on over TLS to the peer's public port, and there to the peer's link.
Each side accepts just the other's certificate.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Mapping

from flaxmpc.secure.deploy.cluster import ClusterFile, PartyEntry, split

_CHUNK = 1 << 18


def fingerprints(cluster: ClusterFile) -> dict[int, bytes]:
    """Every party's certificate in DER, by rank; ValueError for a file that holds none."""
    found = {}
    for entry in cluster.party:
        try:
            found[entry.rank] = ssl.PEM_cert_to_DER_cert(cluster.read_file(entry.certificate).decode("ascii").strip())
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{cluster.file(entry.certificate)} holds no certificate: {error}") from error
    return found


def _context(cluster: ClusterFile, own: PartyEntry, purpose: int) -> ssl.SSLContext:
    context = ssl.SSLContext(purpose)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the whole certificate is compared instead
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cluster.file(cluster.ca))
        context.load_cert_chain(cluster.file(own.certificate), cluster.file(own.key))
    except OSError as error:
        raise ValueError(f"{cluster.path}: certificate or key of {own.name}, or ca: {error}") from error
    return context


class Tunnel:
    """One party's end: entrances to its peers on loopback, and the public port where peers come in.

    Attributes:
        entrances: loopback HOST:PORT that leads to a peer, by rank.
    """

    def __init__(self, cluster: ClusterFile, rank: int, log: Callable[..., None]):
        """Reads the certificates. ValueError: one is not there, or is none."""
        self._own = cluster.party[rank]
        self._peers = {entry.rank: entry for entry in cluster.party if entry.rank != rank}
        pinned = fingerprints(cluster)
        self._pinned: Mapping[int, bytes] = {peer: pinned[peer] for peer in self._peers}
        self._server = _context(cluster, self._own, ssl.PROTOCOL_TLS_SERVER)
        self._client = _context(cluster, self._own, ssl.PROTOCOL_TLS_CLIENT)
        self._timeout = cluster.timeout_seconds
        self._log = log
        self._servers: list[asyncio.Server] = []
        self.link: str | None = None  # the worker's loopback address; changes with every session
        self.entrances: dict[int, str] = {}

    async def start(self) -> None:
        """Opens all ports. OSError: the public one is taken."""
        host, port = split(self._own.link)
        self._servers.append(
            await asyncio.start_server(
                self._come_in,
                self._own.listen or host,
                port,
                ssl=self._server,
                ssl_handshake_timeout=self._timeout,
                limit=_CHUNK,
            )
        )
        for rank in self._peers:

            async def go_out(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rank: int = rank) -> None:
                await self._go_out(rank, reader, writer)

            server = await asyncio.start_server(go_out, "127.0.0.1", 0, limit=_CHUNK)
            self._servers.append(server)
            host, port = server.sockets[0].getsockname()[:2]
            self.entrances[rank] = f"{host}:{port}"

    def close(self) -> None:
        for server in self._servers:
            server.close()

    def _rank_of(self, writer: asyncio.StreamWriter) -> int | None:
        certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return next((rank for rank, pinned in self._pinned.items() if pinned == certificate), None)

    async def _come_in(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rank = self._rank_of(writer)
        if rank is None:
            self._log("tunnel_refused", reason="the certificate is no other party's")
            writer.close()
        elif self.link is None:
            writer.close()
        else:
            await self._join(reader, writer, self.link, None)

    async def _go_out(self, rank: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._join(reader, writer, self._peers[rank].link, rank)

    async def _join(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str, rank: int | None
    ) -> None:
        """Connects on to `address`, over TLS if to party `rank`, and copies both ways until the end."""
        host, port = split(address)
        try:
            there, back = await asyncio.wait_for(
                asyncio.open_connection(host, port, limit=_CHUNK, ssl=self._client if rank is not None else None),
                self._timeout,
            )
        except (OSError, asyncio.TimeoutError) as error:
            if rank is not None:
                self._log("tunnel_failed", party=rank, reason=str(error) or type(error).__name__)
            writer.close()
            return
        if rank is not None and self._rank_of(back) != rank:
            self._log("tunnel_refused", party=rank, reason="the certificate is another one")
            writer.close()
            back.close()
            return
        await asyncio.gather(_copy(reader, back), _copy(there, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """All bytes until the end; then, or on an error, the other direction ends too: brpc opens connections anew."""
    with contextlib.suppress(OSError):
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError):
        writer.close()
