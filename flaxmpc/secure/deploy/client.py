"""A cluster of computing hosts as the owner of a model, or a client, reaches it."""

from __future__ import annotations

import collections
import contextlib
import queue
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from flaxmpc.secure._spu import SecureError, load_spu
from flaxmpc.secure.cost import Cost, Profile
from flaxmpc.secure.deploy.programs import compile_program
from flaxmpc.secure.party import Parties, Resident, to_arrays

if TYPE_CHECKING:
    from flaxmpc.secure.deploy import messages as m
    from flaxmpc.secure.deploy.cluster import ClusterFile


_POLL = 0.1  # seconds


class Answer(NamedTuple):
    """What a model answered: arrays, opened here and nowhere else, and what it cost the parties."""

    outputs: list[np.ndarray]
    cost: Cost


class Cluster(Parties):
    """Parties on other hosts. Shares are made and opened here; each party is sent its own only.

    with secure.Cluster("cluster.toml", "owner") as parties:
        f = secure.jit(fn, parties=parties)
    """

    def __init__(self, cluster: ClusterFile | str | Path, role: str = "owner"):
        """Connects to all parties and waits until they are ready.

        Args:
            cluster: the file, or what was read of it.
            role: "owner" may store values, run functions and publish models; "client" may ask models.

        Raises:
            ValueError: the file says something that is not allowed, names no certificate for the role, or one that is
                not right.
            SecureError: a party can't be reached, or the group did not form, within the file's timeout_seconds.
        """
        from flaxmpc.secure.deploy import certificates, rpc
        from flaxmpc.secure.deploy.cluster import ClusterFile

        self.cluster = cluster if isinstance(cluster, ClusterFile) else ClusterFile.read(cluster)
        identity = self.cluster.identity(role)
        certificates.check_identity(self.cluster, role)
        super().__init__(self.cluster.config)
        self._peers = [rpc.Peer(self.cluster, identity, entry) for entry in self.cluster.party]
        self._doomed: collections.deque[str] = collections.deque()
        self._session = ""
        self._lease = secrets.token_hex(16)  # under which the parties hold what is stored
        self._owns = role == "owner"
        self._closed = threading.Event()
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        if self._owns:
            period = self.cluster.timeout_seconds / 4
            threading.Thread(target=_hold, args=(weakref.ref(self), self._closed, period), daemon=True).start()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections. The parties free the values that were stored, but for those of models."""
        from flaxmpc.secure.deploy import messages as m

        if not self._closed.is_set() and self._session and self._owns:
            with contextlib.suppress(SecureError):  # else they do once the lease has run out
                self._all("lease", self._same(m.Lease(self._session, self._lease, ends=True)), m.Empty)
        self._closed.set()
        for peer in self._peers:
            peer.close()

    @property
    def session(self) -> str:
        return self._session

    @property
    def bytes_sent(self) -> int:
        """What was sent to all parties since the start, before TLS."""
        return sum(peer.bytes_sent for peer in self._peers)

    def _wait_until_ready(self) -> None:
        from flaxmpc.secure.deploy import messages as m

        end = time.monotonic() + self.cluster.timeout_seconds
        while True:
            error = None
            try:
                every = self._all("status", [m.Empty()] * len(self._peers), m.Status)
            except SecureError as failed:
                error = failed
            else:
                sessions = {status.session for status in every}
                if len(sessions) == 1 and "" not in sessions:
                    self._session = sessions.pop()
                    return
                waiting = next((status for status in every if status.state != "ready"), every[0])
                error = SecureError(f"party {waiting.rank} is not ready: {waiting.state}")
            if time.monotonic() > end:
                raise error
            time.sleep(0.2)

    def _all(self, method: str, messages: Sequence[m.Message], kind: type[Any]) -> list[Any]:
        """Asks every party at the same time, each with its own message."""
        timeout = self.cluster.timeout_seconds
        futures = [
            peer.ask_later(method, message, timeout) for peer, message in zip(self._peers, messages, strict=True)
        ]
        return self._gather(futures, kind)

    def _send(self, method: str, header: m.Message, streams: Sequence[Iterable[m.Piece]], kind: type[Any]) -> list[Any]:
        """Sends every party the same header, and a stream of its own, at the same time; waits as long as it takes."""
        futures = [peer.send_later(method, header, stream) for peer, stream in zip(self._peers, streams, strict=True)]
        return self._gather(futures, kind)

    def _gather(self, futures: Sequence[Any], kind: type[Any]) -> list[Any]:
        """All answers; at the first error, of a call or in an answer, the other calls end too.

        They might not end by themselves: a request that party 0 has given up waits at the others.
        """
        import grpc

        from flaxmpc.secure.deploy import messages as m
        from flaxmpc.secure.deploy import rpc

        ended: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        for rank, future in enumerate(futures):
            future.add_done_callback(lambda future, rank=rank: ended.put((rank, future)))
        answers: dict[int, Any] = {}
        try:
            while len(answers) < len(futures):
                rank, future = ended.get()
                if future.exception() is not None:
                    break
                answer = answers[rank] = rpc.decode(future.result(), kind)
                if isinstance(answer, m.Answer) and answer.error is not None:
                    raise SecureError(answer.error)
            failed = [
                (rank, future.exception())
                for rank, future in enumerate(futures)
                if future.done() and future.exception() is not None
            ]
        finally:
            for future in futures:
                future.cancel()
        if failed:
            # A party that refuses says more than one that can't be reached.
            rank, error = min(failed, key=lambda pair: pair[1].code() is grpc.StatusCode.UNAVAILABLE)
            raise SecureError(rpc.describe(self.cluster.party[rank], error)) from error
        return [answers[rank] for rank in range(len(futures))]

    def _refresh(self) -> None:
        """After an error: the session that the parties are in, if they are."""
        from flaxmpc.secure.deploy import messages as m

        try:
            every = self._all("status", [m.Empty()] * len(self._peers), m.Status)
        except SecureError:
            self._session = ""
        else:
            self._session = every[0].session

    def _same(self, message: m.Message) -> list[m.Message]:
        return [message] * len(self._peers)

    def _sweep(self) -> None:
        """Frees what was dropped since."""
        from flaxmpc.secure.deploy import messages as m

        names = []
        while self._doomed:
            names.append(self._doomed.popleft())
        if names:
            self._all("delete", self._same(m.Names(self._session, names)), m.Empty)

    def store(self, name: str, shares: Sequence[Any]) -> None:
        from flaxmpc.secure.deploy import messages as m
        from flaxmpc.secure.deploy import streams

        self._sweep()
        each = [streams.of_shares({name: m.Share.pack(share)}) for share in shares]
        self._send("store", m.Stored(self._session, self._lease), each, m.Empty)

    def fetch(self, name: str) -> list[Any]:
        from flaxmpc.secure.deploy import messages as m

        answers = self._all("fetch", self._same(m.Names(self._session, [name])), m.Answer)
        return self._results(answers, [None])[0]

    def _results(self, answers: Sequence[m.Answer], arrays: Sequence[m.Array | None]) -> list[list[Any]]:
        """The spu Shares of each result, as the parties sent them. SecureError: they sent something else."""
        from flaxmpc.secure.deploy import shares

        results = []
        for rank, answer in enumerate(answers):
            if len(answer.shares) != len(arrays):
                raise SecureError(f"party {rank} sent {len(answer.shares)} results, not {len(arrays)}")
        for i, array in enumerate(arrays):
            sent = [answer.shares[i] for answer in answers]
            try:
                shares.check_result(sent, array, self.config)
            except ValueError as error:
                raise SecureError(f"result {i} can't be opened: {error}") from error
            results.append([share.unpack() for share in sent])
        return results

    def delete(self, names: Sequence[str]) -> None:
        self._doomed.extend(names)

    def run(self, executable: Any) -> tuple[float, Profile]:
        from flaxmpc.secure.deploy import messages as m
        from flaxmpc.secure.deploy import streams

        self._sweep()
        code = executable.code if isinstance(executable.code, bytes) else executable.code.encode()
        header = m.Run(
            self._session,
            self._lease,
            secrets.token_hex(16),
            list(executable.input_names),
            list(executable.output_names),
        )
        answers = self._run("run", header, [streams.of_contents([code]) for _ in self._peers])
        return max(answer.seconds for answer in answers), _profile(answers)

    def _run(self, method: str, header: m.Message, streams: Sequence[Iterable[m.Piece]]) -> list[m.Answer]:
        from flaxmpc.secure.deploy import messages as m

        try:
            return self._send(method, header, streams, m.Answer)
        except SecureError:
            self._refresh()
            raise

    def program(
        self, fn: Callable[..., Any], weights: Resident, *inputs: Any, length: int, shared_reciprocal: bool = False
    ) -> m.Program:
        """Compiles a function for `publish`; see `flaxmpc.secure.deploy.programs.compile_program`."""
        return compile_program(self.cluster, fn, weights, *inputs, length=length, shared_reciprocal=shared_reciprocal)

    def publish(self, name: str, weights: Resident, programs: Mapping[str, m.Program], bundle: bytes) -> str:
        """Makes stored weights a model that clients may ask.

        First every party keeps all of it, on disk too if it keeps shares. Only then it takes the place of the one
        before, at all of them: a put that fails or is interrupted leaves that as it was.

        Args:
            name: of the model; one of that name is replaced.
            weights: put on these parties; they hold them from now on, whatever becomes of this object.
            programs: of (weights, inputs), by name; see `program`.
            bundle: what clients need in the clear.

        Returns:
            The hash of this put.

        Raises:
            SecureError: a party refuses: the name, a program's size, or its disk is full. Or it can't be reached.
            ValueError: `weights` are not held by these parties.
        """
        from flaxmpc.secure.deploy import messages as m
        from flaxmpc.secure.deploy import streams

        weights.check(self)
        salt = secrets.token_bytes(32)  # a plain hash of secret weights would tell whether they are some known ones
        hash_ = m.digest(salt, *(program.code for program in programs.values()), bundle)
        model = m.Publish(self._session, self._lease, name, hash_, weights.names, dict(programs))
        header, contents = streams.of_model(model, bundle)
        futures = [peer.send_later("publish", header, streams.of_contents(contents)) for peer in self._peers]
        for future in futures:
            future.exception()  # until it has ended: a party that is still at it would keep the put later
        try:
            self._gather(futures, m.Empty)
            self._gather([self._peers[0].ask_later("commit", m.Switch(self._session, hash_))], m.Empty)
        except SecureError:
            self._refresh()
            self.delete([hash_])  # where it was kept
            with contextlib.suppress(SecureError):
                self._sweep()
            raise
        return hash_

    def models(self) -> dict[str, m.Model]:
        """The models that can be asked: those of which all parties hold the same put.

        Raises:
            SecureError: a party can't be reached.
        """
        return _alike(self._models_of_each())

    def _models_of_each(self) -> list[dict[str, m.Model]]:
        from flaxmpc.secure.deploy import messages as m

        every: list[m.Status] = self._all("status", self._same(m.Empty()), m.Status)
        self._session = every[0].session
        return [status.models for status in every]

    def find(self, name: str | None) -> tuple[str, m.Model]:
        """A model by name, or the only one. SecureError: there is no such, with those there are."""
        end = time.monotonic() + self.cluster.timeout_seconds
        while True:
            each = self._models_of_each()
            models = _alike(each)
            if name is None and len(models) == 1:
                return next(iter(models.items()))
            if name is not None and name in models:
                return name, models[name]
            unlike = _unlike(each, name)
            if not unlike or time.monotonic() > end:
                break
            time.sleep(_POLL)  # they may be about to switch to another put
        which = f"model {name!r}" if name else "one model only"
        raise SecureError(
            f"the parties do not hold {which} {unlike or '(they have ' + (', '.join(models) or 'none') + ')'}: "
            "was a party restarted? The owner puts it again with `flaxmpc put`"
        )

    def bundle(self, name: str, model: m.Model) -> bytes:
        """What clients need of a model in the clear. SecureError: it is not what all parties have, or too large."""
        import grpc

        from flaxmpc.secure.deploy import messages as m
        from flaxmpc.secure.deploy import rpc

        most = self.cluster.limits.max_request_bytes
        if model.bundle_bytes > most:
            raise SecureError(f"the bundle of {name!r} has {model.bundle_bytes} bytes; max_request_bytes is {most}")
        content = bytearray()
        try:
            for piece in self._peers[0].receive("bundle", m.Names(self._session, [name])):
                content += piece.content
                if len(content) > model.bundle_bytes:
                    break
        except grpc.RpcError as error:
            raise SecureError(rpc.describe(self.cluster.party[0], error)) from error
        content = bytes(content)
        if m.digest(content) != model.bundle:
            raise SecureError(f"party 0 sent another bundle of {name!r} than the parties agreed on")
        return content

    def infer(self, name: str, model: m.Model, program: str, inputs: Any) -> Answer:
        """Asks a model.

        Args:
            name, model: see `find`.
            program: one of `model.programs`.
            inputs: a pytree of arrays, whose leaves are the program's inputs.

        Raises:
            ValueError, TypeError: inputs of other shapes, or without a fixed-point encoding.
            SecureError: the parties refuse or fail; says why.
        """
        from flaxmpc.secure.deploy import messages as m
        from flaxmpc.secure.deploy import streams

        spu = load_spu()
        signature = model.programs[program]
        arrays = jax.tree.leaves(to_arrays(inputs, self.config, "inputs"))
        given = [(array.shape, array.dtype.name) for array in arrays]
        needed = [(each.shape, each.dtype) for each in signature.inputs]
        if given != needed:
            raise ValueError(f"program {program} takes {needed}, not {given}")
        if any(each.visibility != "secret" for each in signature.inputs):
            raise SecureError(f"program {program} would take inputs that every party may see")
        shares = [self._io.make_shares(array, spu.Visibility.VIS_SECRET) for array in arrays]
        header = m.Infer(self._session, secrets.token_hex(16), name, model.hash, program)
        given = [
            {str(i): m.Share.pack(each[rank]) for i, each in enumerate(shares)} for rank in range(len(self._peers))
        ]
        answers = self._run("infer", header, [streams.of_shares(each) for each in given])
        outputs = [
            np.asarray(self._reconstruct(result), each.dtype).reshape(each.shape)
            for result, each in zip(self._results(answers, signature.outputs), signature.outputs, strict=True)
        ]
        seconds = max(answer.seconds for answer in answers)
        return Answer(outputs, Cost.from_profile(self.config, _profile(answers), seconds, 0.0))


def _alike(each: Sequence[Mapping[str, m.Model]]) -> dict[str, m.Model]:
    """Of what each party holds, that which all hold the same put of."""
    first, *others = each
    return {name: model for name, model in first.items() if all(held.get(name) == model for held in others)}


def _unlike(each: Sequence[Mapping[str, m.Model]], name: str | None) -> str:
    """Which put of a model, by default of any, one party holds and another does not; empty if there is no such."""
    from flaxmpc.secure.deploy import messages as m

    for name_ in [name] if name else sorted(set().union(*each)):
        puts = [{"put": held[name_].hash} if name_ in held else {} for held in each]
        for rank, put in enumerate(puts):
            if put != puts[0]:
                return f"alike: party {rank} differs from party 0: {m.difference(puts[0], put)}"
    return ""


def _hold(cluster: weakref.ref[Cluster], closed: threading.Event, period: float) -> None:
    """Keeps a call at every party that holds an owner's lease, until the owner is closed or forgotten."""
    import grpc

    from flaxmpc.secure.deploy import messages as m

    calls: dict[int, tuple[str, Any]] = {}
    while (owner := cluster()) is not None:
        for rank, peer in enumerate(owner._peers):
            session, call = calls.get(rank, ("", None))
            lost = call is None or (call.done() and call.code() is not grpc.StatusCode.ABORTED)  # it knows the session
            if lost or session != owner.session:
                with contextlib.suppress(ValueError):  # closed just now
                    calls[rank] = owner.session, peer.ask_later("lease", m.Lease(owner.session, owner._lease))
        del owner
        if closed.wait(period):
            return


def _profile(answers: Sequence[m.Answer]) -> Profile:
    """The parties' profiles as one."""
    ops: dict[str, tuple[int, float, int, int]] = {}
    for answer in answers:
        for name, op in answer.ops.items():
            old = ops.get(name, (0, 0.0, 0, 0))
            ops[name] = (
                old[0] + op.count, old[1] + op.seconds, old[2] + op.bytes_sent, old[3] + op.rounds,
            )  # fmt: skip
    return Profile(tuple((answer.bytes_sent, answer.rounds) for answer in answers), ops)
