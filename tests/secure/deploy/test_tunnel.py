"""The tunnel alone, between an entrance and an echo: whose certificate opens it, at either end."""

import asyncio
import contextlib
import shutil
import ssl

import pytest

from flaxmpc.secure.deploy.cluster import ClusterFile, split
from flaxmpc.secure.deploy.gate import EACH, LINK, Gate, by_certificate, tls
from flaxmpc.secure.deploy.local import write_local
from flaxmpc.secure.deploy.tunnel import Tunnel


class End:
    """A party's tunnel, and its public port."""

    def __init__(self, cluster: ClusterFile, rank: int):
        self.events: list[tuple] = []
        log = lambda event, **fields: self.events.append((event, fields))  # noqa: E731
        self.tunnel = Tunnel(cluster, rank, log)
        self._address = cluster.party[rank].link
        self._gate = Gate(
            "link",
            tls(cluster, cluster.party[rank], ssl.PROTOCOL_TLS_SERVER, LINK),
            by_certificate(cluster, rank),
            {LINK: self.tunnel.connected},
            log,
            connections=EACH,
            silent_seconds=5,
        )

    async def __aenter__(self) -> "End":
        await self.tunnel.start()
        await self._gate.start(*split(self._address))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._gate.close()
        await self.tunnel.close()


@pytest.fixture
def cluster(tmp_path):
    return write_local(tmp_path / "c", timeout_seconds=5)


def with_certificate(cluster: ClusterFile, rank: int, other: int) -> ClusterFile:
    """As a party sees it that has, and believes to be right, the certificate of `other` for `rank`."""
    folder = cluster.path.parent.with_name("misled")
    shutil.copytree(cluster.path.parent, folder)
    for suffix in ("pem", "key"):
        shutil.copy(folder / f"party{other}.{suffix}", folder / f"party{rank}.{suffix}")
    return ClusterFile.read(folder)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(100):
        writer.write(data)
    writer.close()


async def sent_through(near: End, far: End, to: int) -> bytes:
    """What comes back of 4 bytes from `near` to an echo behind `far`, party `to`."""
    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server, near, far:
        host, port = server.sockets[0].getsockname()
        far.tunnel.link = f"{host}:{port}"
        reader, writer = await asyncio.open_connection(*split(near.tunnel.entrances[to]))
        writer.write(b"ping")
        answer = b""
        with contextlib.suppress(OSError):
            answer = await asyncio.wait_for(reader.read(100), 10)
        writer.close()
        await asyncio.sleep(0.05)  # what is logged may come later
        return answer


def test_a_party_reaches_anothers_link(cluster):
    near, far = (End(cluster, rank) for rank in (0, 1))
    assert asyncio.run(sent_through(near, far, 1)) == b"ping"
    assert near.events == far.events == []


def test_going_out_only_the_certificate_of_that_rank_will_do(cluster):
    """Party 2's, signed by the same authority, is refused at party 1's address."""
    near, far = End(cluster, 0), End(with_certificate(cluster, 1, 2), 1)
    assert asyncio.run(sent_through(near, far, 1)) == b""
    assert near.events == [("tunnel_refused", {"party": 1, "reason": "the certificate is another one"})]


def test_coming_in_a_partys_name_is_not_enough(cluster, tmp_path):
    """A further certificate of the same authority and name is refused: the file's very one is meant."""
    from flaxmpc.secure.deploy.certificates import Authority

    Authority.read(cluster.path.parent).issue(tmp_path, "party0", server=True)
    folder = tmp_path / "renewed"
    shutil.copytree(cluster.path.parent, folder)
    for suffix in ("pem", "key"):
        shutil.copy(tmp_path / f"party0.{suffix}", folder / f"party0.{suffix}")
    near, far = End(ClusterFile.read(folder), 0), End(cluster, 1)
    assert asyncio.run(sent_through(near, far, 1)) == b""
    reason = "the certificate of ['party0'] is no other party's"
    assert far.events == [("connection_refused", {"port": "link", "reason": reason})]
