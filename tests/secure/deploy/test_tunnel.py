"""The tunnel alone, between an entrance and an echo: whose certificate opens it, at either end."""

import asyncio
import contextlib
import shutil

import pytest

from flaxmpc.secure.deploy.cluster import ClusterFile, split, write_local
from flaxmpc.secure.deploy.tunnel import Tunnel


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


async def sent_through(near: Tunnel, far: Tunnel, to: int) -> bytes:
    """What comes back of 4 bytes from `near` to an echo behind `far`, party `to`."""
    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        far.link = f"{host}:{port}"
        await near.start()
        await far.start()
        try:
            reader, writer = await asyncio.open_connection(*split(near.entrances[to]))
            writer.write(b"ping")
            answer = b""
            with contextlib.suppress(OSError):
                answer = await asyncio.wait_for(reader.read(100), 10)
            writer.close()
            return answer
        finally:
            near.close()
            far.close()
            await asyncio.wait_for(asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}), 10)
            await asyncio.sleep(0.2)  # TLS says goodbye in its own time


def test_a_party_reaches_anothers_link(cluster):
    events = []
    near, far = (Tunnel(cluster, rank, lambda *what, **_: events.append(what)) for rank in (0, 1))
    assert asyncio.run(sent_through(near, far, 1)) == b"ping"
    assert events == []


def test_going_out_only_the_certificate_of_that_rank_will_do(cluster):
    """Party 2's, signed by the same authority, is refused at party 1's address."""
    events = []
    near = Tunnel(cluster, 0, lambda event, **fields: events.append((event, fields)))
    far = Tunnel(with_certificate(cluster, 1, 2), 1, lambda *_, **__: None)
    assert asyncio.run(sent_through(near, far, 1)) == b""
    assert events == [("tunnel_refused", {"party": 1, "reason": "the certificate is another one"})]


def test_coming_in_a_partys_name_is_not_enough(cluster, tmp_path):
    """A further certificate of the same authority and name is refused: the file's very one is meant."""
    from flaxmpc.secure.deploy.certificates import Authority

    Authority.read(cluster.path.parent).issue(tmp_path, "party0", server=True)
    folder = tmp_path / "renewed"
    shutil.copytree(cluster.path.parent, folder)
    for suffix in ("pem", "key"):
        shutil.copy(tmp_path / f"party0.{suffix}", folder / f"party0.{suffix}")
    events = []
    near = Tunnel(ClusterFile.read(folder), 0, lambda *_, **__: None)
    far = Tunnel(cluster, 1, lambda event, **fields: events.append((event, fields)))
    assert asyncio.run(sent_through(near, far, 1)) == b""
    assert events == [("tunnel_refused", {"reason": "the certificate is no other party's"})]
