"""What a hostile client does to the parties of a cluster, for `deployment.py --attack`: a process of its own.

    python benchmarks/attacks.py CLUSTER NAME SECONDS

Repeats one attack until the time is over, with the certificate of [client] in cluster.toml, and prints as JSON how many
tries there were and how they ended. NAME is one of

    rows         fewer rows than the program takes, alike to all parties, then more: to shift the parts of a joint run
    shares       shares that say of themselves what is not so: dimensions whose product wraps, other dtypes, visibilities
    unread       bundles that nobody reads, over many connections, messages of 257 MB and of compressed zeros
    absent       requests that only parties 1 and 2 are sent, and as many at once as it can
"""

import collections
import contextlib
import functools
import itertools
import json
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import grpc
import numpy as np

from flaxmpc import secure
from flaxmpc.secure._spu import SecureError, load_spu
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy import rpc, streams
from flaxmpc.secure.deploy.cluster import ClusterFile

_PATIENCE = 10.0  # seconds that answers are waited for
_AT_ONCE = 64


class Attacker:
    """A client with a true certificate that does not keep to the rules."""

    def __init__(self, cluster: ClusterFile):
        self.cluster = cluster
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.tries = 0
        self.connect()

    def connect(self) -> None:
        self.client = secure.Cluster(self.cluster, "client")
        self.name, self.model = self.client.find(None)
        self.program, self.signature = next(iter(self.model.programs.items()))
        self.peers = self.client._peers

    def count(self, how: str) -> None:
        """One try, and how it ended: without numbers and names, to be counted together."""
        self.tries += 1
        self.outcomes[re.sub(r"[0-9a-f]{32}|\d+", "N", how)[:120]] += 1

    def shares(self, arrays: Iterable[np.ndarray], visibility: str = "SECRET") -> list[list[m.Share]]:
        """For each party, its shares of the arrays."""
        spu = load_spu()
        seen = spu.parse_visibility(f"VIS_{visibility}")
        each = [self.client._io.make_shares(array, seen) for array in arrays]
        return [[m.Share.pack(shares[rank]) for shares in each] for rank in range(len(self.peers))]

    def ask(self, shares: Sequence[Sequence[m.Share]], ranks: Sequence[int] | None = None) -> list[Any]:
        """Sends a request to some parties, by default to all; futures of their answers."""
        header = m.Infer(self.client.session, secrets.token_hex(16), self.name, self.model.hash, self.program)
        ranks = range(len(self.peers)) if ranks is None else ranks
        return [
            self.peers[rank].send_later(
                "infer", header, streams.of_shares({str(i): share for i, share in enumerate(shares[rank])})
            )
            for rank in ranks
        ]

    def end(self, futures: Iterable[Any]) -> None:
        """Counts how each call ends."""
        futures = list(futures)
        end = time.monotonic() + _PATIENCE
        for future in futures:
            try:
                answer = rpc.decode(future.result(timeout=max(0.0, end - time.monotonic())), m.Answer)
                self.count(answer.error or "answered")
            except grpc.RpcError as error:
                self.count(f"{error.code().name}: {error.details()}")  # pyright: ignore[reportAttributeAccessIssue]
            except (grpc.FutureTimeoutError, grpc.FutureCancelledError):
                self.count("no answer")
                future.cancel()

    def inputs(self, rows: int = 0) -> list[np.ndarray]:
        """Zeros of the program's shapes, with more rows (or fewer) than it takes."""
        return [
            np.zeros((max(0, array.shape[0] + rows), *array.shape[1:]), array.dtype) for array in self.signature.inputs
        ]


def rows(attacker: Attacker) -> None:
    for change in (-1, 1):
        attacker.end(attacker.ask(attacker.shares(attacker.inputs(change))))


def _described(attacker: Attacker) -> Iterator[list[list[m.Share]]]:
    """Shares of which one field is not what it should be."""
    spu = load_spu()
    right = attacker.shares(attacker.inputs())
    first = attacker.inputs()[0]
    wrapped = [(1 << 32, 1 << 32), (1 << 63, 2), (*first.shape, 1 << 61, 8), (-1,), (1 << 62,)]
    metas = []
    for dims in wrapped:
        meta = spu.ValueMeta()
        meta.ParseFromString(right[0][0].meta)
        meta.shape = list(dims)
        metas.append(meta.SerializeToString())
    others: list[Callable[[], list[list[m.Share]]]] = [
        *(functools.partial(_with_meta, right, meta) for meta in metas),
        *(
            functools.partial(attacker.shares, [np.zeros(first.shape, dtype), *attacker.inputs()[1:]])
            for dtype in (np.int32, np.bool_, np.int64)
        ),
        functools.partial(attacker.shares, attacker.inputs(), "PUBLIC"),
        lambda: _with_meta(right, secrets.token_bytes(40)),
        lambda: [[m.Share(share.meta, [secrets.token_bytes(64)]) for share in own] for own in right],
        lambda: [[m.Share(share.meta, [*share.chunks, *share.chunks]) for share in own] for own in right],
    ]
    for make in others:
        yield make()


def _with_meta(shares: list[list[m.Share]], meta: bytes) -> list[list[m.Share]]:
    """The same with another meta of each party's first."""
    return [[m.Share(meta, own[0].chunks), *own[1:]] for own in shares]


def shares(attacker: Attacker) -> None:
    for hostile in _described(attacker):
        attacker.end(attacker.ask(hostile))


def _channel(cluster: ClusterFile, rank: int) -> grpc.Channel:
    """A connection of its own to a party, with no limits at this end."""
    identity, entry = cluster.identity("client"), cluster.party[rank]
    credentials = grpc.ssl_channel_credentials(
        cluster.read_file(cluster.ca), cluster.read_file(identity.key), cluster.read_file(identity.certificate)
    )
    options = [
        ("grpc.ssl_target_name_override", entry.name),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
    ]
    return grpc.secure_channel(entry.control, credentials, options)


def unread(attacker: Attacker) -> None:
    session, cluster = attacker.client.session, attacker.cluster
    asked = m.encode(m.Names(session, [attacker.name] * 20))
    with contextlib.ExitStack() as stack:
        calls = []
        for number in range(12):
            channel = stack.enter_context(_channel(cluster, number % len(cluster.party)))
            calls += [channel.unary_stream("/flaxmpc.Party/bundle")(asked) for _ in range(25)]
        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
            channel = stack.enter_context(_channel(cluster, 0))
            infer = channel.unary_unary("/flaxmpc.Party/infer")
            attacker.end([infer.future(bytes(257 << 20), compression=compression, timeout=_PATIENCE)])
        time.sleep(2)
        for call in calls:
            attacker.count(call.code().name if call.done() else "open for 2 s and more, unread")
            call.cancel()


def absent(attacker: Attacker) -> None:
    given = attacker.shares(attacker.inputs())
    lonely = [attacker.ask(given, [1, 2]) for _ in range(2 * _AT_ONCE)]
    crowd = [attacker.ask(given) for _ in range(_AT_ONCE)]
    attacker.end(itertools.chain.from_iterable(crowd))
    for future in itertools.chain.from_iterable(lonely):
        future.cancel()
        attacker.count("given up")


ATTACKS: Mapping[str, Callable[[Attacker], None]] = {
    "rows": rows,
    "shares": shares,
    "unread": unread,
    "absent": absent,
}


def main(path: str, name: str, seconds: str) -> None:
    attacker = Attacker(ClusterFile.read(path))
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        try:
            ATTACKS[name](attacker)
        except SecureError as error:
            attacker.count(f"refused: {error}")
            time.sleep(0.5)
    print(json.dumps({"tries": attacker.tries, "outcomes": dict(attacker.outcomes.most_common(8))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
