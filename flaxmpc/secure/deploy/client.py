"""A cluster of computing hosts as the owner of a model, or a client, reaches it."""

from __future__ import annotations

import collections
import contextlib
import operator
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import jax
import numpy as np

from flaxmpc.secure._spu import SecureError, load_spu
from flaxmpc.secure.cost import Cost, Profile
from flaxmpc.secure.deploy import certificates, rpc, streams
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.cluster import ClusterFile
from flaxmpc.secure.deploy.programs import compile_program
from flaxmpc.secure.deploy.shares import check_result
from flaxmpc.secure.party import Parties, Resident, to_arrays

_POLL = 0.1  # seconds


class Inferred(NamedTuple):
    """A model's answer: arrays, opened here and nowhere else, and what they cost the parties."""

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
        self.cluster = cluster if isinstance(cluster, ClusterFile) else ClusterFile.read(cluster)
        identity = self.cluster.identity(role)
        certificates.check_identity(self.cluster, role)
        super().__init__(self.cluster.config)
        self._peers = rpc.Peers(self.cluster, identity)
        self._digests: weakref.WeakKeyDictionary[Resident, str] = weakref.WeakKeyDictionary()
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
        if not self._closed.is_set() and self._session and self._owns:
            with contextlib.suppress(SecureError):  # else they do once the lease has run out
                self._peers.ask("lease", m.KeepLease(self._session, self._lease, ends=True), m.Empty)
        self._closed.set()
        self._peers.close()

    @property
    def bytes_sent(self) -> int:
        """Bytes that were sent to all parties since the start, before TLS."""
        return sum(peer.bytes_sent for peer in self._peers)

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + self.cluster.timeout_seconds
        while True:
            try:
                every = self._peers.statuses()
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

    def _refresh(self) -> None:
        """After an error, finds out which session the parties are in, if they are."""
        try:
            self._session = self._peers.statuses()[0].session
        except SecureError:
            self._session = ""

    def _sweep(self) -> None:
        """Frees what was deleted since."""
        if names := self._take_deleted():
            self._peers.ask("delete", m.Names(self._session, names), m.Empty)

    def put(self, tree: Any, visibility: str = "secret") -> Resident:
        arrays = to_arrays(tree, self.config)
        resident = super().put(arrays, visibility)
        self._digests[resident] = m.digest(*(m.digest(leaf.tobytes()).encode() for leaf in jax.tree.leaves(arrays)))
        return resident

    def store(self, name: str, shares: Sequence[Any]) -> None:
        self._sweep()
        each = [streams.of_shares({name: m.Share.pack(share)}) for share in shares]
        self._peers.send("store", m.Stored(self._session, self._lease), each, m.Empty)

    def fetch(self, name: str) -> list[Any]:
        answers = self._peers.ask("fetch", m.Names(self._session, [name]), m.Answer)
        return self._results(answers, [None])[0]

    def _results(self, answers: Sequence[m.Answer], arrays: Sequence[m.Array | None]) -> list[list[Any]]:
        """The spu Shares of each result, as the parties sent them. SecureError: they sent something else."""
        results = []
        for rank, answer in enumerate(answers):
            if len(answer.shares) != len(arrays):
                raise SecureError(f"party {rank} sent {len(answer.shares)} results, not {len(arrays)}")
        for i, array in enumerate(arrays):
            sent = [answer.shares[i] for answer in answers]
            try:
                check_result(sent, array, self.config)
            except ValueError as error:
                raise SecureError(f"result {i} can't be opened: {error}") from error
            results.append([share.unpack() for share in sent])
        return results

    def run(self, executable: Any) -> tuple[float, Profile]:
        self._sweep()
        code = executable.code if isinstance(executable.code, bytes) else executable.code.encode()
        names = (list(executable.input_names), list(executable.output_names))
        header = m.RunProgram(self._session, self._lease, secrets.token_hex(16), *names)
        answers = self._run("run", header, [streams.of_contents([code]) for _ in self._peers])
        return max(answer.seconds for answer in answers), _profile(answers)

    def _run(self, method: str, header: m.Message, contents: Sequence[Iterable[m.Piece]]) -> list[m.Answer]:
        try:
            return self._peers.send(method, header, contents, m.Answer)
        except SecureError:
            self._refresh()
            raise

    def program(self, fn: Callable[..., Any], weights: Resident, *inputs: Any, length: int) -> m.ModelProgram:
        """Compiles a function for `publish`; see `flaxmpc.secure.deploy.programs.compile_program`."""
        return compile_program(self.cluster, fn, weights, *inputs, length=length)

    def publish(self, name: str, weights: Resident, programs: Mapping[str, m.ModelProgram], bundle: bytes) -> str:
        """Makes stored weights a model that clients may ask.

        First every party keeps all of it, on disk too if it keeps shares. Only then it takes the place of the one
        before, at all of them: a put that fails or is interrupted leaves that as it was.

        Args:
            name: the model's; one of that name is replaced.
            weights: those that `put` gave; the parties hold them from now on, whatever becomes of this object.
            programs: what `program` made of functions of (weights, *inputs), by name.
            bundle: bytes that clients need in the clear.

        Returns:
            The hash of this put.

        Raises:
            SecureError: a party refuses: the name, a program's size, or its disk is full. Or it can't be reached.
            ValueError: `weights` are not held by these parties.
        """
        weights.check(self)
        salt = secrets.token_bytes(32)  # a plain hash of secret weights would tell whether they are some known ones
        digests = [self._digests[weights], *(f"{name} {program.digest}" for name, program in programs.items())]
        hash_ = m.digest(salt, *map(str.encode, digests), bundle)
        model = m.Publish(self._session, self._lease, name, hash_, weights.names, dict(programs))
        header, contents = streams.of_model(model, bundle)
        futures = [peer.send_later("publish", header, streams.of_contents(contents)) for peer in self._peers]
        for future in futures:
            future.exception()  # until it has ended: a party that is still at it would keep the put later
        try:
            self._peers.gather(futures, m.Empty)
            self._peers.gather([self._peers[0].ask_later("commit", m.Switch(self._session, hash_))], m.Empty)
        except SecureError:
            self._refresh()
            self.delete([hash_])  # where it was kept
            with contextlib.suppress(SecureError):
                self._sweep()
            raise
        return hash_

    def find(self, name: str | None) -> tuple[str, m.PublicModel]:
        """A model by name, or the only one. SecureError: there is no such, with those there are."""
        end = time.monotonic() + self.cluster.timeout_seconds
        while True:
            every = self._peers.statuses()
            self._session = every[0].session
            each = [status.models for status in every]
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

    def bundle(self, name: str, model: m.PublicModel) -> bytes:
        """A model's bundle; waits while others with this certificate fetch as many as a party sends at a time.

        Raises:
            SecureError: it is not the one that all parties have, or too large; or there was no room within the
                cluster's timeout_seconds.
        """
        most = self.cluster.limits.max_request_bytes
        if model.bundle_bytes > most:
            raise SecureError(f"the bundle of {name!r} has {model.bundle_bytes} bytes; max_request_bytes is {most}")
        end = time.monotonic() + self.cluster.timeout_seconds
        while True:
            try:
                content = self._received(name, model)
                break
            except rpc.NO_ANSWER as error:
                full = isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                if not full or time.monotonic() > end:
                    raise SecureError(rpc.describe(self.cluster.party[0], error)) from error
            time.sleep(_POLL)
        if m.digest(content) != model.bundle:
            raise SecureError(f"party 0 sent another bundle of {name!r} than the parties agreed on")
        return content

    def _received(self, name: str, model: m.PublicModel) -> bytes:
        """The bundle as party 0 sends it, to little more than the size that it has; rpc.NO_ANSWER."""
        content = bytearray()
        for piece in self._peers[0].receive("bundle", m.Names(self._session, [name])):
            content += piece.content
            if len(content) > model.bundle_bytes:
                break
        return bytes(content)

    def infer(self, name: str, model: m.PublicModel, program: str, inputs: Any) -> Inferred:
        """Asks a model.

        Args:
            name, model: those that `find` gave.
            program: one of `model.programs`.
            inputs: a pytree of arrays, whose leaves are the program's inputs.

        Raises:
            ValueError, TypeError: inputs of other shapes, or without a fixed-point encoding.
            SecureError: the parties refuse or fail; says why.
        """
        signature = model.programs[program]
        arrays = self._checked(inputs, program, signature)
        secret = load_spu().Visibility.VIS_SECRET
        shares = [self._io.make_shares(array, secret) for array in arrays]
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
        return Inferred(outputs, Cost.from_profile(self.config, _profile(answers), seconds, 0.0))

    def _checked(self, inputs: Any, name: str, program: m.ModelProgram) -> list[np.ndarray]:
        """The leaves of `inputs`, if they are what a program takes; raises as `infer` does."""
        arrays = jax.tree.leaves(to_arrays(inputs, self.config, "inputs"))
        given = [(array.shape, array.dtype.name) for array in arrays]
        needed = [(each.shape, each.dtype) for each in program.inputs]
        if given != needed:
            raise ValueError(f"program {name} takes {needed}, not {given}")
        if any(each.visibility != "secret" for each in program.inputs):
            raise SecureError(f"program {name} would take inputs that every party may see")
        return arrays


def _alike(each: Sequence[Mapping[str, m.PublicModel]]) -> dict[str, m.PublicModel]:
    """The models that all parties hold the same put of, out of what each of them holds."""
    first, *others = each
    return {name: model for name, model in first.items() if all(held.get(name) == model for held in others)}


def _unlike(each: Sequence[Mapping[str, m.PublicModel]], name: str | None) -> str:
    """Says which put of a model (by default any) one party holds and another does not; empty if there is no such."""
    for name_ in [name] if name else sorted(set().union(*each)):
        puts = [{"put": held[name_].hash} if name_ in held else {} for held in each]
        for rank, put in enumerate(puts):
            if put != puts[0]:
                return f"alike: party {rank} differs from party 0: {m.difference(puts[0], put)}"
    return ""


def _hold(cluster: weakref.ref[Cluster], closed: threading.Event, period: float) -> None:
    """Keeps a call at every party that holds an owner's lease, until the owner is closed or forgotten."""
    calls: dict[int, tuple[str, Any]] = {}
    while (owner := cluster()) is not None:
        for rank, peer in enumerate(owner._peers):
            session, call = calls.get(rank, ("", None))
            lost = call is None or (call.done() and call.code() is not grpc.StatusCode.ABORTED)  # it knows the session
            if lost or session != owner.session:
                with contextlib.suppress(ValueError):  # closed just now
                    calls[rank] = owner.session, peer.ask_later("lease", m.KeepLease(owner.session, owner._lease))
        del owner
        if closed.wait(period):
            return


def _profile(answers: Sequence[m.Answer]) -> Profile:
    """Adds the parties' profiles up."""
    ops: dict[str, Any] = collections.defaultdict(lambda: (0, 0.0, 0, 0))
    for answer in answers:
        for name, op in answer.ops.items():
            ops[name] = tuple(map(operator.add, ops[name], op))
    return Profile(tuple((answer.bytes_sent, answer.rounds) for answer in answers), dict(ops))
