"""The requests that a party holds in a session: they wait, get their turn alone or together with others, and end."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
from grpc import StatusCode

from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.cluster import ClusterFile
from flaxmpc.secure.deploy.errors import Refused


@dataclasses.dataclass(eq=False)
class Request:
    """One party's part of what an owner or a client asks.

    Attributes:
        key: the request's name, the same at all parties; its caller is read from the certificate that it came with.
        what: the model and the program, or "run" for an owner's. Requests of one `what` and `model` may run together;
            the log says it too.
        model: hash of the model's put; empty for an owner's run.
        codes: code of the program, by the number of requests that it serves at once.
        inputs: names of the values that the party holds.
        outputs: names of the outputs; where shares are `given`, they are this request's alone.
        given: shares of the rest of the inputs; they and the outputs are not kept, the answer has the outputs.
        takes: the arrays that the given shares must be of.
        gives: the arrays that the outputs are, where the answer has them.
        answer: the end of the request, once it has ended.
        number: place in the order in which requests came.
        came: the time when it came.
        peers: ranks of the others that have it too; known to party 0 only.
        named: the time when party 0 spoke of it last; known to the others only.
        alone: whether it must run alone, since it failed with others.
    """

    key: m.Key
    what: str
    model: str
    codes: Mapping[int, bytes]
    inputs: Sequence[str]
    outputs: Sequence[str]
    given: Sequence[m.Share] | None = None
    takes: Sequence[m.Array] = ()
    gives: Sequence[m.Array] = ()
    answer: concurrent.futures.Future[m.Answer] = dataclasses.field(default_factory=concurrent.futures.Future)
    number: int = 0
    came: float = 0.0
    peers: set[int] = dataclasses.field(default_factory=set)
    named: float | None = None
    alone: bool = False

    @property
    def kind(self) -> tuple[str, str]:
        """What requests have in common that can run together."""
        return self.model, self.what

    def end(self, answer: m.Answer) -> None:
        """Ends the request, if it has not ended yet."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self.answer.set_result(answer)


def command(requests: Sequence[Request], facts: m.Facts) -> m.Execute:
    """The worker's command for requests of one kind; all parties must have the same `facts`, and these requests.

    What lasts as long as the run has names by the requests' places in it: nobody else's word is in them.
    """
    first = requests[0]
    code = first.codes[len(requests)]
    facts = {
        **facts,
        "request": " ".join(f"{request.key.caller}/{request.key.id}" for request in requests),
        "program": m.digest(code),
        "model": first.model,
    }
    inputs, outputs, given = list(first.inputs), [], []
    for place, request in enumerate(requests):
        shares = request.given or ()
        inputs += [f"r.{place}.{i}" for i in range(len(shares))]
        outputs += [f"r.{place}.{name}" if request.given is not None else name for name in request.outputs]
        given += shares
    return m.Execute(
        facts,
        code,
        inputs,
        outputs,
        given,
        [array for request in requests for array in request.takes],
        answer=first.given is not None,
        gives=[array for request in requests for array in request.gives],
    )


@dataclasses.dataclass(eq=False)
class Turns:
    """A session's requests. Those who ask get turns one after the other, however many requests each of them has.

    Attributes:
        limit: requests that wait or run at most. Who has n of them is let in only while more than n places are
            free: there is room for those who have none.
        each: requests of one caller at most.
        patience: seconds after which a request ends that party 0 does not name; None at party 0.
        mixed: whether requests of several callers may run together.
        clock: gives the time, in seconds.
    """

    limit: int
    each: int
    _: dataclasses.KW_ONLY
    patience: float | None = None
    mixed: bool = False
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self):
        self._changed = threading.Condition()
        self._waiting: dict[m.Key, Request] = {}
        self._running: list[Request] = []
        self._closed: Refused | None = None
        self._came = 0
        self._turn = 0
        self._served: dict[str, int] = {}  # the last turn of each who had one
        self._quiet = self.clock()  # since then no run goes on

    @classmethod
    def of(cls, cluster: ClusterFile, rank: int) -> Turns:
        """A party's, as cluster.toml bounds them.

        A program that gives one request's rows to another serves only whom it can't hurt, unless the party approved it.
        """
        return cls(
            cluster.limits.queue,
            cluster.limits.calls_per_client,
            patience=cluster.timeout_seconds if rank else None,
            mixed=cluster.programs is not None,
        )

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, request: Request) -> None:
        """Takes a request. Refused: too many wait, its id is not new, or no more are taken."""
        with self._changed:
            if self._closed:
                raise Refused(self._closed.code, str(self._closed))
            held = [each.key for each in (*self._waiting.values(), *self._running)]
            if request.key in held:
                raise Refused(StatusCode.ALREADY_EXISTS, f"request {request.key.id} is known already")
            own = sum(key.caller == request.key.caller for key in held)
            if own >= self.each:
                reason = f"{request.key.caller} has {own} requests here, the most that one may have: ask again later"
                raise Refused(StatusCode.RESOURCE_EXHAUSTED, reason)
            if own >= self.limit - len(self):
                raise Refused(StatusCode.RESOURCE_EXHAUSTED, f"{len(self)} requests wait: try again later")
            self._came += 1
            request.number, request.came = self._came, self.clock()
            self._waiting[request.key] = request
            self._changed.notify_all()

    def wait(self, request: Request) -> m.Answer:
        """Waits for the end of a request."""
        while True:
            try:
                return request.answer.result(self.patience)
            except concurrent.futures.TimeoutError:
                self.expire()

    def abandon(self, request: Request, reason: str) -> None:
        """Ends a request that waits; one that runs already runs on."""
        with self._changed:
            if self._waiting.get(request.key) is request:
                del self._waiting[request.key]
            request.end(m.Answer(error=reason))
            self._changed.notify_all()

    def wake(self) -> None:
        """Has those who wait here look again whether to wait."""
        with self._changed:
            self._changed.notify_all()

    def keys(self) -> list[m.Key]:
        """The names of the requests that wait."""
        with self._changed:
            return list(self._waiting)

    # At party 0.

    def came(self, request: Request, rank: int) -> None:
        """Notes that party `rank` has the request too."""
        with self._changed:
            request.peers.add(rank)
            self._changed.notify_all()

    def next(self, num_peers: int, timeout: float) -> list[Request]:
        """The requests whose turn it is: the first that all peers have, and as many of its kind as can run with it."""

        def ready() -> list[Request]:
            return _by_turns((each for each in self._waiting.values() if len(each.peers) == num_peers), self._served)

        with self._changed:
            self._changed.wait_for(lambda: self._closed or ready(), timeout)
            if self._closed or not (waiting := ready()):
                return []
            first = waiting[0]
            if first.alone:
                return self._start([first])
            same = [
                other
                for other in waiting
                if other.kind == first.kind and not other.alone and (self.mixed or other.key.caller == first.key.caller)
            ]
            return self._start(same[: max(count for count in (1, *first.codes) if count <= len(same))])

    # At the others.

    def has(self, key: m.Key, timeout: float, gone: threading.Event) -> bool:
        """Waits for a request, `timeout` seconds at most or until party 0 is `gone` (then `wake`); whether it came."""
        with self._changed:
            self._changed.wait_for(lambda: key in self._waiting or self._closed or gone.is_set(), timeout)
            if key in self._waiting:
                self._waiting[key].named = self.clock()
            return key in self._waiting

    def named(self, keys: Sequence[m.Key], waiting: Iterable[m.Key] = ()) -> list[Request]:
        """The requests of these names, as party 0 chose them; none if they are not all here, or can't run together.

        `waiting` are those that still wait at party 0. Others that it knew once have ended there, and end here too.
        """
        with self._changed:
            now = self.clock()
            for key in {*keys, *waiting} & self._waiting.keys():
                self._waiting[key].named = now
            self._end_unnamed(lambda each: now if each.named is None else each.named)
            found = [self._waiting[key] for key in keys if key in self._waiting]
            whole = len(found) == len(keys) and len({request.kind for request in found}) == 1
            return self._start(found) if whole and len(found) in found[0].codes else []

    def expire(self) -> None:
        """Ends requests that party 0 has not named for `patience` seconds.

        It asks for a request when that came there, and says before every run what else waits. So one that it has asked
        for is safe until the run is over.
        """
        with self._changed:
            quiet = self.clock() if self._running else self._quiet
            self._end_unnamed(lambda each: each.came if each.named is None else max(each.named, quiet))

    def _end_unnamed(self, since: Callable[[Request], float]) -> None:
        """Ends the requests that party 0 has not named `since` a time that is too long ago."""
        if (patience := self.patience) is not None:
            now = self.clock()
            reason = f"party 0 has not asked for this request for {patience:g} s: was it sent there?"
            self._end_waiting(lambda each: now - since(each) >= patience, reason)

    # At all of them.

    def _start(self, requests: list[Request]) -> list[Request]:
        for request in requests:
            del self._waiting[request.key]
        self._running += requests
        return requests

    def _stop(self, requests: Sequence[Request]) -> None:
        self._running = [request for request in self._running if request not in requests]
        self._quiet = self.clock()

    def end(self, requests: Sequence[Request], answer: m.Answer) -> None:
        """Ends requests that ran: each gets its own part of the answer's shares, or the error, which is everyone's."""
        each = len(answer.shares) // max(1, len(requests))
        with self._changed:
            # First they make room: who has an answer may send the next request at once.
            self._stop(requests)
            self._turn += 1
            self._served.update({request.key.caller: self._turn for request in requests})
            for i, request in enumerate(requests):
                own = answer.shares[i * each : (i + 1) * each]
                request.end(msgspec.structs.replace(answer, shares=own))
            self._changed.notify_all()

    def separate(self, requests: Sequence[Request]) -> None:
        """Gives requests that failed together turns of their own; the turn that they had does not count."""
        with self._changed:
            self._stop(requests)
            for request in requests:
                request.alone = True
                if not request.answer.done():
                    self._waiting[request.key] = request
            if self._closed:
                self._end_waiting(lambda _: True, str(self._closed))
            self._changed.notify_all()

    def runs(self, request: Request) -> bool:
        """Whether a request has its turn now."""
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
            self._end_waiting(lambda _: True, str(self._closed))
            self._changed.notify_all()

    def _end_waiting(self, which: Callable[[Request], bool], reason: str) -> None:
        for request in [request for request in self._waiting.values() if which(request)]:
            del self._waiting[request.key]
            request.end(m.Answer(error=reason))

    def wait_until_idle(self) -> None:
        """Waits until no request waits or runs."""
        with self._changed:
            self._changed.wait_for(lambda: not len(self))


def _by_turns(requests: Iterable[Request], served: Mapping[str, int]) -> list[Request]:
    """Sorts requests: the first of each caller, then the second of each, and so on.

    Who had no turn for the longest time comes first. `served` has the number of each caller's last turn.
    """
    earlier: collections.Counter[str] = collections.Counter()
    ranked: list[tuple[int, int, int, Request]] = []
    for request in sorted(requests, key=lambda each: each.number):
        caller = request.key.caller
        ranked.append((earlier[caller], served.get(caller, 0), request.number, request))
        earlier[caller] += 1
    return [request for *_, request in sorted(ranked, key=lambda each: each[:3])]
