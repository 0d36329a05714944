"""The process of a party that holds SPU. SPU may end it when another party is lost, so a supervisor holds the rest.

It has one friend, its supervisor, at the other end of a pipe; commands are answered one after another.
"""

import json
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from flaxmpc.secure._spu import SecureError, load_spu, recorded_log
from flaxmpc.secure.cost import Profile
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy import shares
from flaxmpc.secure.deploy.process import hide_memory
from flaxmpc.secure.deploy.signature import Signature, differing
from flaxmpc.secure.party import Party

_RETRY_MS = 500


class Disagreement(SecureError):
    """The parties would not run the same thing; nothing was run, and they are still in step."""


class OutOfStep(SecureError):
    """The parties may be at different places now, and would take one message for another."""


def make_link(join: m.Join) -> Any:
    """SPU's brpc link to the other parties; blocks until all are there."""
    link = load_spu().link
    desc = link.Desc()
    desc.id = join.session
    desc.recv_timeout_ms = join.timeout_ms
    # A lost peer must be noticed by a receive that times out (an exception), not by a send whose retries run out
    # (SPU ends the process).
    desc.retry_opts.max_retry = 3 * join.timeout_ms // _RETRY_MS
    desc.retry_opts.retry_interval_ms = desc.retry_opts.max_retry_interval_ms = _RETRY_MS
    desc.retry_opts.retry_interval_incr_ms = 0
    desc.http_timeout_ms = join.timeout_ms
    desc.connect_retry_times = max(2, join.timeout_ms // 1000)
    desc.connect_retry_interval_ms = 1000
    for rank, address in enumerate(join.addresses):
        desc.add_party(f"party{rank}", address)
    return link.create_brpc(desc, join.rank)


def agree(link: Any, facts: m.Facts | str) -> None:
    """Compares facts with all other parties; in place of them a party says why it can't go on.

    Raises:
        Disagreement: what differs, or what is said, by whom; the same at all parties.
        OutOfStep: another party did not answer.
    """
    try:
        everyone = [json.loads(text) for text in link.all_gather(json.dumps(facts, sort_keys=True))]
    except Exception as error:
        raise OutOfStep(str(SecureError.wrap("comparing what to run", error))) from error
    for rank, theirs in enumerate(everyone):
        if isinstance(theirs, str):
            raise Disagreement(f"party {rank} {theirs}")
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise Disagreement(f"party {rank} differs from party 0: {m.difference(everyone[0], theirs)}")


class Worker:
    """Answers commands; `join` comes first."""

    def __init__(self, join: m.Join):
        self._link = make_link(join)
        agree(self._link, join.facts)
        self._config = join.config
        self._party = Party(self._link, join.config)

    def answer(self, command: m.Command) -> m.Answer:
        match command:
            case m.Put(name, share):
                self._store(name, share, None)
            case m.Fetch(name):
                return m.Answer(shares=(m.Share.pack(self._party.fetch(name)),))
            case m.Delete(names):
                self._party.delete(names)
            case m.Execute():
                return self._execute(command)
            case _:
                raise ValueError(f"unexpected command {type(command).__name__}")
        return m.Answer()

    def _execute(self, command: m.Execute) -> m.Answer:
        given = list(zip(command.inputs[len(command.inputs) - len(command.given) :], command.given, strict=True))
        temporary = [*(name for name, _ in given), *(command.outputs if command.answer else ())]
        try:
            facts: m.Facts | str = "was not sent this request"
            if command.facts is not None:
                try:
                    facts = command.facts | {"inputs": self._take(command, given)}
                except ValueError as error:
                    facts = f"can't run this: {error}"
                except Exception as error:
                    facts = str(SecureError.wrap("can't run this: storing the inputs", error))
            agree(self._link, facts)
            executable = load_spu().Executable(
                name="run", input_names=list(command.inputs), output_names=list(command.outputs), code=command.code
            )
            with recorded_log() as log:
                start = time.perf_counter()
                self._run(executable)
                seconds = time.perf_counter() - start
                profile = Profile.parse(log.text(), 1)
            results = tuple(m.Share.pack(self._party.fetch(name)) for name in command.outputs if command.answer)
        finally:
            self._party.delete(temporary)
        sent, rounds = profile.totals[0]
        return m.Answer(shares=results, seconds=seconds, bytes_sent=sent, rounds=rounds, ops=profile.ops)

    def _take(self, command: m.Execute, given: Sequence[tuple[str, m.Share]]) -> str:
        """Stores what is given; a digest of what the program runs on.

        Raises:
            ValueError: something is not as the program takes it, or is not there.
        """
        for (name, share), array in zip(given, command.takes, strict=True):
            self._store(name, share, array)
        if missing := [name for name in command.inputs if name not in self._party.names]:
            raise ValueError(f"it holds no value {missing[0]!r}")
        metas = [self._party.meta(name) for name in command.inputs]
        signature = Signature.of(command.code)
        if len(command.outputs) != len(signature.outputs):
            raise ValueError(f"the program has {len(signature.outputs)} outputs, not {len(command.outputs)}")
        reason = differing("input", [shares.described(meta) for meta in metas], signature.inputs)
        if command.answer:
            reason = reason or differing("output", command.gives, signature.outputs, visibility=False)
        if reason:
            raise ValueError(f"the program has another signature: {reason}")
        return m.digest(*metas)

    def _store(self, name: str, share: m.Share, array: m.Array | None) -> None:
        """ValueError: a share that SPU would not make, see `shares.check`."""
        try:
            shares.check(share, array, self._config)
        except ValueError as error:
            raise ValueError(f"value {name.partition('.')[2]!r}: {error}") from error
        self._party.store(name, share.unpack())

    def _run(self, executable: Any) -> None:
        """Runs a program. What fails at all parties alike fails at the same place; they compare what was said."""
        try:
            self._party.run(executable)
        except Exception as error:
            if "timeout" in str(error).lower():
                raise OutOfStep(str(SecureError.wrap("the secure run", error))) from error
            raise
        try:
            self._link.barrier()  # sends are asynchronous: after it, what was sent has arrived
        except Exception as error:
            raise OutOfStep(str(SecureError.wrap("the secure run", error))) from error


def main() -> None:
    """Serves the supervisor at a pipe until it closes. Arguments: its file descriptor, a directory to work in."""
    hide_memory()
    pipe, directory = Connection(int(sys.argv[1])), sys.argv[2]
    os.chdir(directory)  # SEMI2K leaves files in the working directory
    commands: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        # In a thread of its own: a supervisor that is gone ends this process in the middle of a run too.
        try:
            while True:
                commands.put(pipe.recv_bytes())
        except (EOFError, OSError):
            shutil.rmtree(directory, ignore_errors=True)
            os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    decoder = msgspec.msgpack.Decoder(m.Command)
    worker: Worker | None = None
    while True:
        command = decoder.decode(commands.get())
        try:
            if isinstance(command, m.Join):
                worker = Worker(command)
                answer = m.Answer()
            else:
                assert worker is not None, "the first command joins the parties"
                answer = worker.answer(command)
        except (SecureError, ValueError) as error:
            answer = m.Answer(error=str(error), in_step=not isinstance(error, OutOfStep))
        except Exception as error:
            answer = m.Answer(error=str(SecureError.wrap("the secure run", error)))
        pipe.send_bytes(m.encode(answer))


if __name__ == "__main__":
    main()
