"""A computing host: the supervisor speaks with owner, clients and other parties, and keeps SPU in a child."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import http.server
import importlib.metadata
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import msgspec

from flaxmpc.secure import messages as m
from flaxmpc.secure import rpc
from flaxmpc.secure.cluster import ClusterFile, PartyEntry, split
from flaxmpc.secure.protocol import get_protocol
from flaxmpc.secure.tunnel import Tunnel

_POLL = 1.0  # seconds between looks at the peers while nothing is asked


def log(event: str, **fields: Any) -> None:
    """One line of JSON on standard error. Never a share, an input or a result."""
    record = {"time": round(time.time(), 3), "event": event, **fields}
    sys.stderr.write(json.dumps(record, default=str) + "\n")  # in one: threads log at once
    sys.stderr.flush()


class WorkerLost(Exception):
    """The worker's process has ended, or was ended because it did not answer in time."""


class WorkerProcess:
    """A child process that holds SPU; commands take turns."""

    def __init__(self, directory: str):
        ours, theirs = socket.socketpair()
        package_root = Path(__file__).parents[2]
        paths = [str(package_root), *filter(None, [os.environ.get("PYTHONPATH")])]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "flaxmpc.secure.worker", str(theirs.fileno()), directory],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C is the supervisor's to handle
            )
        self._pipe = Connection(ours.detach())
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def call(self, command: m.Command, timeout: float | None = None) -> m.Answer:
        """Its answer. WorkerLost: it ended meanwhile, or took longer than `timeout` seconds and was ended."""
        with self._lock:
            # A frozen process takes no bytes either, so the bound is not on the answer alone.
            bound = threading.Timer(timeout, self.kill) if timeout is not None else None
            if bound is not None:
                bound.start()
            try:
                self._pipe.send_bytes(m.encode(command))
                return msgspec.msgpack.decode(self._pipe.recv_bytes(), type=m.Answer)
            except (EOFError, OSError) as error:
                self.kill()
                raise WorkerLost(f"the worker's process ended (exit code {self._process.returncode})") from error
            finally:
                if bound is not None:
                    bound.cancel()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@dataclasses.dataclass
class Item:
    """A request that waits for its turn: how it ends, once it has, is in `answer`."""

    id: str
    command: m.Execute
    what: str
    answer: concurrent.futures.Future[m.Answer] = dataclasses.field(default_factory=concurrent.futures.Future)
    abandoned: bool = False
    running: bool = False

    def end(self, answer: m.Answer) -> None:
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self.answer.set_result(answer)


@dataclasses.dataclass
class Model:
    """A model that this party holds shares of."""

    public: m.Model
    bundle: bytes
    weights: list[str]
    programs: dict[str, m.Program]


@dataclasses.dataclass
class Session:
    """What lasts until a party is lost: a worker that joined the others, and the shares in it."""

    id: str
    worker: WorkerProcess
    stored: set[str] = dataclasses.field(default_factory=set)
    models: dict[str, Model] = dataclasses.field(default_factory=dict)


class Refused(Exception):
    """A request that is not served; the caller gets the code and the message."""

    def __init__(self, code: grpc.StatusCode, message: str):
        super().__init__(message)
        self.code = code


def versions() -> m.Facts:
    """Of what must be the same everywhere: SPU's programs and messages are locked to its version."""
    return {package: importlib.metadata.version(package) for package in ("spu",)} | {"schema": "1"}


class Host:
    """One party of a cluster. `serve` runs it until SIGTERM."""

    def __init__(self, cluster: ClusterFile, rank: int, *, allow_insecure_dealer: bool = False):
        """Reads what cluster.toml names.

        Raises:
            ValueError: no such rank, a file that is missing or wrong, or SEMI2K without leave.
        """
        if not 0 <= rank < len(cluster.party):
            raise ValueError(f"{cluster.path} has party ranks 0..{len(cluster.party) - 1}, not {rank}")
        if cluster.protocol == "SEMI2K" and not (allow_insecure_dealer or cluster.allow_insecure_dealer):
            meaning = get_protocol("SEMI2K").threat_model
            raise ValueError(f"SEMI2K: {meaning} To run it all the same: --allow-insecure-dealer")
        self.cluster = cluster
        self.rank = rank
        self.entry: PartyEntry = cluster.party[rank]
        self.log = functools.partial(log, rank=rank)
        if cluster.protocol == "SEMI2K":
            self.log("insecure_dealer", meaning=get_protocol("SEMI2K").threat_model)
        self.tunnel = Tunnel(cluster, rank, self.log)
        self.metrics: collections.Counter[str] = collections.Counter()
        self._timeout = cluster.timeout_seconds
        self._facts = {
            "protocol": cluster.protocol,
            "ring": cluster.ring,
            "fraction_bits": str(cluster.fraction_bits),
            "parties": str(len(cluster.party)),
            **versions(),
        }
        self._peers = {
            entry.rank: rpc.Peer(cluster, self.entry, entry) for entry in cluster.party if entry.rank != rank
        }
        self._directory = tempfile.TemporaryDirectory(prefix="flaxmpc-party-")
        self._changed = threading.Condition()
        self._forming = threading.Lock()
        self._joining: WorkerProcess | None = None
        self._given_up = ""
        self._session: Session | None = None
        self._state = "starting"
        self._items: dict[str, Item] = {}
        self._queue: collections.deque[Item] = collections.deque()
        self._stopping = False

    # What callers may ask, by role.

    def status(self, message: m.Empty) -> m.Status:
        session = self._live()
        models = {name: model.public for name, model in session.models.items()} if session else {}
        state = "ready" if session else self._state
        return m.Status(self.rank, session.id if session else "", state, self._facts, models)

    def store(self, header: m.Stored, pieces: Iterator[m.Piece]) -> m.Empty:
        session = self._in(header.session)
        size, name, meta, chunks = 0, None, None, []

        def flush() -> None:
            if name is not None and meta is not None:
                self._worker(session, m.Put(f"o.{name}", m.Share(meta, [b"".join(chunk) for chunk in chunks])))
                session.stored.add(f"o.{name}")

        for piece in pieces:
            if piece.name != name:
                flush()
                size, name, meta, chunks = 0, piece.name, None, []
            if piece.meta is not None:
                meta = piece.meta
                chunks.append([])
            elif not chunks:
                raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "a share must begin with its meta")
            size += len(piece.content)
            if size > self.cluster.limits.max_request_bytes:
                raise Refused(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"a value is larger than max_request_bytes {self.cluster.limits.max_request_bytes}",
                )
            chunks[-1].append(piece.content)
        flush()
        return m.Empty()

    def fetch(self, message: m.Names) -> m.Answer:
        session = self._in(message.session)
        shares = []
        for name in message.names:
            shares += self._worker(session, m.Fetch(f"o.{name}")).shares
        return m.Answer(shares=tuple(shares))

    def delete(self, message: m.Names) -> m.Empty:
        session = self._in(message.session)
        kept = {name for model in session.models.values() for name in model.weights}
        names = [name for name in (f"o.{name}" for name in message.names) if name not in kept]
        self._worker(session, m.Delete(names))
        session.stored.difference_update(names)
        return m.Empty()

    def publish(self, header: m.Publish, pieces: Iterator[m.Piece]) -> m.Empty:
        session, limits, allowed = self._in(header.session), self.cluster.limits, self.cluster.models
        if allowed is not None and header.name not in allowed:
            raise Refused(
                grpc.StatusCode.PERMISSION_DENIED,
                f"model {header.name!r} may not be put here: {self.cluster.path.name} allows {', '.join(allowed)}",
            )
        for name, program in header.programs.items():
            if program.batch > limits.max_batch or program.length > limits.max_length:
                raise Refused(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"program {name} is for {program.batch} x {program.length} tokens, "
                    f"the limit is {limits.max_batch} x {limits.max_length}",
                )
        weights = [f"o.{name}" for name in header.weights]
        if missing := set(weights) - session.stored:
            raise Refused(grpc.StatusCode.FAILED_PRECONDITION, f"{len(missing)} of the weights were not stored")
        bundle = b"".join(piece.content for piece in pieces)
        programs = {
            name: m.Signature(program.inputs, program.outputs, program.batch, program.length)
            for name, program in header.programs.items()
        }
        public = m.Model(header.hash, m.digest(bundle), len(bundle), programs)
        old = session.models.get(header.name)
        session.models[header.name] = Model(public, bundle, weights, dict(header.programs))
        if old is not None and (gone := [name for name in old.weights if name not in weights]):
            self._worker(session, m.Delete(gone))
            session.stored.difference_update(gone)
        self.log("model", name=header.name, hash=header.hash[:16], programs=sorted(programs))
        return m.Empty()

    def bundle(self, message: m.Names) -> Iterator[m.Piece]:
        session = self._in(message.session)
        for name in message.names:
            yield from rpc.pieces(name, self._model(session, name).bundle)

    def run(self, message: m.Run, context: grpc.ServicerContext) -> m.Answer:
        session = self._in(message.session)
        facts = self._request_facts(session, message.id, m.digest(message.code), "")
        inputs, outputs = ([f"o.{name}" for name in names] for names in (message.inputs, message.outputs))
        answer = self._await(session, Item(message.id, m.Execute(facts, message.code, inputs, outputs), "run"), context)
        if answer.error is None:
            session.stored.update(outputs)
        return answer

    def infer(self, message: m.Infer, context: grpc.ServicerContext) -> m.Answer:
        session = self._in(message.session)
        model = self._model(session, message.model)
        if message.hash != model.public.hash:
            raise Refused(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"model {message.model!r} was put anew (hash {model.public.hash[:16]}): ask again",
            )
        program = model.programs.get(message.program)
        if program is None:
            raise Refused(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"model {message.model!r} has no program {message.program!r}: "
                f"more sentences or tokens than it was put for? It has {', '.join(model.programs)}",
            )
        if len(message.inputs) != len(program.inputs):
            raise Refused(
                grpc.StatusCode.INVALID_ARGUMENT, f"{len(message.inputs)} inputs, {len(program.inputs)} are needed"
            )
        facts = self._request_facts(session, message.id, m.digest(program.code), model.public.hash)
        inputs = [*model.weights, *(f"r.{message.id}.{i}" for i in range(len(program.inputs)))]
        outputs = [f"r.{message.id}.o{i}" for i in range(len(program.outputs))]
        command = m.Execute(facts, program.code, inputs, outputs, message.inputs, answer=True)
        return self._await(session, Item(message.id, command, f"{message.model}/{message.program}"), context)

    def form(self, message: m.Form) -> m.Empty:
        """Party 0 starts a session: this party's worker, and its shares, begin anew."""
        if difference := m.difference(message.facts, self._facts):
            reason = f"party {self.rank} differs from party 0: {difference}"
            raise Refused(grpc.StatusCode.FAILED_PRECONDITION, reason)
        if self._stopping:
            raise Refused(grpc.StatusCode.UNAVAILABLE, "it is stopping")
        self._start_session(message.session)
        return m.Empty()

    def step(self, message: m.Step) -> m.Answer:
        """Party 0 says whose turn it is."""
        session = self._in(message.session)
        # Below the time-out of a receive: the others are waiting in the comparison of facts.
        end = time.monotonic() + self._timeout / 2
        with self._changed:
            while (item := self._items.get(message.id)) is None and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
        return self._execute(session, item)

    # How requests get their turn.

    def _request_facts(self, session: Session, request: str, program: str, model: str) -> m.Facts:
        return {**self._facts, "session": session.id, "request": request, "program": program, "model": model}

    def _await(self, session: Session, item: Item, context: grpc.ServicerContext) -> m.Answer:
        """Queues a request and waits for its end, or for its caller to go away."""
        with self._changed:
            if self._stopping:
                raise Refused(grpc.StatusCode.UNAVAILABLE, f"party {self.rank} is stopping")
            if len(self._items) >= self.cluster.limits.queue:
                raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{len(self._items)} requests wait: try again later")
            if item.id in self._items:
                raise Refused(grpc.StatusCode.ALREADY_EXISTS, f"request {item.id} is known already")
            if session is not self._session:
                raise Refused(grpc.StatusCode.ABORTED, rpc.STARTED_ANEW)
            self._items[item.id] = item
            if self.rank == 0:
                self._queue.append(item)
            self._changed.notify_all()

        def gone() -> None:
            item.abandoned = True
            item.end(m.Answer(error="the caller went away"))

        if not context.add_callback(gone):
            gone()
        try:
            answer = item.answer.result()
        finally:
            with self._changed:
                self._items.pop(item.id, None)
                self._changed.notify_all()
        self.metrics["requests_total"] += 1
        self.metrics["failures_total"] += answer.error is not None
        return answer

    def _execute(self, session: Session, item: Item | None) -> m.Answer:
        """Runs a request at this party, in step with the others; without it says so to them."""
        start = time.perf_counter()
        if item is not None:
            item.running = True
        try:
            answer = session.worker.call(item.command if item else m.Execute(None))
        except WorkerLost as error:
            self._drop(session, f"party {self.rank} lost its worker: {error}")
            answer = m.Answer(error=f"party {self.rank}: {error}", in_step=False)
        seconds = time.perf_counter() - start
        if item is not None:
            self.metrics["run_seconds_total"] += seconds  # pyright: ignore[reportArgumentType]
            self.metrics["bytes_sent_total"] += answer.bytes_sent
            self.metrics["rounds_total"] += answer.rounds
            self.log("run", what=item.what, seconds=round(seconds, 3), error=answer.error, bytes_sent=answer.bytes_sent)
            # Party 0 ends its own when it has heard from all.
            if self.rank != 0:
                item.end(answer)
        return msgspec.structs.replace(answer, shares=()) if self.rank != 0 else answer

    def lead(self) -> None:
        """Party 0's thread: forms the group, and gives every request its turn at all parties."""
        while not self._stopping:
            try:
                self._lead_once()
            except Exception as error:  # whatever it is, the others must not wait for ever
                self.log("error", reason=f"{type(error).__name__}: {error}")
                if self._session is not None:
                    self._drop(self._session, f"party 0 failed: {type(error).__name__}")
                time.sleep(_POLL)

    def _lead_once(self) -> None:
        session = self._live()
        if session is None:
            self._form_group()
            if self._live() is None:
                time.sleep(_POLL)
            return
        with self._changed:
            if not self._queue:
                self._changed.wait(_POLL)
            item = self._queue.popleft() if self._queue else None
        if item is None:
            self._look_at_peers(session)
        elif not item.abandoned:
            try:
                self._take_turn(session, item)
            finally:
                item.end(m.Answer(error=f"party 0 failed; {rpc.STARTED_ANEW}", in_step=False))

    def _take_turn(self, session: Session, item: Item) -> None:
        def heard(rank: int, future: Any) -> None:
            # A peer that can't go on leaves the others waiting in SPU: end that at once.
            if future.cancelled():
                return
            if (error := future.exception()) is not None:
                lost.setdefault(rank, rpc.describe(self.cluster.party[rank], error))
            elif not (answer := rpc.decode(future.result(), m.Answer)).in_step:
                lost.setdefault(rank, answer.error or "")
            else:
                return
            self._drop(session, lost[rank])

        lost: dict[int, str] = {}
        asked = {rank: peer.ask_later("step", m.Step(session.id, item.id)) for rank, peer in self._peers.items()}
        for rank, future in asked.items():
            future.add_done_callback(functools.partial(heard, rank))
        answer = self._execute(session, item)
        if not answer.in_step:  # the others would wait for this party until their time-out
            for future in asked.values():
                future.cancel()
            reason = next(iter(lost.values()), answer.error or "")
            self._drop(session, reason)
            item.end(m.Answer(error=f"{reason}; {rpc.STARTED_ANEW}", in_step=False))
            return
        peers: dict[int, m.Answer] = {}
        end = time.monotonic() + self._timeout
        for rank, future in asked.items():
            try:
                reply = future.result(timeout=max(0.1, end - time.monotonic()))
                peers[rank] = rpc.decode(reply, m.Answer)
            except (grpc.RpcError, grpc.FutureTimeoutError, grpc.FutureCancelledError) as error:
                future.cancel()
                reason = rpc.describe(self.cluster.party[rank], error)
                peers[rank] = m.Answer(error=lost.get(rank, reason), in_step=False)
        errors = [each.error for each in (*peers.values(), answer) if each.error]
        if lost or not all(each.in_step for each in peers.values()):
            reason = next(iter([*lost.values(), *errors]), "")
            self._drop(session, reason)
            item.end(m.Answer(error=f"{reason}; {rpc.STARTED_ANEW}", in_step=False))
        elif errors and len(errors) <= len(peers):
            # It failed at some parties and not at others: they hold different values now.
            self._drop(session, errors[0])
            item.end(m.Answer(error=f"{errors[0]}; {rpc.STARTED_ANEW}", in_step=False))
        else:
            item.end(answer)

    # How the group comes and goes.

    def _live(self) -> Session | None:
        """The session, if its worker lives."""
        session = self._session
        if session is not None and not session.worker.alive:
            self._drop(session, f"party {self.rank} lost its worker")
            session = None
        return session

    def _in(self, wanted: str) -> Session:
        session = self._live()
        if session is None:
            raise Refused(grpc.StatusCode.UNAVAILABLE, f"party {self.rank} is not ready: {self._state}")
        if session.id != wanted:
            raise Refused(grpc.StatusCode.ABORTED, rpc.STARTED_ANEW)
        return session

    def _model(self, session: Session, name: str) -> Model:
        if name not in session.models:
            known = ", ".join(session.models) or "none"
            raise Refused(
                grpc.StatusCode.NOT_FOUND,
                f"party {self.rank} holds no shares of model {name!r} (it has {known}): was a party restarted? "
                "The owner puts it again",
            )
        return session.models[name]

    def _worker(self, session: Session, command: m.Command) -> m.Answer:
        try:
            answer = session.worker.call(command, self._timeout)
        except WorkerLost as error:
            self._drop(session, f"party {self.rank} lost its worker")
            raise Refused(grpc.StatusCode.ABORTED, f"{error}; {rpc.STARTED_ANEW}") from error
        if answer.error is not None:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, answer.error)
        return answer

    def _drop(self, session: Session, reason: str) -> None:
        """Ends a session: its worker, its shares and what waits for it."""
        with self._changed:
            if self._session is not session:
                return
            self._session = None
            self._state = f"the group starts anew: {reason}"
            items = [item for item in self._items.values() if self.rank != 0 or item in self._queue]
            self._queue.clear()
        session.worker.kill()
        self.log("session_lost", session=session.id[:8], reason=reason)
        self.metrics["sessions_lost_total"] += 1
        for item in items:
            item.end(m.Answer(error=f"{reason}; {rpc.STARTED_ANEW}", in_step=False))

    def _start_session(self, session_id: str) -> None:
        """A new worker joins the others' in a session; Refused if it can't."""
        self._abort_join()
        with self._forming:
            if self._session is not None:
                self._drop(self._session, "party 0 started a session")
            with socket.create_server(("127.0.0.1", 0)) as free:
                own = f"127.0.0.1:{free.getsockname()[1]}"
            addresses = tuple(self.tunnel.entrances.get(rank, own) for rank in range(len(self.cluster.party)))
            self.tunnel.link = own
            worker = self._joining = WorkerProcess(self._directory.name)
            if session_id == self._given_up:
                worker.kill()
            config = self.cluster.config
            join = m.Join(
                addresses, self.rank, session_id, config.protocol, config.ring, config.fraction_bits,
                int(self._timeout * 1000), self._facts,
            )  # fmt: skip
            error = None
            try:
                error = worker.call(join, self._timeout + 10).error  # 10 s: loading SPU
            except WorkerLost as lost:
                error = str(lost)
            self._joining = None
            if error is not None:
                worker.kill()
                self._state = error
                self.log("join_failed", reason=error)
                raise Refused(grpc.StatusCode.UNAVAILABLE, f"party {self.rank} could not join the others: {error}")
            with self._changed:
                self._session = Session(session_id, worker)
                self._state = "ready"
            self.metrics["sessions_total"] += 1
            self.log("session", session=session_id[:8], worker=worker.pid)

    def _form_group(self) -> None:
        """Starts a session at all parties; on failure the state says what is waited for."""
        for rank, peer in self._peers.items():
            try:
                status = peer.ask("status", m.Empty(), m.Status, timeout=self._timeout)
            except grpc.RpcError as error:
                self._wait_for(rpc.describe(self.cluster.party[rank], error))
                return
            if difference := m.difference(self._facts, status.facts):
                self._wait_for(f"party {rank} differs from party 0: {difference}")
                return
        session_id = secrets.token_hex(16)
        message = m.Form(session_id, self._facts)
        asked = {rank: peer.ask_later("form", message) for rank, peer in self._peers.items()}
        own = concurrent.futures.ThreadPoolExecutor(1)
        joined = own.submit(self._start_session, session_id)
        failures = []
        for rank, future in asked.items():
            try:
                future.result(timeout=self._timeout + 15)
            except (grpc.RpcError, grpc.FutureTimeoutError) as error:
                failures.append(rpc.describe(self.cluster.party[rank], error))
                break
        if failures:
            self._given_up = session_id
            self._abort_join()
        try:
            joined.result()
        except Refused as error:
            failures.append(str(error))
        own.shutdown()
        if failures:
            if self._session is not None:
                self._drop(self._session, failures[0])
            self._wait_for(failures[0])

    def _abort_join(self) -> None:
        if (worker := self._joining) is not None:
            worker.kill()

    def _wait_for(self, reason: str) -> None:
        state = f"waiting: {reason}"
        if state != self._state:
            self.log("waiting", reason=reason)
        self._state = state

    def _look_at_peers(self, session: Session) -> None:
        for rank, peer in self._peers.items():
            try:
                theirs = peer.ask("status", m.Empty(), m.Status, timeout=self._timeout)
            except grpc.RpcError as error:
                self._drop(session, rpc.describe(self.cluster.party[rank], error))
                return
            if theirs.session != session.id:
                self._drop(session, f"party {rank} lost its shares: {theirs.state}")
                return

    # The process.

    def stop(self) -> None:
        """No more requests; the running one is finished first."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def serve(self) -> None:
        """Runs until SIGTERM or SIGINT. OSError: a port is taken."""
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(
            lambda _, what: self.log("connection", reason=str(what.get("exception", what["message"])))
        )
        stopped = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopped.set)
        try:
            await self.tunnel.start()
        except OSError as error:
            raise OSError(f"party {self.rank} can't listen on its link {self.entry.link}: {error.strerror}") from error
        server = rpc.serve(self)
        monitor = _monitor(self)
        lead = threading.Thread(target=self.lead, name="lead", daemon=True)
        if self.rank == 0:
            lead.start()
        self.log("serving", control=self.entry.control, link=self.entry.link, pid=os.getpid())
        try:
            await stopped.wait()
            self.log("stopping")
            self.stop()
            await loop.run_in_executor(None, self._finish, server, lead)
        finally:
            if monitor is not None:
                monitor.shutdown()
            self.tunnel.close()
            self._directory.cleanup()
        self.log("stopped")

    def _finish(self, server: grpc.Server, lead: threading.Thread) -> None:
        with self._changed:
            for item in self._items.values():
                if not item.running:
                    item.end(m.Answer(error=f"party {self.rank} is stopping"))
            self._queue.clear()
        self._abort_join()
        if lead.is_alive():
            lead.join()
        with self._changed:
            self._changed.wait_for(lambda: not self._items)
        server.stop(grace=1).wait()
        if self._session is not None:
            self._session.worker.kill()


def _monitor(host: Host) -> http.server.ThreadingHTTPServer | None:
    """/health and /metrics on loopback."""
    if host.entry.metrics is None:
        return None

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = host.status(m.Empty())
            if self.path == "/health":
                ready = status.state == "ready"
                self._reply(200 if ready else 503, "application/json", json.dumps({"state": status.state}))
            elif self.path == "/metrics":
                values = {"ready": int(status.state == "ready"), "queue": len(host._items), **host.metrics}
                lines = []
                for name, value in values.items():
                    kind = "counter" if name.endswith("_total") else "gauge"
                    lines += [f"# TYPE flaxmpc_{name} {kind}", f"flaxmpc_{name} {value}"]
                self._reply(200, "text/plain; version=0.0.4", "\n".join(lines) + "\n")
            else:
                self._reply(404, "text/plain", "/health or /metrics\n")

        def _reply(self, code: int, kind: str, text: str) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    try:
        server = http.server.ThreadingHTTPServer(split(host.entry.metrics), Handler)
    except OSError as error:
        raise OSError(
            f"party {host.rank} can't listen on its metrics {host.entry.metrics}: {error.strerror}"
        ) from error
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
