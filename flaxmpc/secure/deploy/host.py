"""A computing host: what owner, clients and the other parties may ask of it. Its worker, a child process, holds SPU."""

from __future__ import annotations

import collections
import functools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grpc

from flaxmpc.secure import cost
from flaxmpc.secure.deploy import certificates, monitor, rpc, shares, streams
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.child import WorkerLost
from flaxmpc.secure.deploy.cluster import ClusterFile, PartyEntry
from flaxmpc.secure.deploy.held import Model
from flaxmpc.secure.deploy.kept import KeptShares
from flaxmpc.secure.deploy.leader import Leader
from flaxmpc.secure.deploy.programs import Approved
from flaxmpc.secure.deploy.rpc import Refused
from flaxmpc.secure.deploy.session import Session, Sessions
from flaxmpc.secure.deploy.signature import check_program
from flaxmpc.secure.deploy.tunnel import Tunnel
from flaxmpc.secure.deploy.turns import Request, command
from flaxmpc.secure.protocol import get_protocol


def versions() -> m.Facts:
    """Of what must be the same everywhere: SPU's programs are locked to its version, its settings are flaxmpc's."""
    return {package: cost.versions()[package] for package in ("flaxmpc", "spu")} | {"schema": "3"}


_COUNTED = (
    "requests_total",
    "failures_total",
    "runs_total",
    "run_seconds_total",
    "bytes_sent_total",
    "rounds_total",
    "sessions_total",
    "sessions_lost_total",
)


class Host:
    """One party of a cluster. `flaxmpc.secure.deploy.service.serve` runs it."""

    def __init__(self, cluster: ClusterFile, rank: int, *, allow_insecure_dealer: bool = False):
        """Reads what cluster.toml names.

        Raises:
            ValueError: no such rank, a file that is missing or wrong, or SEMI2K without leave.
        """
        if not 0 <= rank < len(cluster.party):
            raise ValueError(f"{cluster.path} has party ranks 0..{len(cluster.party) - 1}, not {rank}")
        if cluster.protocol == "SEMI2K" and not (allow_insecure_dealer or cluster.allow_insecure_dealer):
            meaning = get_protocol("SEMI2K").threat_model
            raise ValueError(f"SEMI2K: {meaning} To run it all the same: --allow-insecure-dealer")
        self.cluster = cluster
        self.rank = rank
        self.entry: PartyEntry = cluster.party[rank]
        self.log = functools.partial(monitor.log, rank=rank)
        if cluster.protocol == "SEMI2K":
            self.log("insecure_dealer", meaning=get_protocol("SEMI2K").threat_model)
        self._facts = {
            "protocol": cluster.protocol,
            "ring": cluster.ring,
            "fraction_bits": str(cluster.fraction_bits),
            "exp_mode": cluster.exp_mode,
            "parties": str(len(cluster.party)),
            **versions(),
        }
        certificates.check_party(cluster, rank)
        self._metrics: collections.Counter[str] = collections.Counter(dict.fromkeys(_COUNTED, 0))
        self.tunnel = Tunnel(cluster, rank, monitor.limited(self.log))
        self._approved = Approved.of(cluster)
        if self._approved is not None:
            self._approved.digests()  # what can't be read is said at once
        kept = KeptShares.of(cluster, self.entry)
        self.sessions = Sessions(cluster, rank, self._facts, self.tunnel, self.log, self._metrics, kept, self._load)
        self.leader = Leader(cluster, self._facts, self.sessions, self._execute, self.log) if rank == 0 else None
        self._stopping = False

    def state(self) -> str:
        """ "ready" when the group has formed, else what this party waits for."""
        return "ready" if self.sessions.live() else self.sessions.state

    def metrics(self) -> dict[str, float]:
        """What was counted since the start, how many requests wait or run, and values of owners are held."""
        session = self.sessions.live()
        queue, values = (len(session.turns), len(session.held)) if session else (0, 0)
        return {"queue": queue, "values": values, **self._metrics}

    def stop(self) -> None:
        """No more requests; blocks until the running one is finished."""
        self._stopping = True
        stopping = Refused(grpc.StatusCode.UNAVAILABLE, f"party {self.rank} is stopping")
        self.sessions.abort_join()
        session = self.sessions.live()
        if session is not None:
            session.turns.close(stopping)
        if self.leader is not None:
            self.leader.stop()
            self.leader.join()
        if session is not None:
            session.turns.wait_until_idle()

    # What anyone may ask.

    def status(self, message: m.Empty) -> m.Status:
        session = self.sessions.live()
        models = {name: model.public for name, model in session.held.models.items()} if session else {}
        return m.Status(self.rank, session.id if session else "", self.state(), self._facts, models)

    # What the owner may ask.

    def store(self, header: m.Stored, pieces: Iterator[m.Piece]) -> m.Empty:
        session = self.sessions.require(header.session)
        for value in streams.shares(pieces, lambda _: self.cluster.limits.max_request_bytes):
            session.held.store(header.lease, f"o.{value.name}", value.share)
        return m.Empty()

    def fetch(self, message: m.Names) -> m.Answer:
        session = self.sessions.require(message.session)
        names = [f"o.{name}" for name in message.names]
        session.held.require(names)
        return m.Answer(shares=tuple(self.sessions.call(session, m.Fetch(name)).shares[0] for name in names))

    def delete(self, message: m.Names) -> m.Empty:
        """Values by their names, and puts that were not committed by their hashes."""
        session = self.sessions.require(message.session)
        session.held.forget([*message.names, *(f"o.{name}" for name in message.names)])
        return m.Empty()

    def lease(self, message: m.Lease, context: rpc.Call) -> m.Empty:
        """An owner holds its values while it waits here: its connection lasts, however busy its process is."""
        held = self.sessions.require(message.session).held
        if message.ends:
            held.end(message.lease)
            return m.Empty()
        gone = threading.Event()
        with held.attached(message.lease):
            if context.add_callback(gone.set):
                while not gone.wait(1.0) and not held.closed:
                    pass
        return m.Empty()

    def publish(self, header: m.Publish, pieces: Iterator[m.Piece]) -> m.Empty:
        session = self.sessions.require(header.session)
        self._check_allowed(header)
        header, bundle = streams.model(header, pieces, self.cluster.limits.max_request_bytes)
        self._check_programs(header)
        try:
            session.held.stage(header, bundle)
        except OSError as error:
            reason = f"party {self.rank} could not keep its shares: {error}"
            raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, reason) from error
        return m.Empty()

    def commit(self, message: m.Switch) -> m.Empty:
        """A put that all parties hold takes the place of the one before at all of them."""
        session = self.sessions.require(message.session)
        if self.leader is None or message.hash is None:
            raise Refused(grpc.StatusCode.FAILED_PRECONDITION, f"party {self.rank} commits no put: party 0 does")
        self.leader.commit(session, message.hash)
        return m.Empty()

    def _check_allowed(self, header: m.Publish) -> None:
        limits, allowed = self.cluster.limits, self.cluster.models
        if allowed is not None and header.name not in allowed:
            raise Refused(
                grpc.StatusCode.PERMISSION_DENIED,
                f"model {header.name!r} may not be put here: {self.cluster.path.name} allows {', '.join(allowed)}",
            )
        for name, program in header.programs.items():
            if program.batch > limits.max_batch or program.length > limits.max_length:
                raise Refused(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"program {name} is for {program.batch} x {program.length} tokens, "
                    f"the limit is {limits.max_batch} x {limits.max_length}",
                )
            most = max(program.joint, default=1)
            if most > 1 and most * program.batch > limits.max_batch_sentences:
                raise Refused(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"program {name} joins {most} requests of {program.batch} sentences, "
                    f"the limit is max_batch_sentences {limits.max_batch_sentences}",
                )

    def _check(self, header: m.Publish) -> None:
        self._check_allowed(header)
        self._check_programs(header)

    def _check_programs(self, header: m.Publish) -> None:
        """That they are what they say, and approved."""
        digests, most_bytes = None, self.cluster.limits.max_request_bytes
        if self._approved is not None:
            try:
                digests = self._approved.digests()
            except ValueError as error:
                reason = f"party {self.rank} takes no model: {error}"
                raise Refused(grpc.StatusCode.FAILED_PRECONDITION, reason) from error
        for name, program in header.programs.items():
            if digests is not None and program.digest not in digests:
                raise Refused(
                    grpc.StatusCode.PERMISSION_DENIED,
                    f"party {self.rank} has not approved program {name} of model {header.name!r} "
                    f"({program.digest[:16]}): who runs it says `flaxmpc approve` on the model's folder, or its "
                    "config.json alone, with the same --lengths, --batches, [limits] and versions",
                )
            try:
                check_program(program, len(header.weights), most_bytes, self.cluster.config)
            except ValueError as error:
                raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"program {name}: {error}") from error

    def _load(self, session: Session, chosen: Mapping[str, str], kept: KeptShares) -> None:
        """Serves the `chosen` puts in a session; one that is not whole, or not allowed any more, is left out."""
        for name in kept.models.keys() - chosen.keys():
            self.log("kept_shares_left_out", name=name, reason="party 0 keeps none of this model")
        for name, hash_ in chosen.items():
            try:
                session.held.load(name, hash_, self._check)
            except (ValueError, OSError, Refused) as error:
                self.log("kept_shares_left_out", name=name, hash=hash_[:16], reason=str(error))
            else:
                self.log("kept_shares", name=name, hash=hash_[:16])
        kept.sweep()

    def run(self, message: m.Run, pieces: Iterator[m.Piece], context: rpc.Call) -> m.Answer:
        session = self.sessions.require(message.session)
        (code,) = streams.contents(pieces, 1, self.cluster.limits.max_request_bytes, "the program")
        inputs, outputs = ([f"o.{name}" for name in names] for names in (message.inputs, message.outputs))
        key = m.Key(context.caller.name, message.id)
        request = Request(key, "run", "", {1: code}, inputs, outputs)
        session.held.expect(message.lease, outputs)
        return self._await(session, request, context)

    # What a client may ask.

    def bundle(self, message: m.Names) -> Iterator[m.Piece]:
        session = self.sessions.require(message.session)
        for name in dict.fromkeys(message.names):  # each once
            yield from rpc.pieces(name, self._model(session, name).bundle)

    def infer(self, message: m.Infer, pieces: Iterator[m.Piece], context: rpc.Call) -> m.Answer:
        session = self.sessions.require(message.session)
        model = self._model(session, message.model)
        if message.hash != model.public.hash:
            raise Refused(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"model {message.model!r} was put anew (hash {model.public.hash[:16]}): ask again",
            )
        program = model.programs.get(message.program)
        if program is None:
            raise Refused(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"model {message.model!r} has no program {message.program!r}: "
                f"more sentences or tokens than it was put for? It has {', '.join(model.programs)}",
            )
        given = self._given(program, pieces)
        request = Request(
            m.Key(context.caller.name, message.id),
            f"{message.model}/{message.program}",
            model.public.hash,
            {1: program.code, **program.joint},
            model.weights,
            [f"o{i}" for i in range(len(program.outputs))],
            given,
            program.inputs,
            program.outputs,
        )
        return self._await(session, request, context)

    def _given(self, program: m.Program, pieces: Iterator[m.Piece]) -> list[m.Share]:
        """The shares of a program's inputs; no more is read than they can have."""
        limits = self.cluster.limits
        sizes = [shares.num_bytes(array, self.cluster.config) for array in program.inputs]
        most = {str(i): size + streams.frame_bytes(size) for i, size in enumerate(sizes)}
        if sum(most.values()) > limits.max_request_bytes:
            reason = (
                f"a request has {sum(most.values())} bytes, the limit is max_request_bytes {limits.max_request_bytes}"
            )
            raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
        given: dict[str, m.Share] = {}

        def limit(name: str) -> int:
            if name not in most or name in given:
                reason = f"input {name!r} is not one of {len(most)}, or came already"
                raise Refused(grpc.StatusCode.INVALID_ARGUMENT, reason)
            return most[name]

        for put in streams.shares(pieces, limit):
            given[put.name] = put.share
        if len(given) != len(most):
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"{len(given)} inputs, {len(most)} are needed")
        for name, array in zip(most, program.inputs, strict=True):
            try:
                shares.check(given[name], array, self.cluster.config)
            except ValueError as error:
                raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"input {name}: {error}") from error
        return [given[name] for name in most]

    def _model(self, session: Session, name: str) -> Model:
        if name not in session.held.models:
            known = ", ".join(session.held.models) or "none"
            raise Refused(
                grpc.StatusCode.NOT_FOUND,
                f"party {self.rank} holds no shares of model {name!r} (it has {known}): was a party restarted? "
                "The owner puts it again",
            )
        return session.held.models[name]

    def _await(self, session: Session, request: Request, context: rpc.Call) -> m.Answer:
        """Queues a request and waits for its end, or for its caller to go away."""

        def gone() -> None:
            session.turns.abandon(request, "the caller went away")
            if request.given is None and session.turns.runs(request):
                # An owner's program may take for ever, and nobody waits for it.
                timer = threading.Timer(self.cluster.timeout_seconds, end_run)
                timer.daemon = True
                timer.start()

        def end_run() -> None:
            if session.turns.runs(request):
                self.sessions.drop(session, "an owner went away during its run")

        session.turns.add(request)
        try:
            session.held.require(request.inputs)  # after it was added: from now on they are kept for it
            if not context.add_callback(gone):
                gone()
            if self.leader is not None:
                self.leader.announce(session, request)
            answer = session.turns.wait(request)
        finally:
            gone()  # whatever went wrong, it waits no longer
        self._metrics["requests_total"] += 1
        self._metrics["failures_total"] += answer.error is not None
        return answer

    # What party 0 may ask.

    def form(self, message: m.Form) -> m.Empty:
        """Party 0 starts a session: this party's worker, and its shares, begin anew."""
        if difference := m.difference(message.facts, self._facts):
            reason = f"party {self.rank} differs from party 0: {difference}"
            raise Refused(grpc.StatusCode.FAILED_PRECONDITION, reason)
        if self._stopping:
            raise Refused(grpc.StatusCode.UNAVAILABLE, f"party {self.rank} is stopping")
        self.sessions.start(message.session, message.models)
        return m.Empty()

    def promise(self, message: m.Switch) -> m.Empty:
        """Party 0 is about to switch to a put: this party keeps it until it hears more."""
        self.sessions.require(message.session).held.promise(message.hash)
        return m.Empty()

    def switch(self, message: m.Switch) -> m.Empty:
        """Party 0 has switched to a put, and so does this party."""
        session = self.sessions.require(message.session)
        try:
            model = session.held.switch(message.hash)
        except OSError as error:
            reason = f"party {self.rank} could not switch to a put on its disk: {error}"
            raise Refused(grpc.StatusCode.INTERNAL, reason) from error
        self.log("model", name=model.name, hash=model.public.hash[:16], programs=sorted(model.programs))
        return m.Empty()

    def has(self, message: m.Turn, context: rpc.Call) -> m.Empty:
        """Party 0 asks whether requests came here too: a caller sends to all parties at the same time."""
        session = self.sessions.require(message.session)
        gone = threading.Event()

        def stop() -> None:
            gone.set()
            session.turns.wake()

        if not context.add_callback(stop):
            stop()
        end = time.monotonic() + self.cluster.timeout_seconds / 2
        for key in message.requests:
            if not session.turns.has(key, max(0.0, end - time.monotonic()), gone):
                raise Refused(grpc.StatusCode.NOT_FOUND, f"party {self.rank} was not sent this request")
        return m.Empty()

    def step(self, message: m.Turn) -> m.Answer:
        """Party 0 says whose turn it is."""
        session = self.sessions.require(message.session)
        requests = session.turns.named(message.requests, message.waiting)
        answer = self._execute(session, requests)
        if answer.error is not None and len(requests) > 1:
            session.turns.separate(requests)
        else:
            session.turns.end(requests, answer)
        return m.Answer(answer.error, answer.in_step)

    def _execute(self, session: Session, requests: Sequence[Request]) -> m.Answer:
        """Runs requests together at this party, in step with the others; without any says so to them."""
        start = time.perf_counter()
        facts = {**self._facts, "session": session.id}
        bound = self.cluster.limits.run_seconds
        try:
            answer = session.worker.call(command(requests, facts) if requests else m.Execute(None), bound)
        except WorkerLost as error:
            late = time.perf_counter() - start > bound
            reason = f"the run took longer than run_seconds {bound}" if late else str(error)
            self.sessions.drop(session, f"party {self.rank} lost its worker: {reason}")
            answer = m.Answer(error=f"party {self.rank}: {reason}", in_step=False)
        if answer.error is None:
            # Here, and not where the owner is answered, who may be gone.
            session.held.add(name for request in requests if request.given is None for name in request.outputs)
        if requests:
            seconds = time.perf_counter() - start
            counts: dict[str, Any] = {
                "runs_total": 1,
                "run_seconds_total": seconds,
                "bytes_sent_total": answer.bytes_sent,
                "rounds_total": answer.rounds,
            }
            self._metrics.update(counts)
            self.log(
                "run",
                what=requests[0].what,
                requests=len(requests),
                seconds=round(seconds, 3),
                error=answer.error,
                bytes_sent=answer.bytes_sent,
            )
        return answer
