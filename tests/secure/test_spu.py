import os
import subprocess
import sys

import pytest

from flaxmpc.secure import _spu


@pytest.mark.parametrize(("cores", "parties", "threads"), [(2, 3, "1"), (2, 1, "2"), (16, 3, "5"), (None, 1, "1")])
def test_parties_share_the_cores(monkeypatch, cores, parties, threads):
    monkeypatch.delenv(_spu.THREAD_LIMIT, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert _spu.thread_limit(parties) == {_spu.THREAD_LIMIT: threads}


def test_a_limit_that_is_set_stays(monkeypatch):
    monkeypatch.setenv(_spu.THREAD_LIMIT, "7")
    assert _spu.thread_limit(3) == {_spu.THREAD_LIMIT: "7"}


# A parallel region of SPU's OpenMP has as many threads as it was limited to when it was loaded; the environment, which
# other libraries read later, is as before.
LIMITED = """
import ctypes, os
from flaxmpc.secure._spu import THREAD_LIMIT, load_spu
load_spu()
print(ctypes.CDLL("libgomp.so.1").omp_get_thread_limit(), os.environ.get(THREAD_LIMIT))
"""


@pytest.mark.parametrize(("own", "found"), [(None, f"{max(1, (os.cpu_count() or 1) // 3)} None"), ("2", "2 2")])
def test_spu_is_loaded_with_the_limit(own, found):
    environment = {name: value for name, value in os.environ.items() if name != _spu.THREAD_LIMIT}
    environment |= {} if own is None else {_spu.THREAD_LIMIT: own}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LIMITED], env=environment, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.stderr) == (found, "")
