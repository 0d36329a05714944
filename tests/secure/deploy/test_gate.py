"""A public port alone, before an echo: who comes in, and that nobody takes all of it."""

import asyncio
import contextlib
import datetime
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from flaxmpc.secure.deploy import gate as gates
from flaxmpc.secure.deploy.certificates import Authority
from flaxmpc.secure.deploy.cluster import ClusterFile, split
from flaxmpc.secure.deploy.connection import Plain, connect
from flaxmpc.secure.deploy.gate import EACH, GRPC, Caller, Gate, by_name, tls
from flaxmpc.secure.deploy.local import write_local


class Served:
    """A gate of party 0, and what it logged; the loop is in a thread of its own."""

    def __init__(self, cluster: ClusterFile):
        self.cluster = cluster
        self.events: list[tuple[str, str]] = []
        self.callers: list[Caller] = []
        self.address = split(cluster.party[0].control)
        self.inner: Callable[[socket.socket], None] = echo

    def log(self, event: str, *, reason: str, **_: object) -> None:
        self.events.append((event, reason))

    def context(self, stem: Path | None = None, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
        """Of a client, by default the cluster's."""
        stem = stem or self.cluster.path.parent / "client"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(self.cluster.file(self.cluster.ca))
        context.load_cert_chain(f"{stem}.pem", f"{stem}.key")
        context.set_alpn_protocols([GRPC])
        if version:
            context.maximum_version = version
        return context

    def connect(self, context: ssl.SSLContext | None = None, **options) -> ssl.SSLSocket:
        return (context or self.context()).wrap_socket(socket.create_connection(self.address, 10), **options)

    def wait_for(self, event: str, reason: str) -> None:
        """Until it is logged; which may be after the other end noticed."""
        end = time.monotonic() + 10
        while (event, reason) not in self.events:
            assert time.monotonic() < end, self.events
            time.sleep(0.01)

    def issue(self, directory: Path, name: str, seconds: float = 3600) -> Path:
        """A certificate that is valid for so long."""
        valid = datetime.timedelta(seconds=seconds)
        Authority.read(self.cluster.path.parent).issue(directory, name, server=False, valid=valid)
        return directory / name


def echo(connection: socket.socket) -> None:
    with contextlib.suppress(OSError), connection:
        while content := connection.recv(65536):
            connection.sendall(content)


def answers(connection: ssl.SSLSocket) -> bool:
    """Whether an echo is at the other end."""
    with contextlib.suppress(OSError):
        connection.sendall(b"ping")
        return connection.recv(10) == b"ping"
    return False


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    return write_local(tmp_path_factory.mktemp("gate") / "c")


@pytest.fixture
def served(cluster) -> Iterator[Served]:
    self = Served(cluster)
    loop = asyncio.new_event_loop()

    @contextlib.asynccontextmanager
    async def inside(caller: Caller) -> AsyncIterator[Plain]:
        self.callers.append(caller)
        here, there = socket.socketpair()
        threading.Thread(target=self.inner, args=[there], daemon=True).start()
        with contextlib.closing(Plain(here)) as end:
            yield end

    context = tls(cluster, cluster.party[0], ssl.PROTOCOL_TLS_SERVER, GRPC)
    gate = Gate("control", context, by_name, {GRPC: inside}, self.log, connections=EACH + 8, silent_seconds=1.0)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(gate.start(*self.address), loop).result(10)
    yield self
    asyncio.run_coroutine_threadsafe(gate.close(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.parametrize(
    ("names", "role"),
    [
        (["owner"], "owner"),
        (["client"], "client"),
        (["client.alice"], "client"),
        (["owner.bob"], ""),
        (["Owner"], ""),
        (["owner\n"], ""),
        (["owner\0"], ""),
        (["client."], ""),
        (["client.alice\n"], ""),
        (["client.a b"], ""),
        (["clients"], ""),
        (["party0"], ""),
        (["owner", "client"], ""),
        ([], ""),
    ],
)
def test_the_role_of_a_name(names, role):
    assert by_name(b"", names) == role


def test_the_gate_knows_who_comes_in(served):
    with served.connect() as connection:
        assert answers(connection)
        assert connection.version() == "TLSv1.3"
        assert connection.selected_alpn_protocol() == GRPC
    (caller,) = served.callers
    assert (caller.name, caller.role) == ("client", "client")
    assert caller.expires == pytest.approx(time.time() + 365 * 86400, abs=600)


def test_tls_1_2_is_refused(served):
    with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):
        served.connect(served.context(version=ssl.TLSVersion.TLSv1_2))


def test_what_is_not_spoken_here_is_refused(served):
    context = served.context()
    context.set_alpn_protocols(["http/1.1"])
    with served.connect(context) as connection:
        assert not answers(connection)
    served.wait_for("connection_refused", "None is not spoken here")


def test_a_certificate_that_has_ended_is_told_so(served, tmp_path):
    old = served.context(served.issue(tmp_path, "client.old", -60))
    with served.connect(old) as connection, pytest.raises(ssl.SSLError, match="ALERT_CERTIFICATE_EXPIRED"):
        connection.recv(10)


def test_a_connection_ends_with_its_certificate_and_no_session_outlives_it(served, tmp_path):
    context = served.context(served.issue(tmp_path, "client.brief", 2))
    with served.connect(context) as first:
        assert answers(first)
        session = first.session
        assert not session.has_ticket
        with served.connect(context, session=session) as second:
            assert answers(second)
            assert not second.session_reused
        assert first.recv(10) == b""  # after its two seconds
    with served.connect(context, session=session) as third:
        assert not answers(third)


def test_handshakes_that_stand_still_give_way(served):
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(served.address, 10)) for _ in range(100)]
        for each in slow[:50]:
            each.sendall(b"\x16\x03\x01\x02")  # the beginning of one
        start = time.monotonic()
        for _ in range(5):
            with served.connect() as connection:
                assert answers(connection)
        assert time.monotonic() - start < 5
        with contextlib.suppress(ConnectionResetError):  # what it sent may not have been read
            assert slow[0].recv(10) == b""


def test_one_certificate_has_so_many_connections_and_all_clients_together(served, tmp_path):
    alice = served.context(served.issue(tmp_path, "client.alice"))
    owner = served.context(served.cluster.path.parent / "owner")
    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(served.connect(alice)) for _ in range(EACH + 1)]
        assert [answers(each) for each in many] == [True] * EACH + [False]
        others = [stack.enter_context(served.connect()) for _ in range(9)]
        assert [answers(each) for each in others] == [True] * 8 + [False]
        assert answers(stack.enter_context(served.connect(owner)))
        many[0].close()
        end = time.monotonic() + 5
        while not answers(stack.enter_context(served.connect(alice))):  # until it is noticed
            assert time.monotonic() < end
    served.wait_for("connection_refused", "'client.alice' has 32 connections")
    served.wait_for("connection_refused", "there are 40 connections")


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no such time-out")
def test_a_peer_that_takes_nothing_is_given_up(served):
    ended = threading.Event()

    def flood(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            while True:
                connection.sendall(bytes(65536))
        ended.set()

    served.inner = flood
    with served.connect():
        assert ended.wait(10)


def test_when_no_more_files_can_be_opened_nothing_spins(monkeypatch):
    """The oldest handshake ends; without one, those that come wait."""
    monkeypatch.setattr("flaxmpc.secure.deploy.connection._PAUSE", 0.1)
    tries, gave_up = [], []

    async def come() -> socket.socket:
        loop = asyncio.get_running_loop()
        real = loop.sock_accept

        async def out_of_files(listener: socket.socket):
            tries.append(time.monotonic())
            if len(tries) <= 4:
                raise OSError(24, "Too many open files")
            return await real(listener)

        monkeypatch.setattr(loop, "sock_accept", out_of_files)
        (listener,) = await gates.listen("127.0.0.1", 0)
        with listener, socket.create_connection(listener.getsockname()):
            async for connection in gates.accept(
                listener, lambda error: bool(gave_up.append(error)) or len(gave_up) == 1
            ):
                return connection
        raise AssertionError

    asyncio.run(come()).close()
    assert len(gave_up) == 4
    assert tries[1] - tries[0] < 0.1
    assert tries[-1] - tries[1] > 0.25


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_host_may_be_a_name_or_a_number_of_either_kind(host):
    async def reach() -> None:
        try:
            listeners = await gates.listen(host, 0)
        except OSError:
            pytest.skip(f"this machine has no {host}")
        with contextlib.ExitStack() as stack:
            for listener in listeners:
                stack.enter_context(listener)
            address = f"{host}:{listeners[0].getsockname()[1]}"
            (await connect(address)).close()
        with pytest.raises(OSError, match=r"[Cc]onnect"):
            await connect(address)

    asyncio.run(reach())


def test_a_port_that_is_taken_is_not_shared():
    async def twice() -> None:
        (listener,) = await gates.listen("127.0.0.1", 0)
        with listener, pytest.raises(OSError, match="in use"):
            await gates.listen("localhost", listener.getsockname()[1])

    asyncio.run(twice())
