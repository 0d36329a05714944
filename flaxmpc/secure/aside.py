"""Work that no interrupt may cut short: it runs aside, in threads that Ctrl-C does not reach.

SPU cannot stop a run. If its caller is interrupted (Python interrupts the main thread alone), the run goes on to its
end with its locks held, so that the parties stay in step; until then the next use says so.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flaxmpc.secure._spu import SecureError

T = TypeVar("T")
Item = TypeVar("Item")

# How long the next use, and the end of the process, wait for what was interrupted.
_PATIENCE_SECONDS = 0.5


class _Task:
    """What its caller may have abandoned."""

    abandoned = False


_begun: set[_Task] = set()


def _any_within(patience: float, *, abandoned: bool) -> bool:
    """Whether a task (or an abandoned one) is still on after so many seconds."""
    end = time.monotonic() + patience
    while any(task.abandoned >= abandoned for task in tuple(_begun)):
        if time.monotonic() >= end:
            return True
        time.sleep(0.005)
    return False


def check_no_interrupted() -> None:
    """SecureError if in this process something is still on whose caller was interrupted."""
    if _any_within(_PATIENCE_SECONDS, abandoned=True):
        raise SecureError(
            "a secure run that was interrupted is still on, as SPU cannot stop one: "
            "try again when it has ended, or in a new process"
        )


def aside(turn: threading.Lock, action: Callable[[], T]) -> T:
    """What `action` returns or raises, run in another thread while that holds `turn`.

    If the caller is interrupted before `action` began, it never begins; otherwise it goes on to its end.
    """
    task = _Task()
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
    # A lock and not the future tells the end: an interrupt could leave the future locked, and the thread would hang.
    finished = threading.Lock()
    finished.acquire()

    def work() -> None:
        try:
            with turn:
                if not task.abandoned:
                    _begun.add(task)
                    _settle(outcome, action)
                    _begun.discard(task)
        finally:
            finished.release()

    try:
        threading.Thread(target=work, name="flaxmpc-aside", daemon=True).start()
        finished.acquire()
        return outcome.result()
    except BaseException:
        task.abandoned = True
        raise


def on_each(action: Callable[[Item], T], items: Sequence[Item], name: str) -> list[concurrent.futures.Future[T]]:
    """`action` on every item at the same time, each in a thread called `name`; returns when all are done.

    Unlike those of a ThreadPoolExecutor, the interpreter does not wait for these threads when it ends.
    """
    done: list[concurrent.futures.Future[T]] = []
    for item in items:
        done.append(concurrent.futures.Future())
        arguments = (done[-1], lambda item=item: action(item))
        threading.Thread(target=_settle, args=arguments, name=name, daemon=True).start()
    concurrent.futures.wait(done)
    return done


def _settle(outcome: concurrent.futures.Future[Any], action: Callable[[], Any]) -> None:
    try:
        outcome.set_result(action())
    except BaseException as error:
        outcome.set_exception(error)


@atexit.register
def _leave() -> None:
    """Lets the process end, with its own exit code, while SPU is still in a run, whose threads nobody can stop.

    They use what the C libraries would tear down at exit, so that is left out. And a thread that comes back from SPU
    while the interpreter ends would abort the process with a message; it waits for the end instead, and in silence.
    """
    if _any_within(_PATIENCE_SECONDS, abandoned=False):
        libc = ctypes.CDLL(None)
        faulthandler.disable()  # at the interpreter's end it would set its signals back
        libc.signal(signal.SIGABRT, libc.pause)
        if hasattr(libc, "on_exit"):  # glibc
            libc.on_exit(libc._exit, None)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        libc.fflush(None)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
