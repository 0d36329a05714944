import concurrent.futures.thread
import gc
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmpc import secure
from flaxmpc.secure import party


def held(parties: secure.InProcess) -> list[int]:
    return [len(member.names) for member in parties.members]


def test_parties_is_an_interface():
    with pytest.raises(TypeError, match="abstract"):
        secure.Parties(secure.Config())  # pyright: ignore[reportAbstractUsage]
    assert secure.Parties.__abstractmethods__ == {"store", "fetch", "run"}


def test_put_open_delete():
    parties = secure.InProcess("ABY3")
    tree = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": [True, 7, ()]}
    resident = parties.put(tree)
    assert held(parties) == [3, 3, 3]
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), resident.struct) == {
        "a": ((2, 3), "float32"),
        "b": [((), "bool"), ((), "int32"), ()],
    }
    np.testing.assert_allclose(parties.open(resident.names[0]), tree["a"], atol=1e-5)
    resident.delete()
    assert held(parties) == [0, 0, 0]
    with pytest.raises(ValueError, match="deleted"):
        secure.jit(lambda t: t["a"], parties=parties)(resident)


def test_no_share_shows_the_value(monkeypatch):
    parties = secure.InProcess("ABY3")
    given = []
    monkeypatch.setattr(parties, "store", lambda name, shares: given.extend(shares))
    parties.put(np.full(64, 3.0, np.float32))
    chunks = [share.share_chunks[0] for share in given]
    assert len(set(chunks)) == 3
    encoded = (3 << 18).to_bytes(8, "little")
    assert not any(encoded in chunk for chunk in chunks)


def test_a_dropped_handle_is_freed_by_the_next_use():
    parties = secure.InProcess("SEMI2K")
    resident = parties.put([1.0, 2.0])
    del resident
    gc.collect()
    parties.put(2.0).delete()
    assert held(parties) == [0, 0]


def test_a_handle_may_be_dropped_in_the_middle_of_anything():
    """A collection may strike in a use of the group, or where a thread starts, under the lock that all starts need."""
    parties = secure.InProcess("REF2K")
    residents = [parties.put(1.0), parties.put(2.0)]
    with parties._lock:
        residents.pop()
        gc.collect()
    with concurrent.futures.thread._global_shutdown_lock:  # pyright: ignore[reportAttributeAccessIssue]
        residents.pop()
        gc.collect()
    assert held(parties) == [2]
    parties.put(3.0).delete()
    assert held(parties) == [0]


def test_no_growth_and_no_threads_over_twenty_runs():
    f = secure.jit(lambda x: x * x, "ABY3")
    x = np.ones(8, np.float32)
    f(x)
    threads = threading.active_count()
    for _ in range(20):
        f(x)
    assert isinstance(f.parties, secure.InProcess)
    assert held(f.parties) == [0, 0, 0]
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("leaf", "error", "message"),
    [
        (np.float32("nan"), ValueError, r"value\['w'\]\[1\] holds nan, which is not finite"),
        (np.array([1, -np.inf]), ValueError, r"value\['w'\]\[1\] holds -inf, which is not finite"),
        (
            2.0**44,
            ValueError,
            r"value\['w'\]\[1\] holds 17592186044416.0, which is beyond ±1.75922e\+13, the range of FM64",
        ),
        (2**31, ValueError, r"value\['w'\]\[1\] holds 2147483648, which is beyond int32"),
        ("text", TypeError, r"value\['w'\]\[1\] has dtype <U4"),
        (np.float16(1), TypeError, r"value\['w'\]\[1\] has dtype float16"),
        (jnp.bfloat16(1), TypeError, r"value\['w'\]\[1\] has dtype bfloat16"),
        (1j, TypeError, r"value\['w'\]\[1\] has dtype complex128"),
        (object(), TypeError, r"value\['w'\]\[1\] has dtype object"),
    ],
)
def test_what_has_no_encoding_is_refused_by_path(group, leaf, error, message):
    with pytest.raises(error, match=message):
        group("REF2K").put({"w": [1.0, leaf]})


def test_the_largest_encodable_value_survives(group):
    value = np.float32(2**44 - 2**20)
    f = secure.jit(lambda x: -x, parties=group("REF2K"))
    assert f(value) == -value


def test_float64_is_computed_as_float32(group):
    run = secure.jit(lambda x: x + 1, parties=group("REF2K"))(np.ones((2, 2)))
    assert run.dtype == np.float32


def test_an_error_of_all_parties_leaves_the_group_in_use():
    parties = secure.InProcess("ABY3")
    resident = parties.put(np.ones(3, np.float32))
    loop = secure.jit(lambda x: jax.lax.while_loop(lambda v: v.sum() < 100, lambda v: v * 2, x), parties=parties)
    with pytest.raises(
        secure.SecureError, match=r"^the secure run failed: While with secret condition is not supported$"
    ) as e:
        loop(resident)
    assert isinstance(e.value.__cause__, RuntimeError)
    np.testing.assert_allclose(secure.jit(lambda x: x * 2, parties=parties)(resident), [2, 2, 2], atol=1e-4)
    assert held(parties) == [1, 1, 1]


def test_an_error_of_one_party_ends_and_the_group_starts_anew(monkeypatch):
    monkeypatch.setattr(party, "_RECV_TIMEOUT_MS", 3000)
    parties = secure.InProcess("ABY3")
    resident = parties.put(np.ones(3, np.float32))
    square = secure.jit(lambda x: x * x, parties=parties)
    threads = threading.active_count()
    parties.members[1].delete(resident.names)
    with pytest.raises(secure.SecureError, match=r"^the secure run failed: .*symbol \S+ not found$"):
        square(resident)
    assert threading.active_count() == threads
    with pytest.raises(ValueError, match="started anew after an error, without these values: put them again"):
        square(resident)
    resident = parties.put(np.full(3, 2.0, np.float32))
    np.testing.assert_allclose(square(resident), [4, 4, 4], atol=1e-4)


def test_two_threads_may_share_a_group(group):
    f = secure.jit(lambda x: x * 3, parties=group("ABY3"))
    results = {}

    def ask(i):
        results[i] = float(f(np.float32(i)))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: pytest.approx(3 * i, abs=1e-3) for i in range(6)}


# --------------------------------------------------------------------------------------- values that are opened once

W = np.random.default_rng(0).normal(size=(5, 32, 32)).astype(np.float32)
V = np.random.default_rng(1).normal(size=(4, 32)).astype(np.float32)


def times(w, v):
    return v @ w["w"]


def test_a_resident_value_is_opened_once(group):
    parties = group("SEMI2K")
    f = secure.jit(times, parties=parties)
    resident = parties.put({"w": W[0]})
    cold, *warm = [f.run(resident, V) for _ in range(3)]
    assert cold.cost.bytes_sent > 4 * warm[0].cost.bytes_sent == 4 * warm[1].cost.bytes_sent
    for run in (cold, *warm):
        np.testing.assert_allclose(run.output, V @ W[0], atol=2e-3)
    # Another function opens it no more than the first; what is not resident is opened every time.
    double = secure.jit(lambda w, v: 2 * (v @ w["w"]), parties=parties)
    assert double.run(resident, V).cost.bytes_sent < cold.cost.bytes_sent / 2
    given = [f.run({"w": W[0]}, V).cost.bytes_sent for _ in range(2)]
    assert given == [cold.cost.bytes_sent] * 2


def test_a_new_value_is_never_taken_for_one_that_was_opened(group):
    """SPU knows by its address what was opened."""
    parties, others = group("SEMI2K"), secure.InProcess("SEMI2K")
    functions = [secure.jit(times, parties=each) for each in (parties, others)]
    sent = set()
    for w in W:
        residents = [parties.put({"w": w}), others.put({"w": -w})]
        for _ in range(2):
            runs = [f.run(resident, V) for f, resident in zip(functions, residents, strict=True)]
            np.testing.assert_allclose(runs[0].output, V @ w, atol=2e-3)
            np.testing.assert_allclose(runs[1].output, -V @ w, atol=2e-3)
            sent.update(run.cost.bytes_sent for run in runs)
        residents[0].delete()
        del residents
    assert len(sent) == 2  # cold and warm


def test_what_was_opened_is_forgotten(group):
    parties = group("SEMI2K")
    f = secure.jit(times, parties=parties)
    resident = parties.put({"w": W[0]})
    cold, warm = (f.run(resident, V).cost.bytes_sent for _ in range(2))
    for member in parties.members:
        member._forget(resident.names[0])
    assert [f.run(resident, V).cost.bytes_sent for _ in range(2)] == [cold, warm]


# A process of its own: in one that has run other tests, what the allocator keeps of theirs moves by more than this.
RESIDENT_MEGABYTES = """
import os
from pathlib import Path
import numpy as np
from flaxmpc import secure

parties = secure.InProcess("SEMI2K")
f = secure.jit(lambda w, v: v @ w["w"], parties=parties)
for _ in range(4):
    for _ in range(4):
        resident = parties.put({"w": np.eye(1024, dtype=np.float32)})
        f(resident, np.ones((1, 1024), np.float32))
        resident.delete()
    print(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_what_was_opened_takes_no_memory_after_its_value():
    done = subprocess.run([sys.executable, "-c", RESIDENT_MEGABYTES], capture_output=True, text=True, check=True)
    first, *_, last = map(float, done.stdout.split())
    assert last < first + 100  # kept, the twelve later ones would take 190 MB


def test_deleting_never_waits_for_a_run():
    parties = secure.InProcess("SEMI2K")
    resident = parties.put(W[0])
    with party.recorded_log():
        resident.delete()
        assert held(parties) == [1, 1]
    parties.put(W[1]).delete()
    assert held(parties) == [0, 0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has a working directory for a thread")
def test_nothing_is_left_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parties = secure.InProcess("SEMI2K")
    resident = parties.put({"w": W[0]})
    secure.jit(times, parties=parties)(resident, V)
    assert Path.cwd() == tmp_path
    assert not list(tmp_path.iterdir())
