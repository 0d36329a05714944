"""The requests that a party holds in a session: they wait, get their turn alone or together with others, and end."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import threading
from collections.abc import Mapping, Sequence

import grpc

from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.rpc import Refused


@dataclasses.dataclass(eq=False)
class Request:
    """One party's part of what an owner or a client asks.

    Attributes:
        id: the same at all parties.
        what: for the log.
        model: hash of the model's put; empty for an owner's run.
        codes: the program, by the number of requests that it serves at once.
        inputs: names of values that the party holds.
        outputs: names of its outputs.
        given: shares of the rest of its inputs; they, and the outputs, are not kept but answered.
        takes: what each that is given must be.
        gives: what each output is, where they are answered.
        answer: how it ended, once it has.
    """

    id: str
    what: str
    model: str
    codes: Mapping[int, bytes]
    inputs: Sequence[str]
    outputs: Sequence[str]
    given: Sequence[m.Share] | None = None
    takes: Sequence[m.Array] = ()
    gives: Sequence[m.Array] = ()
    answer: concurrent.futures.Future[m.Answer] = dataclasses.field(default_factory=concurrent.futures.Future)
    peers: set[int] = dataclasses.field(default_factory=set)  # that have it too; known to party 0 only
    alone: bool = False

    @property
    def kind(self) -> tuple[str, str]:
        """Requests of one kind can run together."""
        return self.model, self.what

    def end(self, answer: m.Answer) -> None:
        """The first end counts."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self.answer.set_result(answer)


def command(requests: Sequence[Request], facts: m.Facts) -> m.Execute:
    """What the worker runs for requests of one kind; all parties must have the same `facts`, and these requests."""
    first = requests[0]
    code = first.codes[len(requests)]
    facts = {
        **facts,
        "request": " ".join(request.id for request in requests),
        "program": m.digest(code),
        "model": first.model,
    }
    given = [(f"r.{each.id}.{i}", share) for each in requests for i, share in enumerate(each.given or ())]
    return m.Execute(
        facts,
        code,
        [*first.inputs, *(name for name, _ in given)],
        [name for request in requests for name in request.outputs],
        [share for _, share in given],
        [array for request in requests for array in request.takes],
        answer=first.given is not None,
        gives=[array for request in requests for array in request.gives],
    )


class Turns:
    """A session's requests, in the order in which they came."""

    def __init__(self, limit: int):
        """At most `limit` wait or run."""
        self._limit = limit
        self._changed = threading.Condition()
        self._waiting: dict[str, Request] = {}
        self._running: list[Request] = []
        self._closed: Refused | None = None

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, request: Request) -> None:
        """Refused: too many wait, its id is not new, or no more are taken."""
        with self._changed:
            if self._closed:
                raise Refused(self._closed.code, str(self._closed))
            if len(self) >= self._limit:
                raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{len(self)} requests wait: try again later")
            if request.id in self._waiting or any(request.id == running.id for running in self._running):
                raise Refused(grpc.StatusCode.ALREADY_EXISTS, f"request {request.id} is known already")
            self._waiting[request.id] = request
            self._changed.notify_all()

    def abandon(self, request: Request, reason: str) -> None:
        """It will not have a turn. If it runs already, so be it."""
        with self._changed:
            self._waiting.pop(request.id, None)
            self._changed.notify_all()
        request.end(m.Answer(error=reason))

    def has(self, request: str, timeout: float) -> bool:
        """Whether a request came here within `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: request in self._waiting or self._closed, timeout)
            return request in self._waiting

    def came(self, request: Request, rank: int) -> None:
        """Party `rank` has it too."""
        with self._changed:
            request.peers.add(rank)
            self._changed.notify_all()

    def next(self, num_peers: int, timeout: float) -> list[Request]:
        """The requests whose turn it is: the first that all peers have, and as many of its kind as can run with it."""

        def ready() -> list[Request]:
            return [request for request in self._waiting.values() if len(request.peers) == num_peers]

        with self._changed:
            self._changed.wait_for(lambda: self._closed or ready(), timeout)
            if self._closed or not (waiting := ready()):
                return []
            first = waiting[0]
            same = [other for other in waiting if other.kind == first.kind and not other.alone]
            count = 1 if first.alone else max(count for count in (1, *first.codes) if count <= len(same))
            return self._start([first] if first.alone else same[:count])

    def named(self, ids: Sequence[str]) -> list[Request]:
        """The same requests, as another party chose them; none if they are not all here, or can't run together."""
        with self._changed:
            found = [self._waiting[id_] for id_ in ids if id_ in self._waiting]
            whole = len(found) == len(ids) and len({request.kind for request in found}) == 1
            return self._start(found) if whole and len(found) in found[0].codes else []

    def _start(self, requests: list[Request]) -> list[Request]:
        for request in requests:
            del self._waiting[request.id]
        self._running += requests
        return requests

    def end(self, requests: Sequence[Request], answer: m.Answer) -> None:
        """Each gets its own part of the answer's shares; or the error, which is all of theirs."""
        each = len(answer.shares) // max(1, len(requests))
        for i, request in enumerate(requests):
            own = answer.shares[i * each : (i + 1) * each]
            request.end(m.Answer(answer.error, answer.in_step, own, answer.seconds, answer.bytes_sent, answer.rounds,
                                 answer.ops))  # fmt: skip
        with self._changed:
            self._running = [request for request in self._running if request not in requests]
            self._changed.notify_all()

    def separate(self, requests: Sequence[Request]) -> None:
        """They did not run together: each gets a turn of its own, before all others."""
        with self._changed:
            self._running = [request for request in self._running if request not in requests]
            for request in requests:
                request.alone = True
            again = {request.id: request for request in requests if not request.answer.done()}
            self._waiting = {**again, **self._waiting}
            if self._closed:
                self._end_waiting(self._closed)
            self._changed.notify_all()

    def runs(self, request: Request) -> bool:
        """Whether it has its turn now."""
        with self._changed:
            return request in self._running

    def inputs(self) -> set[str]:
        """Names of the values that the requests need."""
        with self._changed:
            return {name for request in (*self._waiting.values(), *self._running) for name in request.inputs}

    def close(self, reason: Refused) -> None:
        """Takes no more; ends those that wait, not those that run."""
        with self._changed:
            self._closed = self._closed or reason
            self._end_waiting(self._closed)
            self._changed.notify_all()

    def _end_waiting(self, reason: Refused) -> None:
        for request in self._waiting.values():
            request.end(m.Answer(error=str(reason)))
        self._waiting.clear()

    def wait_until_idle(self) -> None:
        """Until none waits or runs."""
        with self._changed:
            self._changed.wait_for(lambda: not len(self))
