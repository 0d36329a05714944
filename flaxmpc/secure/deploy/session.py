"""A party's sessions, one at a time: a worker that joined the others', and the shares in it."""

from __future__ import annotations

import collections
import socket
import threading
from collections.abc import Callable, Mapping

import grpc

from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.child import WorkerLost, WorkerProcess
from flaxmpc.secure.deploy.cluster import ClusterFile
from flaxmpc.secure.deploy.held import Held
from flaxmpc.secure.deploy.kept import KeptShares
from flaxmpc.secure.deploy.rpc import STARTED_ANEW, Refused
from flaxmpc.secure.deploy.tunnel import Tunnel
from flaxmpc.secure.deploy.turns import Turns

_POLL = 1.0  # seconds between sweeps while nothing asks for one


class Session:
    """What lasts until a party is lost."""

    def __init__(self, id_: str, worker: WorkerProcess, turns: Turns, held: Held):
        self.id = id_
        self.worker = worker
        self.turns = turns
        self.held = held


class Sessions:
    """This party's session, if there is one, and how it comes and goes.

    Attributes:
        state: "ready", or why there is none.
    """

    def __init__(
        self,
        cluster: ClusterFile,
        rank: int,
        facts: m.Facts,
        tunnel: Tunnel,
        log: Callable[..., None],
        metrics: collections.Counter[str],
        kept: KeptShares | None,
        load: Callable[[Session, Mapping[str, str], KeptShares], None],
    ):
        """`load` serves puts, by the model's name, in a new session from `kept`, this party's disk, if it has one."""
        self.state = "starting"
        self._cluster = cluster
        self._rank = rank
        self._facts = facts
        self._tunnel = tunnel
        self._log = log
        self._metrics = metrics
        self._kept = kept
        self._load = load
        self._lock = threading.Lock()
        self._forming = threading.Lock()
        self._joining: WorkerProcess | None = None
        self._given_up = ""
        self._session: Session | None = None

    def live(self) -> Session | None:
        """The session, if its worker lives."""
        session = self._session
        if session is not None and not session.worker.alive:
            self.drop(session, f"party {self._rank} lost its worker")
            session = None
        return session

    def require(self, wanted: str) -> Session:
        """The session of that id. Refused: there is none, or another."""
        session = self.live()
        if session is None:
            raise Refused(grpc.StatusCode.UNAVAILABLE, f"party {self._rank} is not ready: {self.state}")
        if session.id != wanted:
            raise Refused(grpc.StatusCode.ABORTED, STARTED_ANEW)
        return session

    def call(self, session: Session, command: m.Command) -> m.Answer:
        """A command that takes no turn. Refused: the worker was lost, or says that the command is wrong."""
        try:
            answer = session.worker.call(command, self._cluster.timeout_seconds)
        except WorkerLost as error:
            self.drop(session, f"party {self._rank} lost its worker")
            raise Refused(grpc.StatusCode.ABORTED, f"{error}; {STARTED_ANEW}") from error
        if answer.error is not None:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, answer.error)
        return answer

    def chosen(self) -> Mapping[str, str]:
        """The puts that this party's disk says are served, by the model's name."""
        return dict(self._kept.models) if self._kept is not None else {}

    def drop(self, session: Session, reason: str) -> None:
        """Ends a session: its worker, its shares and what waits for it."""
        with self._lock:
            if self._session is not session:
                return
            session.held.close()  # before a new session is chosen for: no put is switched to meanwhile
            self._session = None
            self.state = f"the group starts anew: {reason}"
        session.worker.kill()
        self._log("session_lost", session=session.id[:8], reason=reason)
        self._metrics["sessions_lost_total"] += 1
        session.turns.close(Refused(grpc.StatusCode.ABORTED, f"{reason}; {STARTED_ANEW}"))

    def start(self, session_id: str, chosen: Mapping[str, str]) -> None:
        """A new worker joins the others' in a session that begins with the `chosen` puts. Refused: it can't."""
        self.abort_join()
        with self._forming:
            if self._session is not None:
                self.drop(self._session, "party 0 started a session")
            with socket.create_server(("127.0.0.1", 0)) as free:
                own = f"127.0.0.1:{free.getsockname()[1]}"
            addresses = tuple(self._tunnel.entrances.get(rank, own) for rank in range(len(self._cluster.party)))
            self._tunnel.link = own
            worker = self._joining = WorkerProcess(self._cluster.parties_beside(self._rank))
            if session_id == self._given_up:
                worker.kill()
            config, timeout = self._cluster.config, self._cluster.timeout_seconds
            join = m.Join(
                addresses, self._rank, session_id, config.protocol, config.ring, config.fraction_bits,
                config.exp_mode, int(timeout * 1000), self._facts,
            )  # fmt: skip
            error = None
            try:
                error = worker.call(join, timeout + 10).error  # 10 s: loading SPU
            except WorkerLost as lost:
                error = str(lost)
            self._joining = None
            if error is not None:
                worker.kill()
                self.state = error
                self._log("join_failed", reason=error)
                raise Refused(grpc.StatusCode.UNAVAILABLE, f"party {self._rank} could not join the others: {error}")
            turns = Turns.of(self._cluster, self._rank)
            held = Held(self._rank, lambda command: self.call(session, command), turns, self._kept, timeout)
            session = Session(session_id, worker, turns, held)
            if self._kept is not None:
                self._load(session, chosen, self._kept)
            with self._lock:
                self._session = session
                self.state = "ready"
            threading.Thread(target=self._sweep, args=(session,), name="sweep", daemon=True).start()
            self._metrics["sessions_total"] += 1
            self._log("session", session=session_id[:8], worker=worker.pid)

    def _sweep(self, session: Session) -> None:
        """Deletes what nothing needs, soon after, as long as the session lasts."""
        while session is self._session:
            session.held.wake.wait(_POLL)
            session.held.wake.clear()
            try:
                session.held.sweep()
            except Refused as error:
                self._log("sweep_failed", reason=str(error))

    def give_up(self, session_id: str) -> None:
        """A session that is being started will not come about: ends its worker, or the one that is about to start."""
        self._given_up = session_id
        self.abort_join()

    def abort_join(self) -> None:
        """Ends a worker that waits for the others'."""
        if (worker := self._joining) is not None:
            worker.kill()

    def wait_for(self, reason: str) -> None:
        """Says, once, what is waited for."""
        state = f"waiting: {reason}"
        if state != self.state:
            self._log("waiting", reason=reason)
        self.state = state

    def close(self) -> None:
        """Ends the worker, without a word to anyone."""
        session, self._session = self._session, None
        if session is not None:
            session.worker.kill()
