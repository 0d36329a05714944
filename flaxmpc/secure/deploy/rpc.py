"""gRPC with mutual TLS between owner, clients and parties: who may ask what, and how errors read."""

from __future__ import annotations

import logging
import re
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import grpc
import msgspec

from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.cluster import ClusterFile, Identity, PartyEntry, split
from flaxmpc.secure.deploy.tunnel import fingerprints

if TYPE_CHECKING:
    from flaxmpc.secure.deploy.host import Host

_SERVICE = "flaxmpc.Party"
_PIECE = 1 << 20
_HEADROOM = 1 << 20  # of a message, beside the shares in it

STARTED_ANEW = "the parties started anew: shares that they don't keep on disk are gone: ask again, or put them again"


class Refused(Exception):
    """A call that is not served; the caller gets the code and the message."""

    def __init__(self, code: grpc.StatusCode, message: str):
        super().__init__(message)
        self.code = code


T = TypeVar("T", bound=m.Message)


class Method(NamedTuple):
    """Who may call it, and its messages. A stream follows the message where `stream` says "in" or "out"."""

    roles: frozenset[str]
    message: type[m.Message]
    stream: str = ""
    waits: bool = False


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
    "run": Method(_OWNER, m.Run, waits=True),
    "bundle": Method(_CLIENT, m.Names, "out"),
    "infer": Method(_CLIENT, m.Infer, waits=True),
    "form": Method(_LEADER, m.Form),
    "has": Method(_LEADER, m.Turn),
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


def _options(cluster: ClusterFile) -> list[tuple[str, Any]]:
    largest = cluster.limits.max_request_bytes + _HEADROOM
    alive = int(cluster.timeout_seconds * 1000 / 2)
    return [
        ("grpc.max_receive_message_length", largest),
        ("grpc.max_send_message_length", largest),
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


class Peer:
    """A party, as owner, client or another party reach it; the party proves with its certificate which one it is."""

    def __init__(self, cluster: ClusterFile, identity: PartyEntry | Identity, entry: PartyEntry):
        """ValueError: a certificate or key is not there."""
        self.entry = entry
        credentials = grpc.ssl_channel_credentials(
            cluster.read_file(cluster.ca), cluster.read_file(identity.key), cluster.read_file(identity.certificate)
        )
        options = [*_options(cluster), ("grpc.ssl_target_name_override", entry.name)]
        self._channel = grpc.secure_channel(entry.control, credentials, options)
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
            yield m.encode(message)
            for piece in stream:
                self.bytes_sent += len(piece.content)
                yield m.encode(piece)

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
        case grpc.StatusCode.UNAVAILABLE:
            reason = (
                "its TLS certificate or ours is refused: " if re.search("SSL|handshak|erification", details) else ""
            )
            return f"{where} can't be reached: {reason}{details}"
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"{where} did not answer in time"
        case _:
            return details if details.startswith("party") else f"{where}: {details}"


def serve(host: Host) -> grpc.Server:
    """Starts a party's server. OSError: the port is taken."""
    from concurrent.futures import ThreadPoolExecutor

    cluster, entry = host.cluster, host.entry
    pinned = {der: rank for rank, der in fingerprints(cluster).items()}

    def role(context: grpc.ServicerContext) -> str:
        """By certificate: parties by the very one, owner and clients by its common name. Refused: a client shut out."""
        auth: Mapping[str, Sequence[bytes]] = context.auth_context()  # pyright: ignore[reportAssignmentType]
        pem = auth.get("x509_pem_cert", [b""])[0].decode("ascii")
        rank = pinned.get(ssl.PEM_cert_to_DER_cert(pem.strip()))
        if rank is not None:
            return "leader" if rank == 0 else "party"
        name = auth.get("x509_common_name", [b""])[0].decode("utf-8", "replace")
        kind = name.partition(".")[0]
        if kind == "client" and cluster.clients is not None and name not in cluster.clients:
            reason = f"{name!r} is not one of the clients that {cluster.path.name} allows"
            raise Refused(grpc.StatusCode.PERMISSION_DENIED, reason)
        return kind if kind in ("owner", "client") else ""

    def guarded(name: str, method: Method, context: grpc.ServicerContext, call: Callable[[], Any]) -> Any:
        caller = ""
        try:
            caller = role(context)
            if caller not in method.roles:
                raise Refused(grpc.StatusCode.PERMISSION_DENIED, f"a {caller or 'stranger'} may not ask for {name!r}")
            return call()
        except Refused as error:
            host.log("refused", method=name, role=caller, reason=str(error))
            context.abort(error.code, str(error))
        except msgspec.MsgspecError as error:
            host.log("refused", method=name, role=caller, reason="not of the schema")
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not of the schema: {error}")

    def handler(name: str, method: Method) -> grpc.RpcMethodHandler:
        target = getattr(host, name)

        def unary(content: bytes, context: grpc.ServicerContext) -> bytes:
            def call() -> bytes:
                message = decode(content, method.message)
                return m.encode(target(message, context) if method.waits else target(message))

            return guarded(name, method, context, call)

        def stream_in(contents: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
            def call() -> bytes:
                header = decode(next(contents, b""), method.message)
                return m.encode(target(header, (decode(content, m.Piece) for content in contents)))

            return guarded(name, method, context, call)

        def stream_out(content: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            def call() -> list[bytes]:
                return [m.encode(piece) for piece in target(decode(content, method.message))]

            yield from guarded(name, method, context, call)

        match method.stream:
            case "in":
                return grpc.stream_unary_rpc_method_handler(stream_in)
            case "out":
                return grpc.unary_stream_rpc_method_handler(stream_out)
            case _:
                return grpc.unary_unary_rpc_method_handler(unary)

    handlers = {name: handler(name, method) for name, method in METHODS.items()}
    # Every request that waits has a thread, and so has party 0 that waits for it; some more are for what does not wait.
    server = grpc.server(ThreadPoolExecutor(2 * cluster.limits.queue + 16), options=_options(cluster))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    credentials = grpc.ssl_server_credentials(
        [(cluster.read_file(entry.key), cluster.read_file(entry.certificate))],
        root_certificates=cluster.read_file(cluster.ca),
        require_client_auth=True,
    )
    address, port = split(entry.control)
    logging.getLogger("grpc").setLevel(logging.CRITICAL)  # an aborted call is logged here already
    try:
        bound = server.add_secure_port(f"{entry.listen or address}:{port}", credentials)
    except RuntimeError as error:
        raise OSError(f"party {entry.rank} can't listen on its control {entry.control}: is the port taken?") from error
    if not bound:
        raise OSError(f"party {entry.rank} can't listen on its control {entry.control}: is the port taken?")
    server.start()
    return server
