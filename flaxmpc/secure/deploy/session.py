"""A party's sessions, one at a time: a worker that joined the others', the shares in it, and what it runs."""

import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from grpc import StatusCode

from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.child import WorkerProcess
from flaxmpc.secure.deploy.cluster import ClusterFile
from flaxmpc.secure.deploy.errors import STARTED_ANEW, Refused, WorkerLost
from flaxmpc.secure.deploy.held import Held
from flaxmpc.secure.deploy.kept import KeptShares
from flaxmpc.secure.deploy.monitor import Metrics
from flaxmpc.secure.deploy.tunnel import Tunnel
from flaxmpc.secure.deploy.turns import Request, Turns, command

_POLL = 1.0  # seconds between sweeps while nothing asks for one


@dataclasses.dataclass(eq=False)
class Session:
    """A worker in a group of workers, and what hangs on it; it lasts until one of them is lost.

    Attributes:
        lost: why it ended; empty while it lasts.
    """

    id: str
    worker: WorkerProcess
    turns: Turns
    held: Held
    lost: str = ""


@dataclasses.dataclass(eq=False)
class Sessions:
    """This party's session, if there is one, and how it comes and goes.

    Attributes:
        cluster, rank: the cluster, and the number of this party.
        facts: what must be the same at all parties.
        tunnel: the way to the others' workers.
        log: writes a line.
        metrics: counts sessions and runs.
        kept: this party's disk, if it keeps shares.
        check: refuses a put there that may not be served now.
        state: "ready", or why there is no session.
    """

    cluster: ClusterFile
    rank: int
    facts: m.Facts
    tunnel: Tunnel
    log: Callable[..., None]
    metrics: Metrics
    kept: KeptShares | None
    check: Callable[[m.Publish], None]
    state: str = "starting"

    def __post_init__(self):
        self._lock = threading.Lock()
        self._forming = threading.Lock()
        self._joining: WorkerProcess | None = None
        self._given_up = ""
        self._session: Session | None = None

    def live(self) -> Session | None:
        """The session, if its worker lives."""
        session = self._session
        if session is not None and not session.worker.alive:
            self.drop(session, f"party {self.rank} lost its worker")
            session = None
        return session

    def require(self, wanted: str) -> Session:
        """The session of that id. Refused: there is none, or another."""
        session = self.live()
        if session is None:
            raise Refused(StatusCode.UNAVAILABLE, f"party {self.rank} is not ready: {self.state}")
        if session.id != wanted:
            raise Refused(StatusCode.ABORTED, STARTED_ANEW)
        return session

    def call(self, session: Session, order: m.Command) -> m.Answer:
        """The worker's answer to a command that takes no turn. Refused: it was lost, or calls the command wrong."""
        try:
            answer = session.worker.call(order, self.cluster.timeout_seconds)
        except WorkerLost as error:
            self.drop(session, f"party {self.rank} lost its worker: {error}")
            raise Refused(StatusCode.ABORTED, f"{session.lost}; {STARTED_ANEW}") from error
        if answer.error is not None:
            raise Refused(StatusCode.INVALID_ARGUMENT, answer.error)
        return answer

    def chosen(self) -> Mapping[str, str]:
        """Hashes of the puts that are served, as this party's disk says, by the model's name."""
        return dict(self.kept.models) if self.kept is not None else {}

    def drop(self, session: Session, reason: str) -> None:
        """Ends a session, if none did before: its worker, its shares and what waits for it."""
        with self._lock:
            session.lost = session.lost or reason
            if self._session is not session:
                return
            session.held.close()  # before a new session is chosen for: no put is switched to meanwhile
            self._session = None
            self.state = f"the group starts anew: {reason}"
        session.worker.kill()
        self.log("session_lost", session=session.id[:8], reason=reason)
        self.metrics.count(sessions_lost=1)
        session.turns.close(Refused(StatusCode.ABORTED, f"{reason}; {STARTED_ANEW}"))

    def run(self, session: Session, requests: Sequence[Request]) -> m.Answer:
        """Runs requests together at this party, in step with the others; without any says so to them."""
        start = time.perf_counter()
        facts = {**self.facts, "session": session.id}
        bound = self.cluster.limits.run_seconds
        try:
            answer = session.worker.call(command(requests, facts) if requests else m.Execute(None), bound)
        except WorkerLost as error:
            late = time.perf_counter() - start > bound
            reason = f"the run took longer than run_seconds {bound}" if late else str(error)
            self.drop(session, f"party {self.rank} lost its worker: {reason}")
            answer = m.Answer(error=session.lost, in_step=False)  # where something else ended it, that is why
        if answer.error is None:
            # Here, and not where the owner is answered, who may be gone.
            session.held.add(name for request in requests if request.given is None for name in request.outputs)
        if requests:
            seconds = time.perf_counter() - start
            self.metrics.count(runs=1, run_seconds=seconds, bytes_sent=answer.bytes_sent, rounds=answer.rounds)
            told = {"seconds": round(seconds, 3), "error": answer.error, "bytes_sent": answer.bytes_sent}
            self.log("run", what=requests[0].what, requests=len(requests), **told)
        return answer

    def start(self, session_id: str, chosen: Mapping[str, str]) -> None:
        """A new worker joins the others' in a session that begins with the `chosen` puts. Refused: it can't."""
        self.abort_join()
        with self._forming:
            if self._session is not None:
                self.drop(self._session, "party 0 lost this session, and started another")
            worker = self._join(session_id)
            turns = Turns.of(self.cluster, self.rank)
            seconds = self.cluster.timeout_seconds
            held = Held(self.rank, lambda order: self.call(session, order), turns, self.kept, seconds)
            session = Session(session_id, worker, turns, held)
            if self.kept is not None:
                self._load(session, chosen, self.kept)
            with self._lock:
                self._session = session
                self.state = "ready"
            threading.Thread(target=self._sweep, args=(session,), name="sweep", daemon=True).start()
            self.metrics.count(sessions=1)
            self.log("session", session=session_id[:8], worker=worker.pid)

    def _join(self, session_id: str) -> WorkerProcess:
        """A new worker that has joined the others'. Refused: it could not."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            own = f"127.0.0.1:{free.getsockname()[1]}"
        addresses = tuple(self.tunnel.entrances.get(rank, own) for rank in range(len(self.cluster.party)))
        self.tunnel.link = own
        worker = self._joining = WorkerProcess(self.cluster.parties_beside(self.rank))
        if session_id == self._given_up:
            worker.kill()
        timeout = self.cluster.timeout_seconds
        join = m.Join(addresses, self.rank, session_id, self.cluster.config, int(timeout * 1000), self.facts)
        try:
            error = worker.call(join, timeout + 10).error  # 10 s: loading SPU
        except WorkerLost as lost:
            error = str(lost)
        self._joining = None
        if error is not None:
            worker.kill()
            self.state = error
            self.log("join_failed", reason=error)
            raise Refused(StatusCode.UNAVAILABLE, f"party {self.rank} could not join the others: {error}")
        return worker

    def _load(self, session: Session, chosen: Mapping[str, str], kept: KeptShares) -> None:
        """Serves the `chosen` puts in a session; one that is not whole, or not allowed any more, is left out."""
        for name in kept.models.keys() - chosen.keys():
            self.log("kept_shares_left_out", name=name, reason="party 0 keeps none of this model")
        for name, hash_ in chosen.items():
            try:
                session.held.load(name, hash_, self.check)
            except (ValueError, OSError, Refused) as error:
                self.log("kept_shares_left_out", name=name, hash=hash_[:16], reason=str(error))
            else:
                self.log("kept_shares", name=name, hash=hash_[:16])
        kept.sweep()

    def _sweep(self, session: Session) -> None:
        """Deletes what nothing needs, soon after, as long as the session lasts."""
        while session is self._session:
            session.held.wake.wait(_POLL)
            session.held.wake.clear()
            try:
                session.held.sweep()
            except Refused as error:
                self.log("sweep_failed", reason=str(error))

    def give_up(self, session_id: str) -> None:
        """A session that is being started will not come about: ends its worker, or the one that is about to start."""
        self._given_up = session_id
        self.abort_join()

    def abort_join(self) -> None:
        """Ends a worker that waits for the others'."""
        if (worker := self._joining) is not None:
            worker.kill()

    def wait_for(self, reason: str) -> None:
        """Sets the state, and logs it if it is new."""
        state = f"waiting: {reason}"
        if state != self.state:
            self.log("waiting", reason=reason)
        self.state = state

    def close(self) -> None:
        """Ends the worker, without a word to anyone."""
        session, self._session = self._session, None
        if session is not None:
            session.worker.kill()
