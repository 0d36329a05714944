"""A computing host: the methods that owner, clients and the other parties call.

Who may call which stands in `flaxmpc.secure.deploy.server`; what is asked of a session gets that from there. A
method that returns nothing answers `Empty`. The host's worker, a child process, holds SPU.
"""

import dataclasses
import functools
import threading
import time
from collections.abc import Iterator

from grpc import StatusCode

from flaxmpc.secure import cost
from flaxmpc.secure.deploy import certificates, monitor, streams
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.admission import Admission
from flaxmpc.secure.deploy.calls import Call
from flaxmpc.secure.deploy.cluster import ClusterFile, PartyEntry
from flaxmpc.secure.deploy.errors import Refused, refused_where
from flaxmpc.secure.deploy.held import HeldModel
from flaxmpc.secure.deploy.kept import KeptShares
from flaxmpc.secure.deploy.leader import Leader
from flaxmpc.secure.deploy.session import Session, Sessions
from flaxmpc.secure.deploy.tunnel import Tunnel
from flaxmpc.secure.deploy.turns import Request
from flaxmpc.secure.protocol import get_protocol


def versions() -> m.Facts:
    """The versions that must be the same at all parties: programs are locked to SPU's, settings are flaxmpc's."""
    return {package: cost.versions()[package] for package in ("flaxmpc", "spu")} | {"schema": "4"}


class Host:
    """One party of a cluster. `flaxmpc.secure.deploy.service.serve` runs it."""

    def __init__(self, cluster: ClusterFile, rank: int, *, allow_insecure_dealer: bool = False):
        """Reads what cluster.toml names.

        Raises:
            ValueError: no such rank, a file that is missing or wrong, or SEMI2K without leave.
        """
        if not 0 <= rank < len(cluster.party):
            raise ValueError(f"{cluster.path} has party ranks 0..{len(cluster.party) - 1}, not {rank}")
        self.cluster = cluster
        self.rank = rank
        self.entry: PartyEntry = cluster.party[rank]
        self.log = functools.partial(monitor.log, rank=rank)
        if cluster.protocol == "SEMI2K":
            meaning = get_protocol("SEMI2K").threat_model
            if not (allow_insecure_dealer or cluster.allow_insecure_dealer):
                raise ValueError(f"SEMI2K: {meaning} To run it all the same: --allow-insecure-dealer")
            self.log("insecure_dealer", meaning=meaning)
        settings = {name: str(value) for name, value in dataclasses.asdict(cluster.config).items()}
        self._facts = {**settings, "parties": str(len(cluster.party)), **versions()}
        certificates.check_party(cluster, rank)
        self.metrics = monitor.Metrics(self.state, self._counts)
        self.tunnel = Tunnel(cluster, rank, monitor.limited(self.log))
        self._admission = Admission(cluster, rank)
        kept = KeptShares.of(cluster, self.entry)
        self.sessions = Sessions(
            cluster, rank, self._facts, self.tunnel, self.log, self.metrics, kept, self._admission.check
        )
        self.leader = Leader(cluster, self._facts, self.sessions, self.log) if rank == 0 else None
        self._stopping = False

    def state(self) -> str:
        """ "ready" when the group has formed, else what this party waits for."""
        return "ready" if self.sessions.live() else self.sessions.state

    def _counts(self) -> tuple[int, int]:
        """The number of requests that wait or run, and of values that are held for owners."""
        session = self.sessions.live()
        return (len(session.turns), len(session.held)) if session else (0, 0)

    def stop(self) -> None:
        """Takes no more requests; blocks until the running ones are finished."""
        self._stopping = True
        self.sessions.abort_join()
        session = self.sessions.live()
        if session is not None:
            session.turns.close(Refused(StatusCode.UNAVAILABLE, f"party {self.rank} is stopping"))
        if self.leader is not None:
            self.leader.stop()
        if session is not None:
            session.turns.wait_until_idle()

    # Anyone's.

    def status(self, message: m.Empty) -> m.Status:
        """How this party is, and which models it serves."""
        session = self.sessions.live()
        models = {name: model.public for name, model in session.held.models.items()} if session else {}
        return m.Status(self.rank, session.id if session else "", self.state(), self._facts, models)

    # The owner's.

    def store(self, session: Session, header: m.Stored, pieces: Iterator[m.Piece]) -> None:
        """Holds this party's shares of values for an owner's lease."""
        for value in streams.shares(pieces, lambda _: self.cluster.limits.max_request_bytes):
            session.held.store(header.lease, f"o.{value.name}", value.share)

    def fetch(self, session: Session, message: m.Names) -> m.Answer:
        """This party's shares of an owner's values."""
        names = [f"o.{name}" for name in message.names]
        session.held.require(names)
        return m.Answer(shares=tuple(self.sessions.call(session, m.Fetch(name)).shares[0] for name in names))

    def delete(self, session: Session, message: m.Names) -> None:
        """Forgets values by their names, and puts that were not committed by their hashes."""
        session.held.forget([*message.names, *(f"o.{name}" for name in message.names)])

    def lease(self, session: Session, message: m.KeepLease, context: Call) -> None:
        """Waits with an owner, and holds its values meanwhile: its connection lasts, however busy its process is."""
        if message.ends:
            session.held.end(message.lease)
            return
        gone = threading.Event()
        context.when_over(gone.set)
        with session.held.attached(message.lease):
            while not gone.wait(1.0) and not session.held.closed:
                pass

    def publish(self, session: Session, header: m.Publish, pieces: Iterator[m.Piece]) -> None:
        """Makes values that are held a put of a model, which is served once it is committed."""
        self._admission.check_name_and_sizes(header)
        header, bundle = streams.model(header, pieces, self.cluster.limits.max_request_bytes)
        self._admission.check_programs(header)
        what = f"party {self.rank} could not keep its shares"
        with refused_where(OSError, StatusCode.RESOURCE_EXHAUSTED, what):
            session.held.stage(header, bundle)

    def commit(self, session: Session, message: m.Switch) -> None:
        """Serves a put that all parties hold, at all of them, in place of the one before."""
        if self.leader is None or message.hash is None:
            raise Refused(StatusCode.FAILED_PRECONDITION, f"party {self.rank} commits no put: party 0 does")
        self.leader.commit(session, message.hash)

    def run(self, session: Session, message: m.RunProgram, pieces: Iterator[m.Piece], context: Call) -> m.Answer:
        """Runs an owner's program on its values; the outputs stay here."""
        (code,) = streams.contents(pieces, 1, self.cluster.limits.max_request_bytes, "the program")
        inputs, outputs = ([f"o.{name}" for name in names] for names in (message.inputs, message.outputs))
        key = m.Key(context.caller.name, message.id)
        request = Request(key, "run", "", {1: code}, inputs, outputs)
        session.held.expect(message.lease, outputs)
        return self._await(session, request, context)

    # A client's.

    def bundle(self, session: Session, message: m.Names) -> Iterator[m.Piece]:
        """What clients need of models in the clear."""
        for name in dict.fromkeys(message.names):  # each once
            yield from streams.pieces(name, self._model(session, name).bundle)

    def infer(self, session: Session, message: m.Infer, pieces: Iterator[m.Piece], context: Call) -> m.Answer:
        """Runs a model's program on a client's inputs; the answer has this party's shares of the outputs."""
        model = self._model(session, message.model)
        if message.hash != model.public.hash:
            raise Refused(
                StatusCode.FAILED_PRECONDITION,
                f"model {message.model!r} was put anew (hash {model.public.hash[:16]}): ask again",
            )
        program = model.programs.get(message.program)
        if program is None:
            raise Refused(
                StatusCode.INVALID_ARGUMENT,
                f"model {message.model!r} has no program {message.program!r}: "
                f"more or larger rows than it was put for? It has {', '.join(model.programs)}",
            )
        request = Request(
            key=m.Key(context.caller.name, message.id),
            what=f"{message.model}/{message.program}",
            model=model.public.hash,
            codes={1: program.code, **program.joint},
            inputs=model.weights,
            outputs=[f"o{i}" for i in range(len(program.outputs))],
            given=self._admission.inputs(program, pieces),
            takes=program.inputs,
            gives=program.outputs,
        )
        return self._await(session, request, context)

    def _model(self, session: Session, name: str) -> HeldModel:
        if name not in session.held.models:
            known = ", ".join(session.held.models) or "none"
            raise Refused(
                StatusCode.NOT_FOUND,
                f"party {self.rank} holds no shares of model {name!r} (it has {known}): was a party restarted? "
                "The owner puts it again",
            )
        return session.held.models[name]

    def _await(self, session: Session, request: Request, context: Call) -> m.Answer:
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
            context.when_over(gone)
            if self.leader is not None:
                self.leader.announce(session, request)
            answer = session.turns.wait(request)
        finally:
            gone()  # whatever went wrong, it waits no longer
        self.metrics.count(requests=1, failures=answer.error is not None)
        return answer

    # Party 0's.

    def form(self, message: m.Form) -> None:
        """Joins a session that party 0 starts: this party's worker, and its shares, begin anew."""
        if difference := m.difference(message.facts, self._facts):
            raise Refused(StatusCode.FAILED_PRECONDITION, f"party {self.rank} differs from party 0: {difference}")
        if self._stopping:
            raise Refused(StatusCode.UNAVAILABLE, f"party {self.rank} is stopping")
        self.sessions.start(message.session, message.models)

    def promise(self, session: Session, message: m.Switch) -> None:
        """Keeps a put that party 0 is about to switch to, until party 0 says more."""
        session.held.promise(message.hash)

    def switch(self, session: Session, message: m.Switch) -> None:
        """Serves a put that party 0 has switched to."""
        with refused_where(OSError, StatusCode.INTERNAL, f"party {self.rank} could not switch to a put on its disk"):
            model = session.held.switch(message.hash)
        self.log("model", name=model.name, hash=model.public.hash[:16], programs=sorted(model.programs))

    def has(self, session: Session, message: m.Turn, context: Call) -> None:
        """Waits for requests that came to party 0: a caller sends to all parties at the same time."""
        gone = threading.Event()

        def stop() -> None:
            gone.set()
            session.turns.wake()

        context.when_over(stop)
        end = time.monotonic() + self.cluster.timeout_seconds / 2
        for key in message.requests:
            if not session.turns.has(key, max(0.0, end - time.monotonic()), gone):
                raise Refused(StatusCode.NOT_FOUND, f"party {self.rank} was not sent this request")

    def step(self, session: Session, message: m.Turn) -> m.Answer:
        """Runs the requests whose turn it is, as party 0 says."""
        requests = session.turns.named(message.requests, message.waiting)
        answer = self.sessions.run(session, requests)
        if answer.error is not None and len(requests) > 1:
            session.turns.separate(requests)
        else:
            session.turns.end(requests, answer)
        return m.Answer(answer.error, answer.in_step)
