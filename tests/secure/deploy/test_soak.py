"""Minutes of what may go wrong at any moment: parties that are killed, and puts beside many clients."""

import collections
import os
import random
import signal
import threading
import time

import numpy as np
import pytest
from clusters import SHORT, TIMEOUT, W, X, ask, follow, level, publish, values

from flaxmpc import secure

pytestmark = pytest.mark.slow
_KILLS = 20
_SECONDS = 120.0  # of puts


def folders(directory) -> list[str]:
    """Those of workers."""
    return [name for name in os.listdir(directory) if name.startswith("flaxmpc-party-")]


def test_parties_that_are_killed_at_random_are_served_by_again(running, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    (tmp_path / "key").write_text(os.urandom(32).hex())
    (tmp_path / "key").chmod(0o600)
    changes = [
        (f"rank = {rank}\n", f'rank = {rank}\nkeep_shares = "kept{rank}"\nshares_key = "{tmp_path / "key"}"\n')
        for rank in range(3)
    ]
    chance = random.Random(1)
    over = threading.Event()
    counts: collections.Counter[str] = collections.Counter()
    failures: list[BaseException] = []

    def check(client: secure.Cluster, i: int) -> bool:
        """Whether there is an answer; it is right then."""
        try:
            y = ask(client, X + i % 7)
        except secure.SecureError:
            counts["errors"] += 1
            time.sleep(0.1)
            return False
        np.testing.assert_allclose(y, (X + i % 7) * 3 + 1, atol=1e-3)
        counts["answers"] += 1
        return True

    def work(client: secure.Cluster) -> None:
        try:
            i = 0
            while not over.is_set():
                i += 1
                check(client, i)
        except BaseException as error:
            failures.append(error)

    with running(tmp_path / "c", timeout=SHORT, changes=changes) as parties:
        with parties.connect() as owner:
            publish(owner)
        level(parties, dict.fromkeys(range(3), 1), 3 * SHORT)  # the model's
        with parties.connect("client") as mine, parties.connect("client") as one, parties.connect("client") as other:
            threads = [threading.Thread(target=work, args=(client,)) for client in (one, other)]
            for thread in threads:
                thread.start()
            try:
                seconds = []
                for _ in range(_KILLS):
                    time.sleep(chance.uniform(0, 1))
                    rank = chance.randrange(3)
                    begin = time.monotonic()
                    if chance.random() < 0.5:
                        parties.kill(rank)
                        parties.start(rank)
                    else:
                        os.kill(parties.worker_of(rank), signal.SIGKILL)
                    i = 0
                    while not check(mine, i):
                        assert time.monotonic() - begin < 60, counts
                        assert not failures
                        i += 1
                    seconds.append(time.monotonic() - begin)
            finally:
                over.set()
                for thread in threads:
                    thread.join()
            print(f"{_KILLS} kills: {dict(counts)}, served again after {max(seconds):.1f} s at most")
            assert not failures
            assert counts["answers"] > _KILLS
        level(parties, dict.fromkeys(range(3), 1), 3 * SHORT)
        assert values(parties) == dict.fromkeys(range(3), 1)
        assert [sorted(os.listdir(parties.directory / f"kept{rank}")) for rank in range(3)] == [["affine.shares"]] * 3
        assert len(folders(temporary)) == 3
    assert folders(temporary) == []


def test_puts_in_a_loop_beside_eight_clients(parties, owner):
    publish(owner)
    before = values(parties)
    lost = [parties.metrics(rank)["flaxmpc_sessions_lost_total"] for rank in range(3)]
    end = time.monotonic() + _SECONDS
    begun, done = 0, 0  # puts
    answers: list[int] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with parties.connect("client") as client:
                while time.monotonic() < end:
                    first = done
                    y = follow(client)
                    put = round(float(y[1, 3] - 1) / 21)
                    np.testing.assert_allclose(y, X * 3 * put + 1, atol=0.1)
                    assert first <= put <= begun  # one that was served meanwhile
                    answers.append(put)
        except BaseException as error:
            failures.append(error)

    with parties.connect() as other:
        begun = 1
        publish(other, w=W)
        done = 1
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        while time.monotonic() < end and not failures:
            begun += 1
            publish(other, w=W * begun)
            done += 1
        for thread in threads:
            thread.join()
    print(f"{done} puts, {len(answers)} answers of {len(set(answers))} of them")
    assert not failures
    assert len(set(answers)) > 2
    assert [parties.metrics(rank)["flaxmpc_sessions_lost_total"] for rank in range(3)] == lost
    publish(owner)
    level(parties, before, 3 * TIMEOUT)
