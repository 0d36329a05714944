"""The values that a party holds for owners in a session, and the models made of them.

A value is kept while anything needs it: its owner's lease, a model, a request that waits or runs. A sweep deletes the
others, so nothing has to be undone where a put, a run or an owner ends half-way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from grpc import StatusCode
from msgspec.structs import replace

from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.errors import Refused
from flaxmpc.secure.deploy.kept import KeptShares
from flaxmpc.secure.deploy.turns import Turns


@dataclasses.dataclass(eq=False)
class HeldModel:
    """One put of a model at this party; `weights` are the names of its values at the worker."""

    name: str
    public: m.PublicModel
    bundle: bytes
    weights: list[str]
    programs: dict[str, m.ModelProgram]

    @classmethod
    def of(cls, header: m.Publish, bundle: bytes) -> HeldModel:
        programs = {name: replace(program, code=b"", joint={}) for name, program in header.programs.items()}
        public = m.PublicModel(header.hash, m.digest(bundle), len(bundle), programs)
        return cls(header.name, public, bundle, [f"o.{name}" for name in header.weights], dict(header.programs))


@dataclasses.dataclass
class Lease:
    """An owner's hold on values, and on puts that are not served yet, by hash.

    It lasts while a call of the owner's is there, and until `ends`, by time.monotonic().
    """

    ends: float = 0.0
    calls: int = 0
    values: set[str] = dataclasses.field(default_factory=set)
    staged: dict[str, HeldModel] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class Held:
    """What one session holds. A put is staged for its owner's lease, promised to party 0, served, and gone.

    Attributes:
        rank: the number of this party.
        call: gives the worker a command.
        turns: the requests.
        kept: this party's disk; None: it keeps nothing.
        lease_seconds: how long a lease lasts after its owner's last call.
        models: those that are served, by name.
        wake: set when a sweep has something to do.
        closed: whether the session is lost.
    """

    rank: int
    call: Callable[[m.Command], m.Answer]
    turns: Turns
    kept: KeptShares | None
    lease_seconds: float

    def __post_init__(self):
        self.models: dict[str, HeldModel] = {}
        self.wake = threading.Event()
        self.closed = False
        self._lock = threading.Lock()
        self._stored: set[str] = set()
        self._doomed: set[str] = set()  # the worker has them until it was told to delete them
        self._leases: dict[str, Lease] = {}
        self._promised: HeldModel | None = None

    def __len__(self) -> int:
        """The number of values at the worker."""
        return len(self._stored) + len(self._doomed)

    def close(self) -> None:
        """Nothing is staged or served any more: the session is lost."""
        with self._lock:
            self.closed = True
        self.wake.set()

    # Values.

    @contextlib.contextmanager
    def attached(self, id_: str) -> Iterator[None]:
        """A lease lasts as long as the block, and its time after."""
        with self._lock:
            lease = self._renewed(id_)
            lease.calls += 1
        try:
            yield
        finally:
            with self._lock:
                lease.calls -= 1
                lease.ends = time.monotonic() + self.lease_seconds

    def end(self, lease: str) -> None:
        """Ends a lease that its owner gives back."""
        with self._lock:
            self._end(lease)
            self._release()

    def store(self, lease: str, name: str, share: m.Share) -> None:
        """Gives the worker this party's share of a value. Refused: there is one of that name."""
        self.expect(lease, [name])
        self.call(m.Put(name, share))
        self.add([name])

    def expect(self, lease: str, names: Iterable[str]) -> None:
        """Notes values of a lease that the worker is about to have (then `add`). Refused: a name is taken."""
        with self._lock:
            for name in set(names) & (self._stored | self._doomed):
                raise self._refused(StatusCode.ALREADY_EXISTS, f"has a value {name!r} already")
            self._renewed(lease).values.update(names)

    def add(self, names: Iterable[str]) -> None:
        """Notes that the worker has these values now."""
        with self._lock:
            self._stored.update(names)

    def require(self, names: Iterable[str]) -> None:
        """Refused: some of the values are not held, or nothing needs them any more."""
        with self._lock:
            self._require(names)

    def forget(self, names: Iterable[str]) -> None:
        """Ends the owner's hold on values, by name, and on staged puts, by hash."""
        with self._lock:
            for lease in self._leases.values():
                lease.values.difference_update(names)
                for hash_ in lease.staged.keys() & set(names):
                    self._discard(lease.staged.pop(hash_))
            self._release()

    def sweep(self) -> None:
        """Deletes what nothing needs; waits for the worker. Refused: the worker can't."""
        with self._lock:
            now = time.monotonic()
            for id_ in [id_ for id_, lease in self._leases.items() if not lease.calls and lease.ends < now]:
                self._end(id_)
            self._mark()
            doomed = sorted(self._doomed)
        if doomed:
            self.call(m.Delete(doomed))
            with self._lock:
                self._doomed.difference_update(doomed)

    # Models.

    def stage(self, header: m.Publish, bundle: bytes) -> None:
        """Holds a put for its owner's lease, on disk too.

        Raises:
            Refused: weights that are not stored, or a hash that is not new.
            OSError: the disk can't hold it.
        """
        model = HeldModel.of(header, bundle)
        self.require(model.weights)
        with self._lock:
            held = [*self.models.values(), *self._staged()]
            if any(header.hash == other.public.hash for other in held):
                raise self._refused(StatusCode.ALREADY_EXISTS, f"has put {header.hash[:16]!r} already")
        try:
            if self.kept is not None:
                shares = (m.Put(name, self.call(m.Fetch(f"o.{name}")).shares[0]) for name in header.weights)
                self.kept.stage(header, bundle, shares)
            with self._lock:
                self._check_open()
                self._require(model.weights)  # the lease may have ended meanwhile
                self._renewed(header.lease).staged[header.hash] = model
        except BaseException:
            self._discard(model)
            raise

    def promise(self, hash_: str | None) -> None:
        """Keeps a put, without its lease, for party 0, which is about to switch to it; ends the promise before.

        None only ends that. Refused: there is no such put.
        """
        with self._lock:
            self._check_open()
            if self._promised is not None:
                self._discard(self._promised)
                self._promised = None
            if hash_ is not None:
                lease = next((lease for lease in self._leases.values() if hash_ in lease.staged), None)
                if lease is None:
                    reason = f"holds no put {hash_[:16]!r}: its owner was away"
                    raise self._refused(StatusCode.FAILED_PRECONDITION, reason)
                self._promised = lease.staged.pop(hash_)
            self._release()

    def switch(self, hash_: str | None) -> HeldModel:
        """The promised put takes the place of the one of its name, on disk and then in memory; returns it.

        Raises:
            Refused: another one was promised, or none.
            OSError: the disk can't.
        """
        with self._lock:
            self._check_open()
            model = self._promised
            if model is None or model.public.hash != hash_:
                raise self._refused(StatusCode.FAILED_PRECONDITION, "did not promise this put")
            if self.kept is not None:
                self.kept.commit(model.name, model.public.hash)
            self.models[model.name] = model
            self._promised = None
            self._release()
        return model

    def load(self, name: str, hash_: str, check: Callable[[m.Publish], None]) -> None:
        """Serves a put from disk, before anything else is asked.

        Raises:
            OSError, ValueError, Refused: it is not there, not whole, or `check` or the worker refuses it.
        """
        assert self.kept is not None
        if self.kept.models.get(name) != hash_:
            self.kept.commit(name, hash_)
        header, bundle, weights = self.kept.read(name)
        if header.hash != hash_:
            raise ValueError(f"holds put {header.hash[:16]}")
        check(header)
        model = HeldModel.of(header, bundle)
        for weight in weights:
            self.call(m.Put(f"o.{weight.name}", weight.share))
            self.add([f"o.{weight.name}"])
        self.require(model.weights)
        self.models[name] = model

    # Those who call what follows have the lock.

    def _require(self, names: Iterable[str]) -> None:
        if missing := set(names) - self._stored:
            reason = f"holds {len(missing)} of the values no more: ask again, or put them again"
            raise self._refused(StatusCode.FAILED_PRECONDITION, reason)

    def _renewed(self, id_: str) -> Lease:
        lease = self._leases.setdefault(id_, Lease())
        lease.ends = time.monotonic() + self.lease_seconds
        return lease

    def _end(self, id_: str) -> None:
        if (lease := self._leases.pop(id_, None)) is not None:
            for model in lease.staged.values():
                self._discard(model)

    def _staged(self) -> list[HeldModel]:
        promised = [self._promised] if self._promised is not None else []
        return [*promised, *(model for lease in self._leases.values() for model in lease.staged.values())]

    def _release(self) -> None:
        """Finds what is needed no more, and has it swept."""
        self._mark()
        if self._doomed:
            self.wake.set()

    def _mark(self) -> None:
        """Moves values that nothing needs to those that are swept: they can't be used from now on."""
        needed = self.turns.inputs()
        needed.update(*(lease.values for lease in self._leases.values()))
        needed.update(*(model.weights for model in (*self.models.values(), *self._staged())))
        self._doomed |= self._stored - needed
        self._stored &= needed

    def _discard(self, model: HeldModel) -> None:
        if self.kept is not None:
            self.kept.discard(model.name, model.public.hash)

    def _check_open(self) -> None:
        if self.closed:
            raise self._refused(StatusCode.ABORTED, "started anew meanwhile")

    def _refused(self, code: StatusCode, reason: str) -> Refused:
        return Refused(code, f"party {self.rank} {reason}")
