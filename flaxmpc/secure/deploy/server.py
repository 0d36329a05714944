"""A party's gRPC server: who may ask what, within which bounds. TLS is in front of it, see `Gate`."""

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grpc
import msgspec

from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy import rpc
from flaxmpc.secure.deploy.calls import Call, Calls, Watch
from flaxmpc.secure.deploy.cluster import ClusterFile
from flaxmpc.secure.deploy.errors import Refused
from flaxmpc.secure.deploy.gate import Caller, Inner
from flaxmpc.secure.deploy.host import Host

_QUEUED = 1024  # calls that wait to be looked at; they come and go faster than that
_IDLE_MS = 600_000  # a connection without calls ends after this; callers connect again
_AGE_MS = 3_600_000  # every other connection ends after this: its certificate is looked at again


class Method(NamedTuple):
    """The roles that may call a method, and the message that a call begins with.

    Pieces follow that where `stream` is "in", and are the answer where it is "out". A method that `waits` is given the
    Call too. A caller may have `most` calls of it at a time, where that is fewer than calls_per_client.
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
    "lease": Method(_OWNER, m.KeepLease, waits=True),
    "publish": Method(_OWNER, m.Publish, "in"),
    "commit": Method(_OWNER, m.Switch),
    "run": Method(_OWNER, m.RunProgram, "in", waits=True),
    "bundle": Method(_CLIENT, m.Names, "out", most=2),
    "infer": Method(_CLIENT, m.Infer, "in", waits=True),
    "form": Method(_LEADER, m.Form),
    "has": Method(_LEADER, m.Turn, waits=True),
    "step": Method(_LEADER, m.Turn),
    "promise": Method(_LEADER, m.Switch),
    "switch": Method(_LEADER, m.Switch),
}


def check_caller(cluster: ClusterFile, rank: int, caller: Caller | None, name: str) -> Caller:
    """The caller, if it may call the method `name` of party `rank`. Refused: it may not, or not any more."""
    role = caller.role if caller is not None else ""
    if caller is None or role not in METHODS[name].roles:
        raise Refused(grpc.StatusCode.PERMISSION_DENIED, f"a {role or 'stranger'} may not ask for {name!r}")
    if role == "client" and cluster.clients is not None and caller.name not in cluster.clients:
        reason = f"{caller.name!r} is not one of the clients that {cluster.path.name} allows"
        raise Refused(grpc.StatusCode.PERMISSION_DENIED, reason)
    if caller.expires < time.time():
        ended = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(caller.expires))
        reason = f"the certificate of {caller.name!r} ended at {ended} by the clock of party {rank}"
        raise Refused(grpc.StatusCode.UNAUTHENTICATED, reason)
    return caller


@dataclasses.dataclass(eq=False)
class _Handlers:
    """A host's methods as gRPC calls them.

    A message by itself is taken as a stream of one: it is not read before it is known who sends it.
    """

    host: Host
    inner: Inner
    calls: Calls
    log: Callable[..., None]

    def __post_init__(self):
        self._watch = Watch(self.host.cluster.timeout_seconds)

    def of(self, name: str) -> grpc.RpcMethodHandler:
        """gRPC's handler of a method."""
        if METHODS[name].stream == "out":
            return grpc.stream_stream_rpc_method_handler(functools.partial(self._stream, name))
        return grpc.stream_unary_rpc_method_handler(functools.partial(self._answer, name))

    def _answer(self, name: str, contents: Iterable[bytes], context: grpc.ServicerContext) -> bytes:
        method = METHODS[name]
        with self._admitted(name, context) as call:
            received = self._watch.each(context, contents)
            arguments = self._first(name, received)
            if method.stream == "in":
                arguments.append(m.decode(content, m.Piece) for content in received)
            if method.waits:
                arguments.append(call)
            answer = getattr(self.host, name)(*arguments)
            return m.encode(m.Empty() if answer is None else answer)

    def _stream(self, name: str, contents: Iterable[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        with self._admitted(name, context):
            for piece in getattr(self.host, name)(*self._first(name, self._watch.each(context, contents))):
                with self._watch.over(context):
                    yield m.encode(piece)

    def _first(self, name: str, received: Iterator[bytes]) -> list[Any]:
        """A method's first arguments: the session, if it is asked of one, and the message. Refused: no such session."""
        message = m.decode(next(received, b""), METHODS[name].message)
        session = [self.host.sessions.require(message.session)] if isinstance(message, m.InSession) else []
        return [*session, message]

    @contextlib.contextmanager
    def _admitted(self, name: str, context: grpc.ServicerContext) -> Iterator[Call]:
        """A call while it lasts; ends it with a code and a line where it is refused."""
        caller = self.inner.caller(context.peer())
        who = {"method": name, "caller": caller.name if caller else "", "role": caller.role if caller else ""}
        try:
            caller = check_caller(self.host.cluster, self.host.rank, caller, name)
            with self.calls.one(caller, name, METHODS[name].most):
                yield Call(caller, context)
        except Refused as error:
            if context.is_active():
                self.log("refused", **who, reason=str(error))
            context.abort(error.code, str(error))
        except msgspec.MsgspecError as error:
            self.log("refused", **who, reason="not of the schema")
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not of the schema: {error}")


def start(
    host: Host, inner: Inner, calls: Calls, *, streams: int, threads: int, log: Callable[..., None]
) -> grpc.Server:
    """Starts one of a party's servers.

    Args:
        host: the party that is served.
        inner: is told where the server listens, and knows who calls.
        calls: bounds the calls at a time.
        streams: calls of one connection at a time; more of them wait at the caller.
        threads: one for each call that may wait, and some more to refuse others.
        log: is told of what is refused; limited in rate.
    """
    logging.getLogger("grpc").setLevel(logging.CRITICAL)  # an aborted call is logged here already
    handlers = _Handlers(host, inner, calls, log)
    server = grpc.server(
        ThreadPoolExecutor(threads),
        options=_options(host.cluster, streams),
        maximum_concurrent_rpcs=threads + _QUEUED,
    )
    methods = {name: handlers.of(name) for name in METHODS}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(rpc.SERVICE, methods),))
    inner.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"  # behind a gate
    server.start()
    return server


def _options(cluster: ClusterFile, streams: int) -> list[tuple[str, Any]]:
    return [
        *rpc.channel_options(cluster, rpc.LARGEST_MESSAGE),
        ("grpc.max_concurrent_streams", streams),
        ("grpc.http2.bdp_probe", 0),  # else a caller that sends fast is granted ever more that is sent unread
        ("grpc.http2.lookahead_bytes", rpc.LARGEST_MESSAGE),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a small message may inflate to a large one
        ("grpc.server_handshake_timeout_ms", int(cluster.timeout_seconds * 1000)),
        ("grpc.max_connection_idle_ms", _IDLE_MS),
        ("grpc.max_connection_age_ms", _AGE_MS),
        ("grpc.max_connection_age_grace_ms", _AGE_MS),
    ]
