"""gRPC between owner, clients and parties, from the callers' side: one party, all parties, and how errors read.

TLS is in front of a party's gRPC, see `Gate`; what it serves is in `flaxmpc.secure.deploy.server`.
"""

import itertools
import queue
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grpc
import msgspec

from flaxmpc.secure._spu import SecureError
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.cluster import ClusterFile, Identity, PartyEntry

SERVICE = "flaxmpc.Party"
LARGEST_MESSAGE = 2 << 20  # bytes that a party takes; what is larger goes in pieces
_HEADROOM = 1 << 20  # bytes of an answer beside the shares in it
NO_ANSWER = (grpc.RpcError, msgspec.MsgspecError)  # what asking a party raises where it can't, or where it is no answer


def channel_options(cluster: ClusterFile, largest_received: int) -> list[tuple[str, Any]]:
    """gRPC's settings at both ends; `largest_received`: bytes of a message that comes to this end."""
    alive = int(cluster.timeout_seconds * 1000 / 2)
    return [
        ("grpc.max_receive_message_length", largest_received),
        ("grpc.max_send_message_length", _largest(cluster)),
        # A host that is frozen or gone does not say so.
        ("grpc.keepalive_time_ms", alive),
        ("grpc.keepalive_timeout_ms", alive),
        ("grpc.http2.ping_timeout_ms", 2 * alive),  # a minute unless set; a line that is merely slow needs some time
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 100),
        ("grpc.http2.min_ping_interval_without_data_ms", 100),
        ("grpc.so_reuseport", 0),  # or a port that is taken goes unnoticed
        ("grpc.enable_http_proxy", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]


def _largest(cluster: ClusterFile) -> int:
    return cluster.limits.max_request_bytes + _HEADROOM


class Peer:
    """A connection to a party, which proves with its certificate that it is that party.

    Attributes:
        entry: the party's.
        bytes_sent: bytes of the messages to it so far, before TLS.
    """

    def __init__(self, cluster: ClusterFile, identity: Identity, entry: PartyEntry):
        """Connects when it is first used; to the party's link where `identity` is another party's, else to its control.

        Raises:
            ValueError: a certificate or key is not there.
        """
        self.entry = entry
        credentials = grpc.ssl_channel_credentials(
            cluster.read_file(cluster.ca),
            cluster.read_file(identity.key, secret=True),
            cluster.read_file(identity.certificate),
        )
        party = isinstance(identity, PartyEntry)
        options = [
            *channel_options(cluster, LARGEST_MESSAGE if party else _largest(cluster)),
            ("grpc.ssl_target_name_override", entry.name),
        ]
        self._channel = grpc.secure_channel(f"dns:///{entry.link if party else entry.control}", credentials, options)
        self.bytes_sent = 0

    def ask_later(self, method: str, message: m.Message, timeout: float | None = None) -> Any:
        """Sends a message; a grpc.Future of the answer's bytes."""
        content = m.encode(message)
        self.bytes_sent += len(content)
        return self._channel.unary_unary(f"/{SERVICE}/{method}").future(content, timeout=timeout)

    def ask(self, method: str, message: m.Message, kind: type[m.T], timeout: float | None = None) -> m.T:
        """The answer to a message; one of NO_ANSWER if there is none."""
        return m.decode(self.ask_later(method, message, timeout).result(), kind)

    def send_later(self, method: str, message: m.Message, stream: Iterable[m.Piece]) -> Any:
        """Sends a message and a stream; a grpc.Future of the answer's bytes."""

        def contents() -> Iterator[bytes]:
            for each in itertools.chain([message], stream):
                content = m.encode(each)
                self.bytes_sent += len(content)
                yield content

        return self._channel.stream_unary(f"/{SERVICE}/{method}").future(contents())

    def receive(self, method: str, message: m.Message) -> Iterator[m.Piece]:
        """The stream that answers a message."""
        for content in self._channel.unary_stream(f"/{SERVICE}/{method}")(m.encode(message)):
            yield m.decode(content, m.Piece)

    def close(self) -> None:
        self._channel.close()


class Peers(list[Peer]):
    """The parties by rank. Each of its methods raises SecureError if one of them can't be reached or refuses."""

    def __init__(self, cluster: ClusterFile, identity: Identity):
        """ValueError: a certificate or key is not there."""
        super().__init__(Peer(cluster, identity, entry) for entry in cluster.party)
        self._timeout = cluster.timeout_seconds

    def close(self) -> None:
        """Closes the connections."""
        for peer in self:
            peer.close()

    def ask(self, method: str, message: m.Message, kind: type[m.T]) -> list[m.T]:
        """Every party's answer to a message, within the cluster's timeout_seconds."""
        return self.gather([peer.ask_later(method, message, self._timeout) for peer in self], kind)

    def statuses(self) -> list[m.Status]:
        """Every party's state and models."""
        return self.ask("status", m.Empty(), m.Status)

    def send(self, method: str, header: m.Message, streams: Sequence[Iterable[m.Piece]], kind: type[m.T]) -> list[m.T]:
        """Sends every party the same header and a stream of its own; waits as long as the answers take."""
        sent = zip(self, streams, strict=True)
        return self.gather([peer.send_later(method, header, stream) for peer, stream in sent], kind)

    def gather(self, futures: Sequence[Any], kind: type[m.T]) -> list[m.T]:
        """The answers to calls of the first parties; at the first error, of a call or in an answer, the others end too.

        They might not end by themselves: a request that party 0 has given up waits at the others.
        """
        ended: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        for rank, future in enumerate(futures):
            future.add_done_callback(lambda future, rank=rank: ended.put((rank, future)))
        answers: dict[int, m.T] = {}
        try:
            while len(answers) < len(futures):
                rank, future = ended.get()
                if future.exception() is not None:
                    rank, error = _failure(futures)
                    raise SecureError(describe(self[rank].entry, error)) from error
                try:
                    answer = answers[rank] = m.decode(future.result(), kind)
                except msgspec.MsgspecError as error:
                    raise SecureError(describe(self[rank].entry, error)) from error
                if isinstance(answer, m.Answer) and answer.error is not None:
                    raise SecureError(answer.error)
        finally:
            for future in futures:
                future.cancel()
        return [answers[rank] for rank in range(len(futures))]


def _failure(futures: Sequence[Any]) -> tuple[int, Any]:
    """Place and error of a call that failed; a party that refuses says more than one that can't be reached."""
    done = [(rank, future.exception()) for rank, future in enumerate(futures) if future.done()]
    failed = [(rank, error) for rank, error in done if error is not None]
    return min(failed, key=lambda each: each[1].code() is grpc.StatusCode.UNAVAILABLE)


def describe(entry: PartyEntry, error: BaseException) -> str:
    """An error of a call in one line: which party, and what it said, or why it could not be asked."""
    where = f"party {entry.rank} at {entry.control}"
    if isinstance(error, msgspec.MsgspecError):
        return f"{where} answered what is not of the schema: all need the same version of flaxmpc ({error})"
    if not isinstance(error, grpc.RpcError) or not isinstance(error, grpc.Call):
        return f"{where} did not answer in time"
    details = " ".join((error.details() or "").split())
    match error.code():
        case grpc.StatusCode.UNAVAILABLE if details.startswith("party"):
            return details
        case grpc.StatusCode.UNAVAILABLE if "RST_STREAM" in details:
            return f"{where} did not take the call: too many of this connection were under way, or it is stopping"
        case grpc.StatusCode.UNAVAILABLE:
            refused = re.search("SSL|handshak|erification|Unwrap", details)
            reason = "its TLS certificate or ours is refused: " if refused else ""
            return f"{where} can't be reached: {reason}{details}"
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"{where} did not answer in time"
        case grpc.StatusCode.CANCELLED:
            return f"{where} ended the call, which stood still for too long: {details}"
        case _:
            return details if details.startswith("party") else f"{where}: {details}"
