import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from flaxmpc import secure
from flaxmpc.secure import _spu
from flaxmpc.secure.aside import aside, on_each

PROTOCOLS = ("ABY3", "SEMI2K", "REF2K")


def test_what_an_action_returns_or_raises():
    turn = threading.Lock()
    assert aside(turn, lambda: (threading.current_thread() is not threading.main_thread(), turn.locked())) == (
        True,
        True,
    )
    with pytest.raises(ZeroDivisionError):
        aside(turn, lambda: 1 // 0)
    assert not turn.locked()


def test_on_each_runs_at_the_same_time():
    meet = threading.Barrier(3, timeout=60)
    done = on_each(lambda i: (meet.wait(), 1 // i)[1], [1, 2, 0], "test")
    assert [future.exception() is None for future in done] == [True, True, False]
    assert [done[0].result(), done[1].result()] == [1, 0]


def interrupt_soon() -> None:
    threading.Timer(0.3, lambda: os.kill(os.getpid(), 2)).start()


def test_what_is_interrupted_before_its_turn_never_begins():
    turn, begun = threading.Lock(), []
    with turn:
        interrupt_soon()
        with pytest.raises(KeyboardInterrupt):
            aside(turn, lambda: begun.append(1))
    aside(turn, lambda: None)
    assert not begun


def test_an_interrupted_run_goes_on_and_the_next_use_says_so(group):
    parties = group("SEMI2K")
    other = group("REF2K")
    f = secure.jit(lambda x: x + 1, parties=parties)
    resident = parties.put(np.float32(1))
    f(resident)
    with _spu.log_lock:  # without SPU's log no run begins
        interrupt_soon()
        with pytest.raises(KeyboardInterrupt):
            f(resident)
        for use in (lambda: f(resident), lambda: parties.put(1.0), lambda: other.put(1.0), lambda: secure.InProcess()):
            start = time.monotonic()
            with pytest.raises(secure.SecureError, match=r"^a secure run that was interrupted is still on[^\n]*$"):
                use()
            assert time.monotonic() - start < 5
    assert f(resident) == pytest.approx(2, abs=1e-3)
    assert [member.names for member in parties.members] == [set(resident.names)] * 2
    resident.delete()


def child(script: str, *arguments: object, cache: os.PathLike, seconds: float = 300) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)]
    environment = os.environ | {"FLAXMPC_CACHE": str(cache)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)


# Each thread has its own function and its own group; none is the main one.
NINE_THREADS = """
import faulthandler, sys, threading
faulthandler.enable()
import numpy as np
from flaxmpc import secure

found = {}

def ask(i):
    found[i] = float(secure.jit(lambda x: x * i + 1, sys.argv[1])(np.float32(2)))

threads = [threading.Thread(target=ask, args=(i,)) for i in range(9)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert all(abs(found[i] - (2 * i + 1)) < 1e-2 for i in range(9)), found
"""


def nine_threads(tmp_path, times):
    for i in range(times):
        done = child(NINE_THREADS, PROTOCOLS[i % 3], cache=tmp_path / str(i))
        assert (done.returncode, done.stderr) == (0, "")


def test_any_thread_may_be_the_first(tmp_path):
    nine_threads(tmp_path, 3)


@pytest.mark.slow
def test_any_thread_may_be_the_first_thirty_times(tmp_path):
    nine_threads(tmp_path, 30)


FORKED = """
import os, sys, threading
import numpy as np
from flaxmpc import secure

def use():
    assert abs(secure.jit(lambda x: x * 2 + 1, sys.argv[1])(np.float32(2)) - 5) < 1e-2

thread = threading.Thread(target=use)
thread.start()
thread.join()
child = os.fork()
if child == 0:
    use()
    os._exit(3)
use()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_of_a_process_that_loaded_spu_in_a_thread(tmp_path):
    done = child(FORKED, "ABY3", cache=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


# Interrupts at random moments: of loading SPU and the first use of all, then of starting groups, compiling, sharing,
# running, opening and deleting. In the end the process leaves while a run is on.
INTERRUPTED = """
import faulthandler, os, random, signal, sys, threading, time
faulthandler.enable()
import numpy as np
from flaxmpc import secure

protocol, seed, times = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
random.seed(seed)
x, w = np.full((300, 300), 1 / 300, np.float32), np.ones((300, 300), np.float32)
kept = secure.jit(lambda x, w: (x @ w) * 2 + 1, protocol)

def interrupt_within(seconds):
    threading.Timer(random.uniform(0, seconds), os.kill, (os.getpid(), signal.SIGINT)).start()

def dropped(found):  # as Python does with an interrupt within the callback of a weak reference
    if found.exc_type is KeyboardInterrupt:
        interrupt_within(1)
    else:
        sys.__unraisablehook__(found)

sys.unraisablehook = dropped

def use_many():
    for i in range(1_000_000):
        kept(kept.parties.put(x), w)
        secure.jit(lambda x: x * 2 + i, protocol)(x)

def right(f, *args):
    while True:
        start = time.monotonic()
        try:
            value = f(*args)
        except secure.SecureError as error:
            assert "interrupted" in str(error), error
            assert time.monotonic() - start < 20
            continue
        return float(abs(value - 3).max()) < 1e-2

for i in range(times):
    try:
        interrupt_within(2 if i == 0 else 1)
        use_many()
    except KeyboardInterrupt:
        pass
    assert right(kept, x, w)
    assert right(secure.jit(lambda x: x + (3 - 1 / 300), protocol), x)
try:
    interrupt_within(1)
    while True:
        kept(x, w)
except KeyboardInterrupt:
    sys.exit(7)
"""


def interrupted(tmp_path, protocol, seeds, times):
    for seed in seeds:
        done = child(INTERRUPTED, protocol, seed, times, cache=tmp_path)
        assert (done.returncode, done.stderr) == (7, ""), seed


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_interrupts_at_random_moments(tmp_path, protocol):
    interrupted(tmp_path, protocol, [0], 3)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_many_interrupts_at_random_moments(tmp_path, protocol):
    interrupted(tmp_path, protocol, range(1, 7), 4)


LEAVING = """
import sys, threading
import numpy as np
from flaxmpc import secure

f = secure.jit(lambda x: x @ x, sys.argv[1])
x = np.ones((700, 700), np.float32)
f(x)
threading.Thread(target=f, args=(x,), daemon=True).start()
threading.Event().wait(0.2)
sys.exit(7)
"""


@pytest.mark.parametrize("protocol", ["ABY3", "REF2K"])
def test_a_process_may_end_while_a_run_is_on(tmp_path, protocol):
    done = child(LEAVING, protocol, cache=tmp_path)
    assert (done.returncode, done.stderr) == (7, "")
