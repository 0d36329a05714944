"""Party 0's part: it forms the group, and gives every request its turn at all parties."""

import collections
import concurrent.futures
import contextlib
import functools
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc

from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy import rpc
from flaxmpc.secure.deploy.cluster import ClusterFile
from flaxmpc.secure.deploy.errors import STARTED_ANEW, Refused
from flaxmpc.secure.deploy.session import Session, Sessions
from flaxmpc.secure.deploy.turns import Request

_POLL = 1.0  # seconds between looks at the peers while nothing is asked
_MOST_MISSED = 3  # looks in a row that a peer may miss


class Leader(threading.Thread):
    """A thread at party 0 that forms the group, and then runs requests, one thing at a time."""

    def __init__(self, cluster: ClusterFile, facts: m.Facts, sessions: Sessions, log: Callable[..., None]):
        """ValueError: a certificate or key is not there."""
        super().__init__(name="leader", daemon=True)
        self._cluster = cluster
        self._facts = facts
        self._sessions = sessions
        self._log = log
        self._timeout = cluster.timeout_seconds
        self._peers: Mapping[int, rpc.Peer] = {
            entry.rank: rpc.Peer(cluster, cluster.party[0], entry) for entry in cluster.party if entry.rank != 0
        }
        self._missed: collections.Counter[int] = collections.Counter()
        self._committing = threading.Lock()
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Ends the thread after the running request, and waits for that."""
        self._stopping.set()
        self.join()

    def announce(self, session: Session, request: Request) -> None:
        """Finds out whether the peers have a request too: only then does it get a turn, so that none is waited for."""

        def told(rank: int, future: Any) -> None:
            if future.cancelled():
                return
            if (error := future.exception()) is None:
                session.turns.came(request, rank)
            else:
                session.turns.abandon(request, self._describe(rank, error))

        message = m.Turn(session.id, [request.key])
        # It hears who does not answer before the others lose the patience that they have had since they were asked.
        asked = self._ask_later("has", message, 3 / 4 * self._timeout)
        for rank, future in asked.items():
            future.add_done_callback(functools.partial(told, rank))
        # Once it has ended the peers need not say any more whether it came.
        request.answer.add_done_callback(lambda _: [future.cancel() for future in asked.values()])

    def commit(self, session: Session, hash_: str) -> None:
        """Puts a staged put in the place of the one before, at all parties or at none.

        Requests that were taken before keep their own put, so runs need not be waited for. First all parties promise to
        keep it, with its owner or without. Then party 0's disk decides, ahead of the others: a session begins with what
        that says, and all have it.

        Raises:
            Refused: a party does not hold it; or one was lost since party 0 decided, and with it the session.
        """
        with self._committing:
            try:
                session.held.promise(hash_)
                self._ask_peers("promise", m.Switch(session.id, hash_))
            except Refused:
                with contextlib.suppress(Refused):
                    session.held.promise(None)
                    self._ask_peers("promise", m.Switch(session.id, None))
                raise
            try:
                model = session.held.switch(hash_)
                self._ask_peers("switch", m.Switch(session.id, hash_))
            except (Refused, OSError) as error:
                reason = f"a put was half-way: {error}"
                self._sessions.drop(session, reason)
                raise Refused(grpc.StatusCode.ABORTED, f"{reason}; {STARTED_ANEW}") from error
            self._log("model", name=model.name, hash=hash_[:16], programs=sorted(model.programs))

    def _ask_peers(self, method: str, message: m.Message) -> None:
        """Asks all peers at the same time. Refused: one refused, or did not answer in time."""
        asked = self._ask_later(method, message, self._timeout)
        errors = {rank: error for rank, future in asked.items() if (error := future.exception()) is not None}
        for rank, error in errors.items():  # once all have ended
            raise Refused(error.code(), self._describe(rank, error))

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._once()
            except Exception as error:  # whatever it is, the others must not wait for ever
                self._log("error", reason=f"{type(error).__name__}: {error}")
                if (session := self._sessions.live()) is not None:
                    self._sessions.drop(session, f"party 0 failed: {type(error).__name__}")
                self._stopping.wait(_POLL)

    def _once(self) -> None:
        session = self._sessions.live()
        if session is None:
            self._form_group()
            if self._sessions.live() is None:
                self._stopping.wait(_POLL)
        elif not (requests := session.turns.next(len(self._peers), _POLL)):
            self._look_at_peers(session)
        else:
            try:
                self._take_turn(session, requests)
            except BaseException:
                session.turns.end(requests, m.Answer(error=f"party 0 failed; {STARTED_ANEW}"))
                raise

    def _take_turn(self, session: Session, requests: Sequence[Request]) -> None:
        """Runs requests at all parties; ends them, or the session if the parties are not in step any more."""
        lost: dict[int, str] = {}
        message = m.Turn(session.id, [request.key for request in requests], session.turns.keys())
        asked = self._ask_later("step", message)
        for rank, future in asked.items():
            future.add_done_callback(functools.partial(self._heard, session, lost, rank))
        answer = self._sessions.run(session, requests)
        failed = [answer.error] if answer.error else []
        if answer.in_step:
            failed += self._errors(asked, lost)
        else:  # the others would wait for this party until their time-out
            for future in asked.values():
                future.cancel()
            lost.setdefault(0, answer.error or "")
        # It failed at some parties and not at others, or elsewhere: they hold different values now.
        uneven = 0 < len(failed) <= len(self._peers) or len(set(failed)) > 1
        if lost or uneven:
            reason = [*lost.values(), *failed][0]
            self._sessions.drop(session, reason)
            session.turns.end(requests, m.Answer(error=f"{reason}; {STARTED_ANEW}"))
        elif failed and len(requests) > 1:
            session.turns.separate(requests)
        else:
            session.turns.end(requests, answer)

    def _heard(self, session: Session, lost: dict[int, str], rank: int, future: Any) -> None:
        """A peer that can't go on leaves the others waiting in SPU: ends that at once, and notes why in `lost`."""
        if future.cancelled():
            return
        try:
            answer = m.decode(future.result(), m.Answer)
        except rpc.NO_ANSWER as error:
            lost.setdefault(rank, self._describe(rank, error))
        else:
            if answer.in_step:
                return
            lost.setdefault(rank, answer.error or "")
        self._sessions.drop(session, lost[rank])

    def _errors(self, asked: Mapping[int, Any], lost: dict[int, str]) -> list[str]:
        """The errors that the peers answer with; in `lost`, why those do not go on that do not."""
        errors = []
        end = time.monotonic() + self._timeout
        for rank, future in asked.items():
            try:
                theirs = m.decode(future.result(timeout=max(0.1, end - time.monotonic())), m.Answer)
            except (*rpc.NO_ANSWER, grpc.FutureTimeoutError, grpc.FutureCancelledError) as error:
                future.cancel()
                lost.setdefault(rank, self._describe(rank, error))
            else:
                if not theirs.in_step:  # `_heard` may come later
                    lost.setdefault(rank, theirs.error or "")
                errors += [theirs.error] if theirs.error else []
        return errors

    def _ask_later(self, method: str, message: m.Message, timeout: float | None = None) -> dict[int, Any]:
        """Asks all peers at the same time; futures of the answers, by rank."""
        return {rank: peer.ask_later(method, message, timeout) for rank, peer in self._peers.items()}

    def _describe(self, rank: int, error: BaseException) -> str:
        return rpc.describe(self._cluster.party[rank], error)

    def _form_group(self) -> None:
        """Starts a session at all parties; on failure the state says what is waited for."""
        for rank, peer in self._peers.items():
            try:
                status = peer.ask("status", m.Empty(), m.Status, timeout=self._timeout)
            except rpc.NO_ANSWER as error:
                self._sessions.wait_for(self._describe(rank, error))
                return
            if difference := m.difference(self._facts, status.facts):
                self._sessions.wait_for(f"party {rank} differs from party 0: {difference}")
                return
        session_id = secrets.token_hex(16)
        chosen = self._sessions.chosen()
        message = m.Form(session_id, self._facts, dict(chosen))
        asked = self._ask_later("form", message)
        failures = []
        with concurrent.futures.ThreadPoolExecutor(1) as own:
            joined = own.submit(self._sessions.start, session_id, chosen)
            for rank, future in asked.items():
                try:
                    future.result(timeout=self._timeout + 15)
                except (grpc.RpcError, grpc.FutureTimeoutError) as error:
                    failures.append(self._describe(rank, error))
                    break
            if failures:
                self._sessions.give_up(session_id)
            try:
                joined.result()
            except Refused as error:
                failures.append(str(error))
        if failures:
            if (session := self._sessions.live()) is not None:
                self._sessions.drop(session, failures[0])
            self._sessions.wait_for(failures[0])

    def _look_at_peers(self, session: Session) -> None:
        """Drops a session whose peers say that they left it, or don't answer several times in a row."""
        for rank, peer in self._peers.items():
            try:
                theirs = peer.ask("status", m.Empty(), m.Status, timeout=self._timeout / 2)
            except rpc.NO_ANSWER as error:
                self._missed[rank] += 1
                if self._missed[rank] >= _MOST_MISSED:
                    self._missed.clear()
                    self._sessions.drop(session, self._describe(rank, error))
                    return
            else:
                self._missed[rank] = 0
                if theirs.session != session.id:
                    self._sessions.drop(session, f"party {rank} lost its shares: {theirs.state}")
                    return
