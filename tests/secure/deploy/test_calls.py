"""How many calls are served at a time, and that none stands still."""

import contextlib
import threading
import time

import grpc
import pytest

from flaxmpc.secure.deploy.calls import Calls, Watch
from flaxmpc.secure.deploy.errors import Refused
from flaxmpc.secure.deploy.gate import Caller

ALICE, BOB = (Caller(f"client.{name}", "client", 0.0) for name in ("alice", "bob"))
OWNER = Caller("owner", "owner", 0.0)


def test_so_many_of_each_caller_and_of_all_clients_and_the_owner_has_room():
    calls = Calls(each=3, clients=5)
    with contextlib.ExitStack() as stack:
        for caller, count in ((ALICE, 3), (BOB, 2), (OWNER, 3)):
            for _ in range(count):
                stack.enter_context(calls.one(caller, "infer", None))
        for caller, reason in (
            (ALICE, "'client.alice' has 3 calls under way, which is the limit"),
            (BOB, "5 calls of clients are under way, which is the limit"),
            (OWNER, "'owner' has 3 calls under way, which is the limit"),
        ):
            with pytest.raises(Refused, match=reason) as refused, calls.one(caller, "infer", None):
                pass
            assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    with calls.one(ALICE, "infer", None):
        pass


def test_a_method_may_have_fewer():
    calls = Calls(each=3, clients=5)
    with calls.one(ALICE, "bundle", 1):
        with pytest.raises(Refused, match="has 1 calls of 'bundle' under way"), calls.one(ALICE, "bundle", 1):
            pass
        with calls.one(BOB, "bundle", 1), calls.one(ALICE, "infer", None):
            pass
    with pytest.raises(KeyError), calls.one(ALICE, "bundle", 1):
        raise KeyError  # a call that fails is over too
    with calls.one(ALICE, "bundle", 1):
        pass


class Stream:
    """Stands still after its items until it is cancelled."""

    def __init__(self, *items: int, pause: float = 0.0):
        self._items = iter(items)
        self._pause = pause
        self._cancelled = threading.Event()

    def __iter__(self):
        return self

    def __next__(self) -> int:
        time.sleep(self._pause)
        for item in self._items:
            return item
        assert self._cancelled.wait(10)
        raise grpc.RpcError

    def cancel(self) -> None:
        self._cancelled.set()


def test_a_stream_that_stands_still_is_cancelled_and_a_slow_one_is_not():
    watch = Watch(0.4)
    stream = Stream(1, 2, 3, pause=0.2)
    taken = []

    def take() -> None:
        for item in watch.each(stream, stream):
            taken.append(item)
            time.sleep(0.5)  # what is done with it does not count

    start = time.monotonic()
    with pytest.raises(grpc.RpcError):
        take()
    assert taken == [1, 2, 3]
    assert time.monotonic() - start < 5
    assert list(watch.each(stream, iter((1, 2)))) == [1, 2]
