"""A cluster of computing hosts as the owner of a model, or a client, reaches it."""

from __future__ import annotations

import collections
import queue
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from flaxmpc.secure._spu import SecureError, load_spu
from flaxmpc.secure.cost import Cost, Profile
from flaxmpc.secure.deploy.joint import jointly
from flaxmpc.secure.jit import jit
from flaxmpc.secure.party import Parties, Resident, to_arrays

if TYPE_CHECKING:
    from flaxmpc.secure.deploy import messages as m
    from flaxmpc.secure.deploy.cluster import ClusterFile


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
            ValueError: the file says something that is not allowed, or names no certificate for the role.
            SecureError: a party can't be reached, or the group did not form, within the file's timeout_seconds.
        """
        from flaxmpc.secure.deploy import rpc
        from flaxmpc.secure.deploy.cluster import ClusterFile

        self.cluster = cluster if isinstance(cluster, ClusterFile) else ClusterFile.read(cluster)
        identity = self.cluster.identity(role)
        super().__init__(self.cluster.config)
        self._peers = [rpc.Peer(self.cluster, identity, entry) for entry in self.cluster.party]
        self._doomed: collections.deque[str] = collections.deque()
        self._session = ""
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections; what was stored stays with the parties."""
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

    def _all(self, method: str, messages: Sequence[m.Message], kind: type[Any], *, bounded: bool = True) -> list[Any]:
        """Asks every party at the same time, each with its own message."""
        timeout = self.cluster.timeout_seconds if bounded else None
        futures = [
            peer.ask_later(method, message, timeout) for peer, message in zip(self._peers, messages, strict=True)
        ]
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
        from flaxmpc.secure.deploy import rpc

        def stream(share: Any):
            for chunk in share.share_chunks:
                yield from rpc.pieces(name, chunk, share.meta)

        self._sweep()
        header = m.Stored(self._session)
        futures = [
            peer.send_later("store", header, stream(share)) for peer, share in zip(self._peers, shares, strict=True)
        ]
        self._gather(futures, m.Empty)

    def fetch(self, name: str) -> list[Any]:
        from flaxmpc.secure.deploy import messages as m

        answers = self._all("fetch", self._same(m.Names(self._session, [name])), m.Answer)
        return [answer.shares[0].unpack() for answer in answers]

    def delete(self, names: Sequence[str]) -> None:
        self._doomed.extend(names)

    def run(self, executable: Any) -> tuple[float, Profile]:
        from flaxmpc.secure.deploy import messages as m

        self._sweep()
        code = executable.code
        message = m.Run(
            self._session,
            secrets.token_hex(16),
            code if isinstance(code, bytes) else code.encode(),
            list(executable.input_names),
            list(executable.output_names),
        )
        answers = self._run("run", self._same(message))
        return max(answer.seconds for answer in answers), _profile(answers)

    def _run(self, method: str, messages: Sequence[m.Message]) -> list[m.Answer]:
        from flaxmpc.secure.deploy import messages as m

        try:
            return self._all(method, messages, m.Answer, bounded=False)
        except SecureError:
            self._refresh()
            raise

    def program(
        self, fn: Callable[..., Any], weights: Resident, *inputs: Any, length: int, shared_reciprocal: bool = False
    ) -> m.Program:
        """Compiles a function for `publish`, for one request and for 2, 4, 8, ... that wait at the same time.

        Args:
            fn: (weights, *inputs) -> output; the first axis of every array of inputs and output is the sentence, and
                a sentence's output must not depend on the others.
            weights: put on these parties.
            inputs: pytrees of arrays of a request's shapes and dtypes, secret; their values are not used.
            length: tokens of a sentence, for the parties' limits.
            shared_reciprocal: see `secure.jit`.

        Raises:
            SecureError: SPU cannot compile the function.
        """
        from flaxmpc.secure.deploy import messages as m

        arrays = jax.tree.leaves(inputs)
        batch = arrays[0].shape[0]
        most = self.cluster.limits.max_batch_sentences // batch
        counts = [2**i for i in range(1, most.bit_length()) if 2**i <= most]
        program = jit(fn, parties=self, shared_reciprocal=shared_reciprocal).compile(weights, *inputs)
        together = jit(jointly(fn), parties=self, shared_reciprocal=shared_reciprocal)
        return m.Program(
            program.code,
            tuple(m.Array(leaf.shape, leaf.dtype.name) for leaf in arrays),
            tuple(m.Array(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(program.output)),
            batch,
            length,
            {count: together.compile(weights, *[inputs] * count).code for count in counts},
        )

    def publish(self, name: str, weights: Resident, programs: Mapping[str, m.Program], bundle: bytes) -> str:
        """Makes stored weights a model that clients may ask.

        Args:
            name: of the model; one of that name is replaced.
            weights: put on these parties; they hold them from now on, whatever becomes of this object.
            programs: of (weights, inputs), by name; see `program`.
            bundle: what clients need in the clear.

        Returns:
            The hash of this put.

        Raises:
            SecureError: a party refuses: the name, or a program's size. Or it can't be reached.
            ValueError: `weights` are not held by these parties.
        """
        from flaxmpc.secure.deploy import messages as m
        from flaxmpc.secure.deploy import rpc

        weights.check(self)
        salt = secrets.token_bytes(32)  # a plain hash of secret weights would tell whether they are some known ones
        hash_ = m.digest(salt, *(program.code for program in programs.values()), bundle)
        header = m.Publish(self._session, name, hash_, weights.names, dict(programs))
        futures = [peer.send_later("publish", header, rpc.pieces("bundle", bundle)) for peer in self._peers]
        self._gather(futures, m.Empty)
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
        from flaxmpc.secure.deploy import messages as m

        each = self._models_of_each()
        models = _alike(each)
        if name is None and len(models) == 1:
            return next(iter(models.items()))
        if name is None or name not in models:
            which = f"model {name!r}" if name else "one model only"
            puts = [{"put": held[name].hash} if name in held else {} for held in each]
            unlike = [rank for rank, put in enumerate(puts) if put != puts[0]]
            reason = (
                f"alike: party {unlike[0]} differs from party 0: {m.difference(puts[0], puts[unlike[0]])}"
                if unlike
                else f"(they have {', '.join(models) or 'none'})"
            )
            raise SecureError(
                f"the parties do not hold {which} {reason}: "
                "was a party restarted? The owner puts it again with `flaxmpc put`"
            )
        return name, models[name]

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

        spu = load_spu()
        signature = model.programs[program]
        arrays = jax.tree.leaves(to_arrays(inputs, self.config, "inputs"))
        given = [(array.shape, array.dtype.name) for array in arrays]
        needed = [(each.shape, each.dtype) for each in signature.inputs]
        if given != needed:
            raise ValueError(f"program {program} takes {needed}, not {given}")
        shares = [
            self._io.make_shares(array, spu.parse_visibility(f"VIS_{each.visibility.upper()}"))
            for array, each in zip(arrays, signature.inputs, strict=True)
        ]
        request = secrets.token_hex(16)
        messages = [
            m.Infer(self._session, request, name, model.hash, program, [m.Share.pack(each[rank]) for each in shares])
            for rank in range(len(self._peers))
        ]
        answers = self._run("infer", messages)
        outputs = [
            np.asarray(self._io.reconstruct([answer.shares[i].unpack() for answer in answers]), each.dtype).reshape(
                each.shape
            )
            for i, each in enumerate(signature.outputs)
        ]
        seconds = max(answer.seconds for answer in answers)
        return Answer(outputs, Cost.from_profile(self.config, _profile(answers), seconds, 0.0))


def _alike(each: Sequence[Mapping[str, m.Model]]) -> dict[str, m.Model]:
    """Of what each party holds, that which all hold the same put of."""
    first, *others = each
    return {name: model for name, model in first.items() if all(held.get(name) == model for held in others)}


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
