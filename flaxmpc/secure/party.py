"""Parties: who holds the shares and runs the program, and how an owner of data reaches them."""

from __future__ import annotations

import abc
import collections
import concurrent.futures
import dataclasses
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from flaxmpc.errors import unknown
from flaxmpc.secure._spu import SecureError, leave_working_directory, load_spu, log_lock, recorded_log
from flaxmpc.secure.aside import aside, check_no_interrupted, on_each
from flaxmpc.secure.cost import Profile
from flaxmpc.secure.protocol import Config
from flaxmpc.secure.ring import Integers, integers

T = TypeVar("T")

VISIBILITIES = ("secret", "public")

# Forgets that a value was opened. It takes one of any shape, and sends nothing.
_FORGET = """
func.func @main(%value: tensor<!pphlo.secret<f32>>) -> tensor<!pphlo.secret<f32>> {
  %same = pphlo.custom_call @spu.drop_cached_var(%value) {has_side_effect = true}
      : (tensor<!pphlo.secret<f32>>) -> tensor<!pphlo.secret<f32>>
  return %same : tensor<!pphlo.secret<f32>>
}
"""

# Between two messages a party may compute for long (CHEETAH: 20 s and more for one large product).
_RECV_TIMEOUT_MS = 300_000


class Party:
    """One computing party: a link to the others, an SPU runtime, and the named values that it holds shares of."""

    def __init__(self, link: Any, config: Config):
        """Joins the parties on `link` (an spu.link.Context); blocks until all have."""
        self._runtime = load_spu().Runtime(link, config.runtime_config())
        self._opens_once = config.opens_once
        self.names: set[str] = set()

    def store(self, name: str, share: Any) -> None:
        """Keeps this party's share (an spu Share) of the value `name`."""
        self._runtime.set_var(name, share)
        self.names.add(name)

    def fetch(self, name: str) -> Any:
        """This party's share of the value `name`."""
        return self._runtime.get_var(name)

    def meta(self, name: str) -> bytes:
        """What SPU says of the value `name`, as in its share."""
        return self._runtime.get_var_meta(name).SerializeToString()

    def delete(self, names: Iterable[str]) -> None:
        """Frees the values `names`; those that are not held are passed over."""
        for name in self.names.intersection(names):
            if self._opens_once:
                self._forget(name)
            self._runtime.del_var(name)
            self.names.remove(name)

    def _forget(self, name: str) -> None:
        """Else SPU keeps the value, and what it opened of it, for good: by its address it knows what was opened."""
        output = f"{name}.forgotten"
        self._runtime.run(load_spu().Executable("forget", [name], [output], _FORGET))
        self._runtime.del_var(output)

    def run(self, executable: Any) -> None:
        """Runs an spu.Executable on values held under its input names and keeps its outputs under theirs.

        Between processes what it sent may not have arrived yet when it returns.
        """
        self._runtime.run(executable)
        self.names.update(executable.output_names)


class Parties(abc.ABC):
    """A group of computing parties, as the owner of data sees it: in this process or elsewhere.

    Shares are made and opened here, at the owner; each party is given its own share only.
    """

    def __init__(self, config: Config):
        self.config = config
        self._session = ""
        self._deleted: collections.deque[str] = collections.deque()
        self._io = load_spu().Io(config.world_size, config.runtime_config())

    @property
    def session(self) -> str:
        """Changes when the parties start anew, without the values they held."""
        return self._session

    @abc.abstractmethod
    def store(self, name: str, shares: Sequence[Any]) -> None:
        """Gives party i the i-th of `shares` of the value `name`."""

    @abc.abstractmethod
    def fetch(self, name: str) -> list[Any]:
        """Every party's share of the value `name`."""

    def delete(self, names: Sequence[str]) -> None:
        """Notes values that all parties are to free, before the next use of the group at the latest.

        It takes no lock and starts no thread: it may run in a garbage collection, in the middle of anything.
        """
        self._deleted.extend(names)

    def _take_deleted(self) -> list[str]:
        """The names of the values that were deleted since it was last called."""
        return [self._deleted.popleft() for _ in range(len(self._deleted))]

    def sweep(self) -> None:  # noqa: B027 - groups that leave it to their next use have nothing to do
        """Frees at once what was deleted, where the group can without waiting."""

    @abc.abstractmethod
    def run(self, executable: Any) -> tuple[float, Profile]:
        """All parties run `executable` (an spu.Executable); returns the seconds it took and what was counted.

        Raises:
            SecureError: the program failed. If the parties are out of step after it, they start a new session.
        """

    def put(self, tree: Any, visibility: str = "secret") -> Resident:
        """Shares a pytree of arrays once; the result takes its place as an argument of secure functions.

        Where the protocol opens an operand once (SEMI2K), the first run is cold, and later ones send less.

        Args:
            tree: a pytree of arrays or scalars.
            visibility: "secret", or "public" for values that every party may know (cheaper to compute with).

        Raises:
            ValueError, TypeError: a leaf that has no fixed-point encoding; the message has its path.
        """
        check_visibility(visibility)
        spu = load_spu()
        arrays, treedef = jax.tree.flatten(to_arrays(tree, self.config))
        session = self.session
        stem = secrets.token_hex(8)
        names = [f"{stem}.{i}" for i in range(len(arrays))]
        structs = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
        # Made first, so that an interruption half-way frees what was stored.
        resident = Resident(self, session, names, jax.tree.unflatten(treedef, structs), visibility)
        for name, array in zip(names, arrays, strict=True):
            self.store(name, self._io.make_shares(np.asarray(array), spu.parse_visibility(f"VIS_{visibility.upper()}")))
        return resident

    def open(self, name: str) -> np.ndarray:
        """The plain value `name`, from every party's share of it."""
        return self._reconstruct(self.fetch(name))

    def _reconstruct(self, shares: Sequence[Any]) -> np.ndarray:
        """SecureError: the spu Shares do not belong together."""
        try:
            return self._io.reconstruct(shares)
        except Exception as error:
            raise SecureError.wrap("opening a result", error) from error


@dataclasses.dataclass(eq=False)
class Planned:
    """A pytree of values that parties will hold shares of: programs can be compiled for it.

    Attributes:
        struct: a jax.ShapeDtypeStruct for each leaf.
        visibility: "secret" or "public".
    """

    struct: Any
    visibility: str = "secret"


class Resident(Planned):
    """A pytree of values that the parties hold shares of; made by `Parties.put`.

    Pass it in place of an argument of a secure function on the same parties. The parties free the values on
    `delete()`; or, when the last reference to this object is gone, before their next use.

    Attributes:
        parties: who holds it.
        names: the names of its values at the parties, in the order of its leaves.
        struct, visibility: the same as of Planned.
    """

    def __init__(self, parties: Parties, session: str, names: list[str], struct: Any, visibility: str):
        super().__init__(struct, visibility)
        self.parties = parties
        self.names = names
        self._session = session
        self._free = weakref.finalize(self, parties.delete, names)
        self._free.atexit = False

    def delete(self) -> None:
        """Frees the values at the parties; this object can't be used any more."""
        self._free()
        self.parties.sweep()

    def check(self, parties: Parties) -> None:
        """ValueError unless `parties` still hold the values."""
        if self.parties is not parties:
            raise ValueError("these values reside with other parties: share them with `f.parties.put(...)`")
        if not self._free.alive:
            raise ValueError("these resident values were deleted")
        if self._session != parties.session:
            raise ValueError("the parties started anew after an error, without these values: put them again")


class InProcess(Parties):
    """All parties as threads of this process: the real protocol and its real cost, but one owner of all shares."""

    def __init__(
        self,
        protocol: str = "ABY3",
        *,
        ring: str = "FM64",
        fraction_bits: int = 18,
        exp_mode: str = "auto",
        network: str = "wan",
    ):
        """Starts the parties. Arguments and errors: see Config."""
        super().__init__(Config(protocol, ring, fraction_bits, exp_mode, network))
        self._lock = threading.Lock()
        self._use(self._start)

    def _start(self) -> None:
        link = load_spu().link
        desc = link.Desc()
        desc.id = session = secrets.token_hex(16)  # SPU joins in-memory links by it
        desc.recv_timeout_ms = _RECV_TIMEOUT_MS
        for rank in range(self.config.world_size):
            desc.add_party(f"party{rank}", f"party{rank}")
        ranks = range(self.config.world_size)
        joined = self._on_each(lambda rank: Party(link.create_mem(desc, rank), self.config), ranks)
        self.members = [future.result() for future in joined]
        self._session = session

    def _on_each(self, action, items) -> list[concurrent.futures.Future]:
        """`action` on every item at the same time, each in a thread; returns when all are done."""

        def act(item):
            if self.config.opens_once:
                leave_working_directory()
            return action(item)

        return on_each(act, items, "flaxmpc-party")

    def _use(self, action: Callable[[], T]) -> T:
        """What `action` returns, when it is its turn; what was deleted is freed before it and after."""

        def swept() -> T:
            self._sweep()
            result = action()
            self._sweep()
            return result

        check_no_interrupted()
        return aside(self._lock, swept)

    def _sweep(self, *, wait: bool = True) -> None:
        # Freeing may write to SPU's log, which may be that of another group's run, or of this thread's.
        if not self._deleted or not log_lock.acquire(blocking=wait):
            return
        try:
            names = self._take_deleted()
            for done in self._on_each(lambda party: party.delete(names), self.members):
                done.result()
        finally:
            log_lock.release()

    def put(self, tree: Any, visibility: str = "secret") -> Resident:
        check_no_interrupted()  # before shares are made, which takes long
        return super().put(tree, visibility)

    def store(self, name: str, shares: Sequence[Any]) -> None:
        self._use(lambda: [party.store(name, share) for party, share in zip(self.members, shares, strict=True)])

    def fetch(self, name: str) -> list[Any]:
        return self._use(lambda: [party.fetch(name) for party in self.members])

    def sweep(self) -> None:
        def sweep_if_free() -> None:
            if self._lock.acquire(blocking=False):
                try:
                    self._sweep(wait=False)
                finally:
                    self._lock.release()

        aside(threading.Lock(), sweep_if_free)

    def run(self, executable: Any) -> tuple[float, Profile]:
        return self._use(lambda: self._run(executable))

    def _run(self, executable: Any) -> tuple[float, Profile]:
        with recorded_log() as log:
            start = time.perf_counter()
            done = self._on_each(lambda party: party.run(executable), self.members)
            seconds = time.perf_counter() - start
            errors = [error for future in done if (error := future.exception())]
            if not errors:
                return seconds, Profile.parse(log.text(), self.config.world_size)
            causes = [error for error in errors if "timeout" not in str(error)]
            if len(causes) < self.config.world_size:
                # Not all failed at the same place: the others waited for a message and are out of step now.
                self._start()
            cause = (causes or errors)[0]
            raise SecureError.wrap("the secure run", cause) from cause


def check_visibility(visibility: Any) -> None:
    """ValueError unless `visibility` is "secret" or "public"."""
    if visibility not in VISIBILITIES:
        raise unknown("visibility", visibility, VISIBILITIES)


def to_arrays(tree: Any, config: Config, name: str = "value") -> Any:
    """The pytree `tree` with numpy leaves of JAX's dtypes (float64 becomes float32 unless x64 is on), or `Integers`.

    Raises:
        ValueError: a leaf is not finite, beyond the range of the encoding, or an integer beyond its dtype: SPU would
            compute with something else without a word.
        TypeError: a leaf that is not an array of bool, integers or float32/float64.
        The message has the leaf's path, beginning with `name`.
    """

    def convert(path, leaf):
        where = name + jax.tree_util.keystr(path)
        if isinstance(leaf, Resident):
            raise TypeError(f"{where} is resident: resident values take the place of a whole argument")
        if isinstance(leaf, Integers):
            return integers(leaf)
        array = np.asarray(leaf)
        kind = array.dtype.kind
        if not (kind in "biu" or (kind == "f" and array.dtype.itemsize in (4, 8))):
            raise TypeError(f"{where} has dtype {array.dtype}: SPU computes on float32, integers and bool")
        if kind == "f":
            bad = ~(np.abs(array) < config.limit)
            if bad.any():
                value = array[bad][0]
                reason = (
                    f"is beyond ±{config.limit:g}, the range of {config.ring} with {config.fraction_bits} fraction bits"
                    if np.isfinite(value)
                    else "is not finite"
                )
                raise ValueError(f"{where} holds {value}, which {reason}")
        converted = np.ascontiguousarray(array, jax.dtypes.canonicalize_dtype(array.dtype)).reshape(array.shape)
        if kind in "iu" and (converted != array).any():
            raise ValueError(f"{where} holds {array[converted != array][0]}, which is beyond {converted.dtype}")
        return converted

    return jax.tree_util.tree_map_with_path(convert, tree)
