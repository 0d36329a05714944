"""gRPC between owner, clients and parties: who may ask what, and how errors read. TLS is in front of it, see `Gate`."""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import grpc
import msgspec

from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.calls import Call, Calls, Refused, Watch
from flaxmpc.secure.deploy.cluster import ClusterFile, Identity, PartyEntry
from flaxmpc.secure.deploy.gate import Caller, Inner

if TYPE_CHECKING:
    from flaxmpc.secure.deploy.host import Host

_SERVICE = "flaxmpc.Party"
_PIECE = 1 << 20
_MESSAGE = 2 << 20  # the largest that a party takes; what is larger goes in pieces
_HEADROOM = 1 << 20  # of an answer, beside the shares in it
_QUEUED = 1024  # calls that wait to be looked at; they come and go faster than that
_IDLE_MS = 600_000  # a connection without calls ends after; callers connect again
_AGE_MS = 3_600_000  # and every other one: its certificate is looked at again

STARTED_ANEW = "the parties started anew: shares that they don't keep on disk are gone: ask again, or put them again"


T = TypeVar("T", bound=m.Message)


class Method(NamedTuple):
    """Who may call it, and its messages.

    A stream follows the message where `stream` says "in" or "out". One that `waits` is given the Call. A caller may
    have `most` of it at a time, where that is fewer than calls_per_client.
    """

    roles: frozenset[str]
    message: type[m.Message]
    stream: str = ""
    waits: bool = False
    most: int | None = None


_ANY, _OWNER, _CLIENT, _LEADER = (
    frozenset(roles.split()) for roles in ("owner client party leader", "owner", "owner client", "leader")
)
METHODS = {
    "status": Method(_ANY, m.Empty),
    "store": Method(_OWNER, m.Stored, "in"),
    "fetch": Method(_OWNER, m.Names),
    "delete": Method(_OWNER, m.Names),
    "lease": Method(_OWNER, m.Lease, waits=True),
    "publish": Method(_OWNER, m.Publish, "in"),
    "commit": Method(_OWNER, m.Switch),
    "run": Method(_OWNER, m.Run, "in", waits=True),
    "bundle": Method(_CLIENT, m.Names, "out", most=2),
    "infer": Method(_CLIENT, m.Infer, "in", waits=True),
    "form": Method(_LEADER, m.Form),
    "has": Method(_LEADER, m.Turn, waits=True),
    "step": Method(_LEADER, m.Turn),
    "promise": Method(_LEADER, m.Switch),
    "switch": Method(_LEADER, m.Switch),
}


def decode(content: bytes, kind: type[T]) -> T:
    """A message of the schema; msgspec.DecodeError for anything else."""
    return msgspec.msgpack.decode(content, type=kind)


def pieces(name: str, content: bytes, meta: bytes | None = None) -> Iterator[m.Piece]:
    """`content` in a stream; at least one piece."""
    for start in range(0, max(1, len(content)), _PIECE):
        yield m.Piece(name, content[start : start + _PIECE], meta if start == 0 else None)


def _options(cluster: ClusterFile, largest_received: int) -> list[tuple[str, Any]]:
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
    """A party, as owner, client or another party reach it; the party proves with its certificate which one it is.

    Other parties reach it at its link.
    """

    def __init__(self, cluster: ClusterFile, identity: PartyEntry | Identity, entry: PartyEntry):
        """ValueError: a certificate or key is not there."""
        self.entry = entry
        credentials = grpc.ssl_channel_credentials(
            cluster.read_file(cluster.ca),
            cluster.read_file(identity.key, secret=True),
            cluster.read_file(identity.certificate),
        )
        party = isinstance(identity, PartyEntry)
        options = [
            *_options(cluster, _MESSAGE if party else _largest(cluster)),
            ("grpc.ssl_target_name_override", entry.name),
        ]
        self._channel = grpc.secure_channel(f"dns:///{entry.link if party else entry.control}", credentials, options)
        self.bytes_sent = 0

    def ask_later(self, method: str, message: m.Message, timeout: float | None = None) -> Any:
        """A grpc.Future of the answer's bytes."""
        content = m.encode(message)
        self.bytes_sent += len(content)
        return self._channel.unary_unary(f"/{_SERVICE}/{method}").future(content, timeout=timeout)

    def ask(self, method: str, message: m.Message, kind: type[T], timeout: float | None = None) -> T:
        return decode(self.ask_later(method, message, timeout).result(), kind)

    def send_later(self, method: str, message: m.Message, stream: Iterable[m.Piece]) -> Any:
        """Sends a message and a stream; a grpc.Future of the answer's bytes."""

        def contents() -> Iterator[bytes]:
            for each in itertools.chain([message], stream):
                content = m.encode(each)
                self.bytes_sent += len(content)
                yield content

        return self._channel.stream_unary(f"/{_SERVICE}/{method}").future(contents())

    def receive(self, method: str, message: m.Message) -> Iterator[m.Piece]:
        """The stream that answers a message."""
        for content in self._channel.unary_stream(f"/{_SERVICE}/{method}")(m.encode(message)):
            yield decode(content, m.Piece)

    def close(self) -> None:
        self._channel.close()


def describe(entry: PartyEntry, error: BaseException) -> str:
    """An error of a call in one line: which party, and what it said, or why it could not be asked."""
    where = f"party {entry.rank} at {entry.control}"
    if not isinstance(error, grpc.RpcError) or not isinstance(error, grpc.Call):
        return f"{where} did not answer in time"
    details = " ".join((error.details() or "").split())
    match error.code():
        case grpc.StatusCode.UNAVAILABLE if details.startswith("party"):
            return details
        case grpc.StatusCode.UNAVAILABLE if "RST_STREAM" in details:
            return f"{where} did not take the call: too many of this connection were under way, or it is stopping"
        case grpc.StatusCode.UNAVAILABLE:
            reason = (
                "its TLS certificate or ours is refused: "
                if re.search("SSL|handshak|erification|Unwrap", details)
                else ""
            )
            return f"{where} can't be reached: {reason}{details}"
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"{where} did not answer in time"
        case grpc.StatusCode.CANCELLED:
            return f"{where} ended the call, which stood still for too long: {details}"
        case _:
            return details if details.startswith("party") else f"{where}: {details}"


def _check(host: Host, caller: Caller | None, name: str, method: Method) -> Caller:
    """Who calls. Refused: not this method, or not at all."""
    cluster = host.cluster
    role = caller.role if caller is not None else ""
    if caller is None or role not in method.roles:
        raise Refused(grpc.StatusCode.PERMISSION_DENIED, f"a {role or 'stranger'} may not ask for {name!r}")
    if role == "client" and cluster.clients is not None and caller.name not in cluster.clients:
        reason = f"{caller.name!r} is not one of the clients that {cluster.path.name} allows"
        raise Refused(grpc.StatusCode.PERMISSION_DENIED, reason)
    if caller.expires < time.time():
        ended = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(caller.expires))
        reason = f"the certificate of {caller.name!r} ended at {ended} by the clock of party {host.rank}"
        raise Refused(grpc.StatusCode.UNAUTHENTICATED, reason)
    return caller


def serve(
    host: Host, inner: Inner, calls: Calls, *, streams: int, threads: int, log: Callable[..., None]
) -> grpc.Server:
    """Starts one of a party's servers.

    Args:
        host: what is served.
        inner: is told where, and knows who calls.
        calls: how many at a time.
        streams: calls of one connection at a time; more of them wait at the caller.
        threads: as many as calls may wait, and some more to refuse others.
        log: of what is refused, limited in rate.
    """
    from concurrent.futures import ThreadPoolExecutor

    watch = Watch(host.cluster.timeout_seconds)

    @contextlib.contextmanager
    def guarded(name: str, method: Method, context: grpc.ServicerContext) -> Iterator[Call]:
        caller = inner.caller(context.peer())
        who = {"method": name, "caller": caller.name if caller else "", "role": caller.role if caller else ""}
        try:
            caller = _check(host, caller, name, method)
            with calls.one(caller, name, method.most):
                yield Call(caller, context)
        except Refused as error:
            if context.is_active():
                log("refused", **who, reason=str(error))
            context.abort(error.code, str(error))
        except msgspec.MsgspecError as error:
            log("refused", **who, reason="not of the schema")
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not of the schema: {error}")

    def handler(name: str, method: Method) -> grpc.RpcMethodHandler:
        target = getattr(host, name)

        # A message by itself is taken as a stream of one: it is not read before it is known who sends it.
        def answer(contents: Iterable[bytes], context: grpc.ServicerContext) -> bytes:
            with guarded(name, method, context) as call:
                received = watch.each(context, contents)
                arguments: list[Any] = [decode(next(received, b""), method.message)]
                if method.stream == "in":
                    arguments.append(decode(content, m.Piece) for content in received)
                if method.waits:
                    arguments.append(call)
                return m.encode(target(*arguments))

        def stream(contents: Iterable[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            with guarded(name, method, context):
                message = decode(next(watch.each(context, contents), b""), method.message)
                for piece in target(message):
                    with watch.over(context):
                        yield m.encode(piece)

        if method.stream == "out":
            return grpc.stream_stream_rpc_method_handler(stream)
        return grpc.stream_unary_rpc_method_handler(answer)

    logging.getLogger("grpc").setLevel(logging.CRITICAL)  # an aborted call is logged here already
    options = [
        *_options(host.cluster, _MESSAGE),
        ("grpc.max_concurrent_streams", streams),
        ("grpc.http2.bdp_probe", 0),  # else a caller that sends fast is granted ever more that is sent unread
        ("grpc.http2.lookahead_bytes", _MESSAGE),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a small message may inflate to a large one
        ("grpc.server_handshake_timeout_ms", int(host.cluster.timeout_seconds * 1000)),
        ("grpc.max_connection_idle_ms", _IDLE_MS),
        ("grpc.max_connection_age_ms", _AGE_MS),
        ("grpc.max_connection_age_grace_ms", _AGE_MS),
    ]
    most = threads + _QUEUED
    server = grpc.server(ThreadPoolExecutor(threads), options=options, maximum_concurrent_rpcs=most)
    handlers = {name: handler(name, method) for name, method in METHODS.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    inner.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"  # behind a gate
    server.start()
    return server
