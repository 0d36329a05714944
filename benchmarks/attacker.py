"""A hostile client of a cluster, a process of its own; attacks.py starts it.

    python benchmarks/attacker.py CLUSTER NAME SECONDS

Repeats one attack until the time is over, with the certificate of [client] in CLUSTER. It prints a line when it is
connected, and at the end as JSON how many tries there were, and how they ended. NAME is one of

    rows         fewer rows than the program takes, or more, alike to all parties: to shift the parts of a joint run
    shares       shares that are not what they say, or not what the program takes: dimensions whose product wraps, other
                 dtypes, public ones, other bytes
    unread       bundles that nobody reads, requests that stop in the middle, and messages of 257 MB, over many
                 connections; compressed zeros
    absent       requests that only some parties are sent, more than one client may have; then as many true ones
"""

import collections
import contextlib
import faulthandler
import itertools
import json
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from flaxmpc import secure
from flaxmpc.secure._spu import load_spu
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy import streams
from flaxmpc.secure.deploy.cluster import ClusterFile

_PATIENCE = 10.0  # seconds that an answer is waited for
_STILL = 5.0  # seconds that calls stand still for
_HANGS = 120.0  # seconds more than it was given, after which it ends itself and says where it was
_LARGE = 257 << 20
_CROWD = 64  # requests at once

Request = Sequence[Sequence[m.Share]]  # for each party, its share of each input


class Attacker:
    """A client with a true certificate that does not keep to the rules."""

    def __init__(self, cluster: ClusterFile):
        self.cluster = cluster
        self.ended: collections.Counter[str] = collections.Counter()
        self.replies: collections.Counter[str] = collections.Counter()
        self.client = secure.Cluster(cluster, "client")
        self.peers = self.client._peers
        self.look()

    def look(self) -> None:
        """At the session, and the model."""
        self.name, self.model = self.client.find(None)
        self.program, self.signature = next(iter(self.model.programs.items()))

    def count(self, kind: str, reply: str) -> None:
        """One try, and how it ended: without numbers, to be counted together."""
        self.ended[kind] += 1
        self.replies[re.sub(r"[0-9a-f]{16,}|\d+", "N", reply)[:160]] += 1

    def end(self, call: Any, patience: float = _PATIENCE) -> None:
        """Waits for the end of a call, and counts it."""
        try:
            answer = m.decode(call.result(timeout=patience), m.Answer)
        except grpc.RpcError as error:
            self.refused(error)
        except (grpc.FutureTimeoutError, grpc.FutureCancelledError):
            call.cancel()
            self.count("unanswered", "no answer")
        else:
            self.count("refused" if answer.error else "answered", answer.error or "answered")

    def refused(self, error: Any) -> None:
        self.count("refused", f"{error.code().name}: {error.details()}")

    def share(self, arrays: Iterable[np.ndarray], visibility: str = "SECRET") -> Request:
        seen = load_spu().parse_visibility(f"VIS_{visibility}")
        each = [self.client._io.make_shares(array, seen) for array in arrays]
        return [[m.Share.pack(shares[rank]) for shares in each] for rank in range(len(self.peers))]

    def ask(self, shares: Request, ranks: Iterable[int]) -> list[Any]:
        """Sends a request to some parties; calls that wait for their answers."""
        header = m.Infer(self.client.session, secrets.token_hex(16), self.name, self.model.hash, self.program)
        named = [{str(i): share for i, share in enumerate(own)} for own in shares]
        return [self.peers[rank].send_later("infer", header, streams.of_shares(named[rank])) for rank in ranks]

    def ask_all(self, shares: Request) -> None:
        for call in self.ask(shares, range(len(self.peers))):
            self.end(call)

    def inputs(self, axis: int = 0, more: int = 0) -> list[np.ndarray]:
        """Zeros of the program's shapes, with `more` along an axis where they have it."""
        shapes = [list(array.shape) for array in self.signature.inputs]
        for shape in shapes:
            shape[axis : axis + 1] = [max(0, size + more) for size in shape[axis : axis + 1]]
        return [np.zeros(shape, array.dtype) for shape, array in zip(shapes, self.signature.inputs, strict=True)]

    @contextlib.contextmanager
    def connection(self, rank: int) -> Iterator[grpc.Channel]:
        """A connection of its own to a party, with no limits at this end."""
        identity, entry = self.cluster.identity("client"), self.cluster.party[rank]
        credentials = grpc.ssl_channel_credentials(
            *map(self.cluster.read_file, (self.cluster.ca, identity.key, identity.certificate))
        )
        options = [
            ("grpc.ssl_target_name_override", entry.name),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_send_message_length", -1),
        ]
        with grpc.secure_channel(entry.control, credentials, options) as channel:
            yield channel


def rows(attacker: Attacker) -> None:
    for axis, more in itertools.product((0, 1), (-1, 1)):
        attacker.ask_all(attacker.share(attacker.inputs(axis, more)))


def shares(attacker: Attacker) -> None:
    right = attacker.share(attacker.inputs())
    first, *others = attacker.inputs()
    for request in (
        *(_with_shape(right, dims) for dims in ((1 << 32, 1 << 32), (*first.shape, 1 << 61, 8), (-1,), (1 << 62,))),
        *(attacker.share([first.astype(dtype), *others]) for dtype in (np.int32, np.bool_, np.int64)),
        attacker.share([first, *others], "PUBLIC"),
        _with_first(right, lambda share: m.Share(secrets.token_bytes(40), share.chunks)),
        _with_first(right, lambda share: m.Share(share.meta, [secrets.token_bytes(64)])),
        _with_first(right, lambda share: m.Share(share.meta, share.chunks * 2)),
        [own[::-1] for own in right],
        [own[1:] for own in right],
    ):
        attacker.ask_all(request)


def _with_first(request: Request, change: Callable[[m.Share], m.Share]) -> Request:
    """The same with the first share of each party changed."""
    return [[change(own[0]), *own[1:]] for own in request]


def _with_shape(request: Request, dims: Sequence[int]) -> Request:
    """The same; the first share says that it has other dimensions."""

    def change(share: m.Share) -> m.Share:
        meta = load_spu().ValueMeta()
        meta.ParseFromString(share.meta)
        meta.shape = list(dims)
        return m.Share(meta.SerializeToString(), share.chunks)

    return _with_first(request, change)


def unread(attacker: Attacker) -> None:
    session, name, model = attacker.client.session, attacker.name, attacker.model
    bundles = m.encode(m.Names(session, [name] * 20))
    header = m.encode(m.Infer(session, secrets.token_hex(16), name, model.hash, attacker.program))
    over = threading.Event()

    def begun() -> Iterator[bytes]:
        yield header
        over.wait()

    with contextlib.ExitStack() as stack:
        channels = [stack.enter_context(attacker.connection(rank)) for _ in range(4) for rank in range(3)]
        stack.callback(over.set)
        calls = []
        for channel in channels:
            calls += [channel.unary_stream("/flaxmpc.Party/bundle")(bundles) for _ in range(25)]
        for channel in channels[:3]:
            calls += [channel.stream_unary("/flaxmpc.Party/infer").future(begun()) for _ in range(4)]
        for number, method in enumerate(("infer", "status", "bundle")):
            channel = stack.enter_context(attacker.connection(number))
            attacker.end(channel.stream_unary(f"/flaxmpc.Party/{method}").future(iter([bytes(_LARGE)])))
            try:  # not as a future, which would not be compressed
                channel.stream_unary(f"/flaxmpc.Party/{method}")(
                    iter([bytes(_LARGE)]), timeout=_PATIENCE, compression=grpc.Compression.Gzip
                )
            except grpc.RpcError as error:
                attacker.refused(error)
            else:
                attacker.count("answered", "answered")
        time.sleep(_STILL)
        for call in calls:
            if call.is_active():
                attacker.count("unanswered", "stood still")
                call.cancel()
            else:
                attacker.refused(call)


def absent(attacker: Attacker) -> None:
    given = attacker.share(attacker.inputs())
    for ranks in ([1, 2], [0], [0, 1]):
        lonely = [call for _ in range(_CROWD) for call in attacker.ask(given, ranks)]
        time.sleep(_STILL)
        for call in lonely:
            attacker.end(call, 0)
    end = time.monotonic() + _PATIENCE
    crowd: collections.deque[Any] = collections.deque()
    while time.monotonic() < end:
        while len(crowd) < _CROWD * len(attacker.peers):
            crowd += attacker.ask(given, range(len(attacker.peers)))
        attacker.end(crowd.popleft())
    for call in crowd:
        attacker.end(call, max(0.0, end + _PATIENCE - time.monotonic()))


ATTACKS: Mapping[str, Callable[[Attacker], None]] = {
    "rows": rows,
    "shares": shares,
    "unread": unread,
    "absent": absent,
}


def main(cluster: str, name: str, seconds: str) -> None:
    faulthandler.dump_traceback_later(float(seconds) + _HANGS, exit=True)
    attacker = Attacker(ClusterFile.read(Path(cluster)))
    print("connected", flush=True)
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        try:
            attacker.look()
            ATTACKS[name](attacker)
        except secure.SecureError as error:
            attacker.count("refused", str(error))
            time.sleep(0.5)
    ended = {kind: attacker.ended[kind] for kind in ("refused", "answered", "unanswered")}
    replies = [f"{count}: {reply}" for reply, count in attacker.replies.most_common(8)]
    print(json.dumps({"tries": attacker.ended.total(), **ended, "replies": replies}))


if __name__ == "__main__":
    main(*sys.argv[1:])
