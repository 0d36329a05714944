"""The calls that a party serves at a time: so many of each caller, and none that stands still."""

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

import grpc

from flaxmpc.secure.deploy.errors import Refused
from flaxmpc.secure.deploy.gate import Caller

T = TypeVar("T")

_CLIENTS = "all clients"  # is counted as a caller is, whose name it can't be


class Call(NamedTuple):
    """A call, as a host's method sees it: who calls, and when it is over."""

    caller: Caller
    context: grpc.ServicerContext

    def when_over(self, callback: Callable[[], None]) -> None:
        """Calls back when the call is over, however it ends; at once if it is over already."""
        if not self.context.add_callback(callback):
            callback()


class Calls:
    """Counts the calls under way."""

    def __init__(self, each: int, clients: int):
        """At most `each` calls of one caller, and `clients` of all clients together: the others keep their room."""
        self._each = each
        self._clients = clients
        self._lock = threading.Lock()
        self._open: collections.Counter[str] = collections.Counter()

    @contextlib.contextmanager
    def one(self, caller: Caller, method: str, most: int | None) -> Iterator[None]:
        """A call while it lasts. Refused: there are too many of its caller, of its method (`most`), or in all."""
        counted = [(caller.name, self._each, f"{caller.name!r} has {self._each} calls under way")]
        if most is not None:
            said = f"{caller.name!r} has {most} calls of {method!r} under way"
            counted.append((f"{caller.name} {method}", most, said))
        if caller.role not in ("owner", "leader", "party"):
            counted.append((_CLIENTS, self._clients, f"{self._clients} calls of clients are under way"))
        with self._lock:
            for key, limit, said in counted:
                if self._open[key] >= limit:
                    reason = f"{said}, which is the limit: try again later"
                    raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
            self._open.update(key for key, *_ in counted)
        try:
            yield
        finally:
            with self._lock:
                self._open -= collections.Counter(key for key, *_ in counted)  # and forgets those with none


class Cancelled(Protocol):
    """A call that can be ended, or a stand-in for one."""

    def cancel(self) -> Any: ...


class Watch:
    """Ends calls whose caller neither sends nor takes anything for too long."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._due: dict[Cancelled, float] = {}
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    @contextlib.contextmanager
    def over(self, call: Cancelled) -> Iterator[None]:
        """Cancels the call if what is waited for in the block does not come within the time."""
        self._due[call] = time.monotonic() + self._seconds
        try:
            yield
        finally:
            del self._due[call]

    def each(self, call: Cancelled, items: Iterable[T]) -> Iterator[T]:
        """The items; cancels the call if one of them does not come within the time."""
        iterator = iter(items)
        while True:
            with self.over(call):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def _run(self) -> None:
        while True:
            time.sleep(self._seconds / 4)
            now = time.monotonic()
            for call, due in self._due.copy().items():
                if due < now:
                    call.cancel()
