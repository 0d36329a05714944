"""Puts and owners' runs on real parties: beside clients, with owners that are killed, and with a disk that is full."""

import ctypes
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
import types

import msgspec
import numpy as np
import pytest
from clusters import ROOT, SHORT, TIMEOUT, W, X, affine, ask, check_served, follow, level, publish, values

from flaxmpc import secure
from flaxmpc.secure.deploy import client as client_module
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy import streams

PARTY = [sys.executable, "-m", "flaxmpc", "party"]

# An owner that is forked for every line, which says at what moment to stop, and wait to be killed.
OWNER = """
import os, sys, threading, time
import numpy as np
from clusters import W, X, affine
from flaxmpc import secure
from flaxmpc.secure._spu import load_spu
from flaxmpc.secure.deploy import rpc

load_spu()

def stop():
    print(os.getpid(), flush=True)
    time.sleep(1000)

def cut(stream, pieces):
    for number, piece in enumerate(stream):
        if number == pieces:
            stop()
        yield piece
    stop()

def act(where, method, *numbers):
    send_later, ask_later = rpc.Peer.send_later, rpc.Peer.ask_later

    def around(call, peer, asked, *arguments):
        if (where, method) == ("before", asked):
            stop()
        future = call(peer, asked, *arguments)
        if (where, method) == ("after", asked):
            if peer.entry.rank == int(numbers[0]):
                time.sleep(float(numbers[1]))
                stop()
        return future

    def send(self, asked, message, stream):
        at = where == "in" and (asked, str(self.entry.rank)) == (method, numbers[0])
        return around(send_later, self, asked, message, cut(stream, int(numbers[1])) if at else stream)

    def ask(self, asked, message, timeout=None):
        return around(ask_later, self, asked, message, timeout)

    rpc.Peer.send_later, rpc.Peer.ask_later = send, ask
    owner = secure.Cluster(sys.argv[1], "owner")
    large = owner.put(np.ones((256, 1024), np.float32))
    weights = owner.put(2 * W)
    kept = secure.jit(lambda w: w * w, parties=owner)(weights)
    owner.publish("affine", weights, {"2x4": owner.program(affine, weights, X, length=4)}, bytes(3 << 20))
    stop()

for line in sys.stdin:
    if os.fork() == 0:
        try:
            act(*line.split())
        finally:
            print("ended", flush=True)
            os._exit(1)
"""

MOMENTS = [
    "in store 0 0",  # of the first value
    "in store 1 2",  # a part of it came to party 1
    "in store 2 9",  # all of it
    "before run",
    "after run 2 0.0",
    "in publish 0 0",  # the bundle
    "in publish 1 1",
    "in publish 2 9",  # staged at 0 and 1
    "before commit",  # staged at all
    "after commit 0 0.0",
    "after commit 0 0.5",  # served, but its owner still holds the values
]


@pytest.fixture
def settled(parties, owner):
    """The session's cluster, and nobody but tests changes how many values its parties hold."""
    publish(owner)
    with parties.connect() as other:  # what tests before dropped goes now
        other.put(1.0)
    time.sleep(1.5)
    return parties


def test_puts_in_a_loop_beside_clients_cost_nobody_an_answer(settled, owner):
    before, lost = values(settled), settled.metrics(0)["flaxmpc_sessions_lost_total"]
    end = time.monotonic() + 5
    answers: list[np.ndarray] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            with settled.connect("client") as client:
                while time.monotonic() < end:
                    answers.append(follow(client))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    puts = 0
    with settled.connect() as other:
        while time.monotonic() < end or puts < 4:
            publish(other, w=W * (1 + puts % 2))
            puts += 1
    for thread in threads:
        thread.join()
    assert not errors
    old, new = X * 3 + 1, X * 6 + 1
    kinds = [[np.allclose(answer, of, atol=1e-2) for of in (old, new)] for answer in answers]
    assert all(any(kind) for kind in kinds)
    assert [any(column) for column in zip(*kinds, strict=True)] == [True, True]
    assert settled.metrics(0)["flaxmpc_sessions_lost_total"] == lost
    publish(owner)
    level(settled, before, 3 * TIMEOUT)


def test_an_owner_that_is_killed_leaves_nothing(settled, owner, client):
    before = values(settled)
    session = client.session
    command = [sys.executable, "-c", OWNER, str(settled.cluster.path)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    ) as forking:
        assert forking.stdin is not None
        assert forking.stdout is not None
        for moment in MOMENTS:
            print(moment, file=forking.stdin, flush=True)
            os.kill(int(forking.stdout.readline()), signal.SIGKILL)
            y = follow(client)
            new = np.allclose(y, X * 6 + 1, atol=1e-2)
            assert new or np.allclose(y, X * 3 + 1, atol=1e-2), moment
            assert new == (moment == MOMENTS[-1]) or moment == "after commit 0 0.0"
            if new:
                publish(owner)
        forking.stdin.close()
    level(settled, before, 3 * TIMEOUT)
    assert client.session == session


FROZEN = """
import sys, time
import numpy as np
from flaxmpc import secure
owner = secure.Cluster(sys.argv[1], "owner")
value = owner.put(np.ones(3, np.float32))
print("holds", flush=True)
time.sleep(1000)
"""


@pytest.mark.slow
def test_an_owner_that_is_frozen_is_noticed(settled):
    before = values(settled)
    command = [sys.executable, "-c", FROZEN, str(settled.cluster.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        process.send_signal(signal.SIGSTOP)
        assert values(settled) == {rank: count + 1 for rank, count in before.items()}
        level(settled, before, 4 * TIMEOUT)
        process.kill()


@pytest.mark.slow
def test_an_owner_that_computes_for_long_keeps_what_it_holds(mortal):
    with mortal.connect() as owner:
        resident = owner.put(W)
        time.sleep(0.5)
        ctypes.PyDLL(None).sleep(5 * int(SHORT))  # as a compiler does that keeps all other threads waiting
        np.testing.assert_allclose(secure.jit(affine, parties=owner)(resident, X), X * 3 + 1, atol=1e-3)


def test_the_hash_of_a_put_is_one_of_all_that_is_put(owner, monkeypatch):
    same = types.SimpleNamespace(token_bytes=bytes, token_hex=secrets.token_hex)
    monkeypatch.setattr(client_module, "secrets", same)  # else the salt alone makes them differ
    program = owner.program(affine, owner.put(W), X, length=4)
    alone = msgspec.structs.replace(program, joint={})
    puts = [
        (W, {"2x4": program}, b""), (2 * W, {"2x4": program}, b""), (W.T + 1, {"2x4": program}, b""),
        (W, {"2x4": alone}, b""), (W, {"other": program}, b""), (W, {"2x4": program}, b"a bundle"),
        (W, {"2x4": program}, b""),
    ]  # fmt: skip
    hashes = [owner.publish("affine", owner.put(w), programs, bundle) for w, programs, bundle in puts]
    assert len(set(hashes)) == 6
    assert hashes[0] == hashes[6]
    monkeypatch.undo()
    publish(owner)
    assert owner.find("affine")[1].hash not in hashes


def test_a_put_that_one_party_does_not_hold_is_refused_by_all(settled, owner, client):
    before = values(settled)
    with settled.connect() as other:
        weights = other.put(2 * W)
        programs = {"2x4": other.program(affine, weights, X, length=4)}
        header = m.Publish(other.session, other._lease, "affine", "two", weights.names, programs)
        for rank in (0, 2):
            sent, contents = streams.of_model(header, b"")
            other._peers[rank].send_later("publish", sent, streams.of_contents(contents)).result()
        for rank, refused in ((0, "party 1 holds no put 'two': its owner was away"), (1, "party 1 commits no put")):
            with pytest.raises(Exception, match=refused):
                other._peers[rank].ask("commit", m.Switch(other.session, "two"), m.Empty)
        np.testing.assert_allclose(ask(client), X * 3 + 1, atol=1e-3)
    level(settled, before, TIMEOUT)


# -------------------------------------------------------------------------------------------- parties that keep shares


@pytest.fixture(scope="module")
def keeping(running, tmp_path_factory):
    directory = tmp_path_factory.mktemp("keeping")
    (directory / "key").write_text(os.urandom(32).hex())
    (directory / "key").chmod(0o600)
    changes = [
        (f"rank = {rank}\n", f'rank = {rank}\nkeep_shares = "kept{rank}"\nshares_key = "{directory / "key"}"\n')
        for rank in range(3)
    ]
    with running(
        directory / "c", timeout=SHORT, changes=[*changes, ("run_seconds = 600", "run_seconds = 6")]
    ) as parties:
        yield parties


def files(parties) -> list[list[str]]:
    """In the parties' folders."""
    return [sorted(os.listdir(parties.directory / f"kept{rank}")) for rank in range(3)]


def test_kept_shares_survive_a_kill_without_the_owner(keeping):
    w = np.linspace(-3, 3, 16, dtype=np.float32).reshape(4, 4)
    with keeping.connect() as owner:
        shares = []
        make = owner._io.make_shares
        owner._io = types.SimpleNamespace(make_shares=lambda *given: shares.append(make(*given)) or shares[-1])
        publish(owner, w=w)
    for rank in range(3):
        (kept,) = (keeping.directory / f"kept{rank}").iterdir()
        assert all(chunk not in kept.read_bytes() for each in shares for chunk in each[rank].share_chunks)
    keeping.kill(1)
    keeping.start(1)
    with keeping.connect("client") as client:
        assert keeping.events(1, "kept_shares")
        np.testing.assert_allclose(ask(client), X @ w + 1, atol=1e-3)
    # Shares of another put at one party are not mixed with these.
    old = (keeping.directory / "kept1" / "affine.shares").read_bytes()
    with keeping.connect() as owner:
        publish(owner)
    keeping.kill(1)
    (keeping.directory / "kept1" / "affine.shares").write_bytes(old)
    keeping.start(1)
    with (
        keeping.connect("client") as client,
        pytest.raises(secure.SecureError, match="do not hold model 'affine' alike: party 1 differs"),
    ):
        ask(client)
    check_served(keeping)
    # A file that is damaged is named before anything else happens.
    keeping.kill(1)
    new = (keeping.directory / "kept1" / "affine.shares").read_bytes()
    (keeping.directory / "kept1" / "affine.shares").write_bytes(old[:-1])
    command = [*PARTY, "--cluster", str(keeping.cluster.path), "--rank", "1"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "affine.shares is damaged, or was written with another key" in ended.stderr
    (keeping.directory / "kept1" / "affine.shares").write_bytes(new)
    keeping.restore()


def test_a_put_that_one_disk_has_no_room_for_leaves_the_old_model_also_after_a_restart(keeping):
    check_served(keeping)
    full = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({1 << 19}, {1 << 19}))"
    keeping.restart(2, code=full)
    with keeping.connect() as owner:
        weights = owner.put(2 * W)
        programs = {"2x4": owner.program(affine, weights, X, length=4)}
        before = values(keeping)
        for _ in range(2):
            with pytest.raises(secure.SecureError, match=r"party 2 could not keep its shares: .*File too large"):
                owner.publish("affine", weights, programs, bytes(1 << 20))
            assert files(keeping) == [["affine.shares"]] * 3
        assert values(keeping) == before
        with keeping.connect("client") as client:
            np.testing.assert_allclose(ask(client), X * 3 + 1, atol=1e-3)
        keeping.restart(0, 2)
        with keeping.connect("client") as client:
            np.testing.assert_allclose(ask(client), X * 3 + 1, atol=1e-3)
    with keeping.connect() as owner:  # now there is room
        weights = owner.put(2 * W)
        owner.publish("affine", weights, programs, bytes(1 << 20))
    with keeping.connect("client") as client:
        np.testing.assert_allclose(ask(client), X * 6 + 1, atol=1e-3)
    assert files(keeping) == [["affine.shares"]] * 3


ENDLESS = """
import sys, jax, numpy as np
from flaxmpc import secure
owner = secure.Cluster(sys.argv[1], "owner")
f = secure.jit(lambda x: jax.lax.fori_loop(0, 10**7, lambda i, x: x * x * 0.5, x), parties=owner)
print("runs", flush=True)
try:
    f(np.ones(4, np.float32))
except secure.SecureError as error:
    print(error)
"""


@pytest.mark.parametrize("owner", ["waits", "is killed"])
def test_an_endless_run_ends_and_what_is_kept_is_served_again(keeping, owner):
    check_served(keeping)
    seconds = 6 if owner == "waits" else SHORT
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(keeping.cluster.path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "runs\n"
        keeping.wait_for_requests(1)
        lost = keeping.metrics(0)["flaxmpc_sessions_lost_total"]
        start = time.monotonic()
        if owner == "is killed":
            process.kill()
        while keeping.metrics(0)["flaxmpc_sessions_lost_total"] == lost:
            assert time.monotonic() - start < 2 * seconds
            time.sleep(0.05)
        assert time.monotonic() - start > seconds / 2
        said = process.stdout.read()
    reason = "the run took longer than run_seconds 6" if owner == "waits" else "an owner went away during its run"
    lost_for = [keeping.events(rank, "session_lost")[-1]["reason"] for rank in range(3)]
    assert any(re.search(reason, each) for each in lost_for)
    assert owner == "is killed" or reason in said
    with keeping.connect("client") as client:
        np.testing.assert_allclose(ask(client), X * 3 + 1, atol=1e-3)
