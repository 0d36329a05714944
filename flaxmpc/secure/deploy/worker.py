"""The process of a party that holds SPU. SPU may end it when another party is lost, so a supervisor holds the rest.

It has one friend, its supervisor, at the other end of a pipe; commands are answered one after another.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from flaxmpc.secure._spu import SecureError, load_spu, recorded_log
from flaxmpc.secure.cost import Profile
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.process import hide_memory
from flaxmpc.secure.party import Party
from flaxmpc.secure.protocol import Config

_RETRY_MS = 500


class Disagreement(SecureError):
    """The parties would not run the same thing; nothing was run, and they are still in step."""


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


def agree(link: Any, facts: m.Facts | None) -> None:
    """Compares facts with all other parties; Disagreement says what differs, at whom."""
    everyone = [json.loads(text) for text in link.all_gather(json.dumps(facts, sort_keys=True))]
    absent = [rank for rank, theirs in enumerate(everyone) if theirs is None]
    if absent:
        raise Disagreement(f"party {absent[0]} was not sent this request")
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise Disagreement(f"party {rank} differs from party 0: {m.difference(everyone[0], theirs)}")


class Worker:
    """Answers commands; `join` comes first."""

    def __init__(self, join: m.Join):
        self._link = make_link(join)
        agree(self._link, join.facts)
        self._party = Party(self._link, Config(join.protocol, join.ring, join.fraction_bits, exp_mode=join.exp_mode))

    def answer(self, command: m.Command) -> m.Answer:
        match command:
            case m.Put(name, share):
                self._party.store(name, share.unpack())
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
        facts, unreadable = command.facts, None
        temporary = list(command.inputs[len(command.inputs) - len(command.given) :])
        if command.answer:
            temporary += command.outputs
        try:
            try:
                for name, share in zip(temporary, command.given, strict=False):
                    self._party.store(name, share.unpack())
            except Exception as error:
                unreadable = error
            if facts is not None:
                # A client that sends one party something else must not cost the others the session.
                shapes = m.digest(*(share.meta for share in command.given))
                facts = facts | {"shares": "unreadable" if unreadable else shapes}
            agree(self._link, facts)
            if unreadable:
                raise unreadable
            executable = load_spu().Executable(
                name="run", input_names=list(command.inputs), output_names=list(command.outputs), code=command.code
            )
            with recorded_log() as log:
                start = time.perf_counter()
                self._party.run(executable)
                self._link.barrier()  # sends are asynchronous: after it, what was sent has arrived
                seconds = time.perf_counter() - start
                profile = Profile.parse(log.text(), 1)
            shares = tuple(m.Share.pack(self._party.fetch(name)) for name in command.outputs if command.answer)
        finally:
            self._party.delete(temporary)
        sent, rounds = profile.totals[0]
        ops = {name: m.OpProfile(*values) for name, values in profile.ops.items()}
        return m.Answer(shares=shares, seconds=seconds, bytes_sent=sent, rounds=rounds, ops=ops)


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
        except Disagreement as error:
            answer = m.Answer(error=str(error))
        except Exception as error:
            message = str(SecureError.wrap("the secure run", error))
            answer = m.Answer(error=message, in_step="timeout" not in str(error).lower())
        pipe.send_bytes(m.encode(answer))


if __name__ == "__main__":
    main()
