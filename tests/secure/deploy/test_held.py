"""What a party holds, and how a put gets its place: three parties without processes, ended at every point of a put."""

import contextlib
import errno
import functools
import os
import random
import threading
import types
from collections.abc import Container
from pathlib import Path
from typing import Any

import grpc
import pytest

from flaxmpc.secure.deploy import held as held_module
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.errors import Refused
from flaxmpc.secure.deploy.held import Held
from flaxmpc.secure.deploy.kept import KeptShares
from flaxmpc.secure.deploy.leader import Leader
from flaxmpc.secure.deploy.turns import Request, Turns

KEY = bytes(range(1, 33))
LEASE = 30.0


class Worker(dict):
    """The values that a party's worker would have."""

    def __call__(self, command: m.Command) -> m.Answer:
        match command:
            case m.Put(name, share):
                self[name] = share
            case m.Fetch(name):
                return m.Answer(shares=(self[name],))
            case m.Delete(names):
                for name in names:
                    del self[name]
        return m.Answer()


def share(name: str, rank: int = 0) -> m.Share:
    return m.Share(b"meta", [f"{name} of party {rank}".encode()])


def publish(hash_: str, weights: list[str], lease: str = "lease", name: str = "film") -> m.Publish:
    return m.Publish("session", lease, name, hash_, weights, {})


@pytest.fixture
def clock(monkeypatch):
    """Seconds, as what is held sees them."""
    now = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(held_module, "time", types.SimpleNamespace(monotonic=lambda: now.now))
    return now


# --------------------------------------------------------------------------------------------------- one party's values


@pytest.fixture
def worker():
    return Worker()


@pytest.fixture
def turns():
    return Turns(8, 8)


@pytest.fixture
def held(worker, turns, clock):
    return Held(1, worker, turns, None, LEASE)


def store(held: Held, *names: str, lease: str = "lease") -> None:
    for name in names:
        held.store(lease, f"o.{name}", share(name))


def serve(held: Held, hash_: str, *weights: str) -> None:
    held.stage(publish(hash_, list(weights)), b"")
    held.promise(hash_)
    held.switch(hash_)


def test_values_last_as_long_as_their_owner_is_there_and_a_lease_longer(held, worker, clock):
    store(held, "a", "b")
    store(held, "c", lease="another")
    with held.attached("lease"):
        with held.attached("lease"):
            clock.now = 3 * LEASE
        held.sweep()
        assert set(worker) == {"o.a", "o.b"}
        assert len(held) == 2
        clock.now = 5 * LEASE
    held.sweep()
    assert len(held) == 2
    clock.now = 6 * LEASE
    store(held, "d")  # it is there again
    clock.now = 7 * LEASE
    held.sweep()
    assert len(held) == 3
    clock.now = 7 * LEASE + 1
    held.sweep()
    assert (len(worker), len(held)) == (0, 0)


def test_a_lease_that_was_given_back_is_another_one_later(held, worker, clock):
    with held.attached("lease"):
        store(held, "a")
        held.end("lease")
        store(held, "b")
    clock.now = LEASE + 1
    held.sweep()
    assert not worker


def test_a_lease_that_is_given_back_ends_at_once(held, worker):
    store(held, "a")
    store(held, "b", lease="another")
    held.end("lease")
    with pytest.raises(Refused, match="party 1 holds 1 of the values no more: ask again, or put them again"):
        held.require(["o.a", "o.b"])
    assert held.wake.is_set()
    assert len(held) == 2  # until the worker is told
    held.sweep()
    assert (set(worker), len(held)) == ({"o.b"}, 1)


def test_a_value_that_comes_after_its_lease_is_swept(held, worker, clock):
    held.expect("lease", ["o.output"])
    clock.now = LEASE + 1
    held.sweep()
    worker["o.output"] = share("output")
    held.add(["o.output"])
    held.sweep()
    assert not worker


def test_a_name_is_given_once(held):
    store(held, "a")
    with pytest.raises(Refused, match=r"has a value 'o\.a' already"):
        store(held, "a", lease="another")
    held.forget(["o.a"])
    with pytest.raises(Refused, match=r"has a value 'o\.a' already"):  # the worker is about to delete it
        store(held, "a")
    held.sweep()
    store(held, "a")


def test_a_model_keeps_its_weights_and_a_request_those_that_it_began_with(held, worker, turns):
    store(held, "a", "both")
    serve(held, "first", "a", "both")
    held.end("lease")
    request = Request(m.Key("client", "r"), "film/1x16", "first", {1: b""}, held.models["film"].weights, [], [])
    turns.add(request)
    store(held, "b")
    serve(held, "second", "b", "both")
    held.end("lease")
    held.sweep()
    assert set(worker) == {"o.a", "o.b", "o.both"}
    running = turns.named([request.key], [])
    held.sweep()
    assert set(worker) == {"o.a", "o.b", "o.both"}
    turns.end(running, m.Answer())
    held.sweep()
    assert set(worker) == {"o.b", "o.both"}


@pytest.mark.parametrize("how", ["lease", "owner"])
def test_a_staged_put_ends_with_its_lease_or_its_owners_word(held, worker, clock, how):
    store(held, "a")
    held.stage(publish("first", ["a"]), b"")
    if how == "owner":
        held.forget(["first"])
    else:
        clock.now = LEASE + 1
        held.sweep()
    with pytest.raises(Refused, match="party 1 holds no put 'first'"):
        held.promise("first")
    held.end("lease")
    held.sweep()
    assert not worker


def test_a_promised_put_outlives_its_owner_until_party_0_says_more(held, worker, clock):
    store(held, "a")
    held.stage(publish("first", ["a"]), b"")
    held.promise("first")
    held.end("lease")
    held.forget(["first", "o.a"])
    clock.now = LEASE + 1
    held.sweep()
    assert set(worker) == {"o.a"}
    with pytest.raises(Refused, match="party 1 did not promise this put"):
        held.switch("second")
    held.promise(None)
    with pytest.raises(Refused, match="did not promise this put"):
        held.switch("first")
    held.sweep()
    assert not worker


def test_what_can_not_be_staged_is_refused(held):
    store(held, "a")
    with pytest.raises(Refused, match="party 1 holds 1 of the values no more"):
        held.stage(publish("first", ["a", "z"]), b"")
    serve(held, "first", "a")
    held.stage(publish("second", ["a"]), b"")
    for hash_ in ("first", "second"):
        with pytest.raises(Refused, match=f"party 1 has put '{hash_}' already"):
            held.stage(publish(hash_, ["a"], name="other"), b"")
    held.promise("second")
    with pytest.raises(Refused, match="party 1 has put 'second' already"):
        held.stage(publish("second", ["a"]), b"")


def test_nothing_is_staged_or_switched_to_once_the_session_is_lost(held):
    store(held, "a")
    held.stage(publish("first", ["a"]), b"")
    held.promise("first")
    held.close()
    for late in (
        lambda: held.stage(publish("second", ["a"]), b""),
        lambda: held.promise(None),
        lambda: held.switch("first"),
    ):
        with pytest.raises(Refused, match="party 1 started anew meanwhile"):
            late()
    assert not held.models


# --------------------------------------------------------------------------- three parties, ended at any point of a put


class Ended(BaseException):
    """A party's process, or the owner's, ends here."""


class Group:
    """Three parties as values; `fault(who)` is called before whatever one of them, or the owner, does."""

    def __init__(self, folder: Path, monkeypatch, *, keep: bool):
        self.fault: Any = lambda who: None
        self.folders = [folder / str(rank) if keep else None for rank in range(3)]
        self.kept: list[KeptShares | None] = [None] * 3
        self.lost = {0, 1, 2}
        self._acting: list[Any] = []
        self._serial = 0
        for name in ("replace", "fsync"):
            monkeypatch.setattr(os, name, functools.partial(self._do, getattr(os, name), name == "fsync"))
        unlink = Path.unlink
        monkeypatch.setattr(Path, "unlink", lambda *given, **named: self._do(unlink, False, *given, **named))
        self.begin()

    def _do(self, what: Any, leave_out: bool, *given: Any, **named: Any) -> None:
        """What a party does to its disk, as long as it lives."""
        if self._acting:
            rank = self._acting[-1]
            if rank in self.lost:
                raise Ended
            try:
                self.fault(rank)
            except Ended:
                self.lost.add(rank)
                raise
        if not leave_out:  # syncing takes long, and shows nothing here
            what(*given, **named)

    def at(self, rank: int, action: Any) -> Any:
        """A party does something; Refused if its process ends, as its peers and the owner see it."""
        if rank in self.lost:
            raise Refused(grpc.StatusCode.UNAVAILABLE, f"party {rank} can't be reached")
        self._acting.append(rank)
        try:
            self._live(rank)
            result = action()
            self._live(rank)
            return result
        except Ended as error:
            self.lost.add(rank)
            raise Refused(grpc.StatusCode.UNAVAILABLE, f"party {rank} ended") from error
        except OSError as error:
            raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, f"party {rank}: {error}") from error
        finally:
            self._acting.pop()

    def _live(self, rank: int) -> None:
        with contextlib.suppress(OSError):  # it is not the disk's turn
            self.fault(rank)

    def begin(self) -> None:
        """Those that were lost start again, and all form a group, as `Leader` and `Host` do."""
        for rank in self.lost:
            folder = self.folders[rank]
            self.kept[rank] = KeptShares(folder, KEY) if folder else None
        self.lost.clear()
        self.workers = [Worker() for _ in range(3)]
        self.held = [
            Held(rank, worker, Turns(8, 8), kept, LEASE)
            for rank, (worker, kept) in enumerate(zip(self.workers, self.kept, strict=True))
        ]
        self.dropped = False
        chosen = dict(self.kept[0].models) if self.kept[0] else {}
        for rank in range(3):
            self.at(rank, functools.partial(self._load, rank, chosen))

    def _load(self, rank: int, chosen: dict[str, str]) -> None:
        kept = self.kept[rank]
        if kept is not None:
            for name, hash_ in chosen.items():
                self.held[rank].load(name, hash_, lambda header: None)
            kept.sweep()

    def put(self, lease: str, name: str) -> str:
        """An owner's put; its hash. Refused: as the owner is told. Ended: the owner has."""
        self._serial += 1
        hash_, weights = f"put{self._serial}", [f"w{self._serial}.{i}" for i in range(2)]
        for rank in range(3):
            for weight in weights:
                self.fault("owner")
                self.at(rank, functools.partial(self.held[rank].store, lease, f"o.{weight}", share(weight, rank)))
        header = publish(hash_, weights, lease, name)
        try:
            for rank in range(3):
                self.fault("owner")
                self.at(rank, functools.partial(self.held[rank].stage, header, b"bundle"))
            self.fault("owner")
            self.at(0, lambda: Leader.commit(self._leader(), self._session(), hash_))
        except Refused:
            for rank in {0, 1, 2} - self.lost:
                self.held[rank].forget([hash_])
            raise
        return hash_

    def _session(self) -> Any:
        return types.SimpleNamespace(id="session", held=self.held[0])

    def _leader(self) -> Any:
        def ask_peers(method: str, message: m.Switch) -> None:
            errors = []
            for rank in (1, 2):
                try:
                    self.at(rank, functools.partial(getattr(self.held[rank], method), message.hash))
                except Refused as error:
                    errors.append(error)
            for error in errors:
                raise error

        return types.SimpleNamespace(
            _committing=threading.Lock(),
            _ask_peers=ask_peers,
            _sessions=types.SimpleNamespace(drop=lambda *_: setattr(self, "dropped", True)),
            _log=lambda *_, **__: None,
        )

    def check(self, *allowed: Container[str | None]) -> None:
        """All parties serve one put of `film`, an allowed one, and one of `play`; and hold nothing else."""
        for name, puts in zip(("film", "play"), allowed, strict=False):
            served = [held.models[name].public.hash if name in held.models else None for held in self.held]
            assert served[0] in puts
            assert served == [served[0]] * 3
        for rank, (held, worker, folder) in enumerate(zip(self.held, self.workers, self.folders, strict=True)):
            weights = {weight for model in held.models.values() for weight in model.weights}
            assert set(worker) == weights
            assert len(held) == len(weights)
            assert all(worker[name] == share(name.removeprefix("o."), rank) for name in weights)
            if folder:
                assert {path.name for path in folder.iterdir()} == {f"{name}.shares" for name in held.models}


class Faults:
    """Counts what `who` does, and ends it, or its disk, at the `when`-th."""

    def __init__(self, who: int | str, when: int, error: BaseException):
        self.who, self.left, self.error = who, when, error

    def __call__(self, who: int | str) -> None:
        if who == self.who:
            self.left -= 1
            if self.left == 0:
                raise self.error


def restart(group: Group) -> None:
    """Whatever it takes: a party may end again while the group forms."""
    while group.lost or group.dropped:
        try:
            group.begin()
        except Refused:
            group.dropped = True


def settle(group: Group, clock) -> None:
    """Leases run out."""
    clock.now += LEASE + 1
    for held in group.held:
        held.sweep()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("fault", ["process", "disk"])
@pytest.mark.parametrize("who", [0, 1, 2, "owner"])
def test_a_put_that_ends_anywhere_leaves_the_old_model_or_the_new_at_all_parties(
    tmp_path, monkeypatch, clock, keep, fault, who
):
    if fault == "disk" and (who == "owner" or not keep):
        return
    group, step = Group(tmp_path, monkeypatch, keep=keep), 0
    served: str | None = None
    came = True
    while came:
        step += 1
        error = Ended() if fault == "process" else OSError(errno.ENOSPC, "No space left on device")
        group.fault = faults = Faults(who, step, error)
        before, new, told = served, f"put{group._serial + 1}", False
        try:
            group.put("lease", "film")
            told = True
        except (Refused, Ended):
            pass
        came = faults.left <= 0
        group.fault = lambda who: None
        lost = bool(group.lost) or group.dropped
        restart(group)
        settle(group, clock)
        group.check({new} if told else {before} if not lost else {before, new} if keep else {None})
        served = group.held[0].models["film"].public.hash if group.held[0].models else None
    assert step > 5
    assert served is not None


def test_nothing_is_lost_or_left_whatever_happens(tmp_path, monkeypatch, clock):
    """Random puts of two models by two owners, and random ends, of several at once and while the group forms."""
    chance = random.Random(15)
    group = Group(tmp_path, monkeypatch, keep=True)
    served: dict[str, str | None] = {"film": None, "play": None}
    for _ in range(200):
        rate = chance.choice([0.0, 0.01, 0.05])
        may_end = chance.choice([("owner",), (0, 1, 2), (chance.randrange(3),), (0, 1, 2, "owner")])

        def fault(who: int | str, rate=rate, may_end=may_end) -> None:
            if who in may_end and chance.random() < rate:
                full = who != "owner" and chance.random() < 0.3
                raise OSError(errno.ENOSPC, "No space left on device") if full else Ended()

        name = chance.choice(list(served))
        new, told = f"put{group._serial + 1}", False
        group.fault = fault
        try:
            group.put(chance.choice(["ann", "bob"]), name)
            told = True
        except (Refused, Ended):
            pass
        if group.dropped or group.lost:
            try:
                group.begin()  # under the same faults
            except Refused:
                group.dropped = True
        group.fault = lambda who: None
        restart(group)
        if chance.random() < 0.5:
            settle(group, clock)
            group.check(*({old} if of != name else {new} if told else {old, new} for of, old in served.items()))
        for of in served:
            hashes = {held.models[of].public.hash if of in held.models else None for held in group.held}
            (served[of],) = hashes
            assert not told or of != name or served[of] == new
