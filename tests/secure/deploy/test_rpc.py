"""One hostile client, or user of a party's host, against real parties: the others are answered, and nothing grows."""

import contextlib
import datetime
import os
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import msgspec
import numpy as np
import pytest
from clusters import TIMEOUT, W, X, affine, ask, check_served, publish

from flaxmpc import secure
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy import server
from flaxmpc.secure.deploy.certificates import Authority
from flaxmpc.secure.deploy.cluster import ClusterFile, Identity, split
from flaxmpc.secure.deploy.errors import Refused
from flaxmpc.secure.deploy.gate import EACH, Caller

_LEVEL_MB = 100  # that a party may take while it is attacked


def with_certificate(parties, directory: Path, name: str, seconds: float = 3600) -> ClusterFile:
    """cluster.toml as a client of that name has it; its certificate is valid for so long."""
    valid = datetime.timedelta(seconds=seconds)
    Authority.read(parties.directory).issue(directory, name, server=False, valid=valid)
    identity = Identity(certificate=str(directory / f"{name}.pem"), key=str(directory / f"{name}.key"))
    return msgspec.structs.replace(parties.cluster, client=identity)


@pytest.fixture
def hostile(parties, tmp_path) -> ClusterFile:
    """As a client has it that is allowed to ask, and does what it likes."""
    return with_certificate(parties, tmp_path, "client.alice")


@contextlib.contextmanager
def connection(cluster: ClusterFile, rank: int = 0) -> Iterator[grpc.Channel]:
    """A connection of its own, with none of our limits."""
    assert cluster.client is not None
    files = (cluster.ca, cluster.client.key, cluster.client.certificate)
    options = [
        ("grpc.ssl_target_name_override", cluster.party[rank].name),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_send_message_length", -1),
    ]
    credentials = grpc.ssl_channel_credentials(*map(cluster.read_file, files))
    with grpc.secure_channel(cluster.party[rank].control, credentials, options) as channel:
        yield channel


def call(channel: grpc.Channel, method: str, content: bytes):
    return channel.stream_unary(f"/flaxmpc.Party/{method}").future(iter([content]), timeout=60)


def peak_mb(parties) -> list[float]:
    """The most memory that each party's supervisor had since `forget_peaks`."""
    found = []
    for rank in sorted(parties.processes):
        lines = Path(f"/proc/{parties.processes[rank].pid}/status").read_text().splitlines()
        found += [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")]
    return found


def forget_peaks(parties) -> None:
    for process in parties.processes.values():
        with contextlib.suppress(OSError):  # not ours to change
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")


@contextlib.contextmanager
def attacked(parties, client: secure.Cluster) -> Iterator[None]:
    """What goes on in it costs another client nothing, during it and after, and no session or memory."""
    session = client.session
    ask(client)
    forget_peaks(parties)
    before = peak_mb(parties)
    with contextlib.ExitStack() as stack:
        stack.callback(others_are_answered, client)
        yield
    others_are_answered(client)
    assert client.session == session
    assert max(np.subtract(peak_mb(parties), before)) < _LEVEL_MB


def others_are_answered(client: secure.Cluster) -> None:
    for i in range(3):
        start = time.monotonic()
        np.testing.assert_allclose(ask(client, X + i), (X + i) * 3 + 1, atol=1e-3)
        assert time.monotonic() - start < TIMEOUT


def test_bundles_that_nobody_reads_and_one_message_that_asks_for_many(parties, owner, client, hostile):
    large = os.urandom(64 << 20)
    weights = owner.put(W)
    owner.publish("affine", weights, {"2x4": owner.program(affine, weights, X, length=4)}, large)
    try:
        with contextlib.ExitStack() as stack, attacked(parties, client):
            channels = [stack.enter_context(connection(hostile, i % 3)) for i in range(30)]
            asked = m.encode(m.Names(client.session, ["affine"] * 20))
            unread = [channel.unary_stream("/flaxmpc.Party/bundle")(asked) for channel in channels for _ in range(10)]
            time.sleep(1)
            others_are_answered(client)
            refused = [each for each in unread if not each.is_active()]
            for each in refused:
                assert each.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "'client.alice' has 2 calls of 'bundle' under way, which is the limit" in each.details()
            assert refused
        with connection(hostile) as channel, attacked(parties, client):
            sent = sum(len(content) for content in channel.unary_stream("/flaxmpc.Party/bundle")(asked))
            assert len(large) < sent < len(large) + 8192  # once
    finally:
        publish(owner)


@pytest.mark.parametrize("method", ["status", "infer", "store", "form", "bundle"])
def test_a_large_message_is_not_taken(parties, client, hostile, method):
    with attacked(parties, client), connection(hostile) as channel, pytest.raises(grpc.RpcError) as error:
        call(channel, method, bytes(257 << 20)).result()
    assert error.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.PERMISSION_DENIED)
    if method == "infer":
        assert "Received message larger than max (269484032 vs. 2097152)" in str(error.value)


def test_a_message_that_inflates_is_not_inflated(parties, client, hostile):
    with attacked(parties, client), connection(hostile) as channel:
        for method in ("status", "infer", "bundle"):
            for size in (1 << 16, 256 << 20):
                with pytest.raises(grpc.RpcError) as error:
                    # A future would not compress.
                    channel.stream_unary(f"/flaxmpc.Party/{method}")(
                        iter([bytes(size)]), compression=grpc.Compression.Gzip
                    )
                assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
                assert "'gzip' is disabled" in str(error.value)


def test_calls_that_do_not_go_on_hold_no_more_than_their_callers_share(parties, client, hostile):
    """Requests that stop in the middle, at all parties; they end by themselves."""
    name, model = client.find("affine")
    started = m.encode(m.Infer(client.session, "begun", name, model.hash, "2x4"))
    go = []

    def contents(content: bytes) -> Iterator[bytes]:
        if content:
            yield content
        while not go:
            time.sleep(0.1)

    with contextlib.ExitStack() as stack, attacked(parties, client):
        stack.callback(go.append, True)
        channels = [stack.enter_context(connection(hostile, i % 3)) for i in range(12)]
        start = time.monotonic()
        held = [
            channel.stream_unary("/flaxmpc.Party/infer").future(contents(content))
            for channel in channels
            for content in (b"", started) * 8
        ]
        time.sleep(1)
        others_are_answered(client)
        ended = {future.code() for future in held if future.exception(timeout=4 * TIMEOUT)}
        assert time.monotonic() - start < 4 * TIMEOUT
    assert ended == {grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED}


def test_handshakes_that_stand_still_and_connections_without_end(parties, owner, client, hostile):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(hostile.file(hostile.ca))
    context.load_cert_chain(hostile.client.certificate, hostile.client.key)
    context.set_alpn_protocols(["h2"])
    entry = parties.cluster.party[0]
    with contextlib.ExitStack() as stack, attacked(parties, client):
        for port in (entry.control, entry.link):
            for _ in range(100):
                stack.enter_context(socket.create_connection(split(port), 5)).sendall(b"\x16\x03\x01")
        refused = 0
        for _ in range(EACH + 8):
            plain = stack.enter_context(socket.create_connection(split(entry.control), 5))
            taken = stack.enter_context(context.wrap_socket(plain))
            with contextlib.suppress(TimeoutError):  # HTTP/2 begins with what the server says
                refused += taken.recv(1) == b""
        assert refused == 8
        start = time.monotonic()
        with secure.Cluster(parties.cluster, "client") as new:
            np.testing.assert_allclose(ask(new), X * 3 + 1, atol=1e-3)
        assert time.monotonic() - start < TIMEOUT


def test_a_certificate_ends_a_client_that_is_connected(parties, owner, tmp_path):
    brief = with_certificate(parties, tmp_path, "client.alice", seconds=4)
    end = time.monotonic() + 4
    with secure.Cluster(brief, "client") as connected:
        np.testing.assert_allclose(ask(connected), X * 3 + 1, atol=1e-3)
        time.sleep(max(0.0, end - time.monotonic()) + 1)
        with pytest.raises(secure.SecureError, match="its TLS certificate or ours is refused"):
            ask(connected)


def test_the_end_of_a_certificate_is_looked_at_with_every_call(parties):
    client = Caller("client", "client", time.time() + 10)
    assert server.check_caller(parties.cluster, 2, client, "status") is client
    ended = r"the certificate of 'client' ended at 1970-01-01 00:00:01 UTC by the clock of party 2"
    with pytest.raises(Refused, match=ended) as refused:
        server.check_caller(parties.cluster, 2, client._replace(expires=1.0), "status")
    assert refused.value.code is grpc.StatusCode.UNAUTHENTICATED


def test_a_user_of_the_host_has_no_way_in_beside_the_gate(parties, owner, client):
    for rank in range(3):
        addresses = parties.events(rank, "serving")[-1]["inner"]
        assert len(set(addresses)) == 2  # for owner and clients, and for parties
        for address in addresses:
            assert address.startswith("127.0.0.1:")
            with grpc.insecure_channel(address) as channel:
                for method in ("status", "infer", "store", "form", "step"):
                    with pytest.raises(grpc.RpcError) as error:
                        call(channel, method, m.encode(m.Empty())).result()
                    assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED
                    assert error.value.details() == f"a stranger may not ask for {method!r}"
    others_are_answered(client)


@pytest.mark.slow
def test_a_party_that_may_open_few_files_goes_on_and_its_log_stays_small(mortal):
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (150, 150))"
    mortal.restart(0, code=few)
    check_served(mortal)
    entry = mortal.cluster.party[0]
    with mortal.connect("client") as client, contextlib.ExitStack() as stack:
        for _ in range(300):
            for port in (entry.control, entry.link):
                stack.enter_context(socket.create_connection(split(port), 5))
        for _ in range(10):
            np.testing.assert_allclose(ask(client), X * 3 + 1, atol=1e-3)
            time.sleep(0.2)
        assert mortal.events(0, "accept_failed")
        assert mortal.log_of(0).stat().st_size < 20_000
        assert not mortal.events(0, "session_lost")
    check_served(mortal)
