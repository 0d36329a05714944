"""The workers of three parties, without their hosts: nothing that is sent ends them, or parts them."""

import concurrent.futures
import contextlib
import random
import secrets
import socket
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import pytest
from clusters import W, X, affine
from hostile import ARRAY, good, hostile, meta

from flaxmpc import secure
from flaxmpc.secure._spu import load_spu
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.child import WorkerProcess
from flaxmpc.secure.deploy.programs import jointly
from flaxmpc.secure.deploy.worker import Disagreement, OutOfStep, agree
from flaxmpc.secure.protocol import Config

FACTS = {"session": "s"}


class Workers:
    """Three of them, joined over loopback; their supervisors are this."""

    def __init__(self):
        with contextlib.ExitStack() as free:
            servers = [free.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
            addresses = tuple(f"127.0.0.1:{server.getsockname()[1]}" for server in servers)
        config = Config()
        self.processes = [WorkerProcess(3) for _ in range(3)]
        session = secrets.token_hex(16)
        joins = [m.Join(addresses, rank, session, config, 60_000, FACTS) for rank in range(3)]
        assert [answer.error for answer in self.each(joins)] == [None] * 3
        self._spu = load_spu()
        self._io = self._spu.Io(3, config.runtime_config())

    def each(self, commands: Sequence[m.Command]) -> list[m.Answer]:
        """Their answers to commands of their own."""
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            return list(pool.map(lambda worker, command: worker.call(command, 90), self.processes, commands))

    def share(self, array: np.ndarray) -> list[m.Share]:
        return [m.Share.pack(share) for share in self._io.make_shares(array, self._spu.Visibility.VIS_SECRET)]

    def put(self, name: str, array: np.ndarray) -> None:
        answers = self.each([m.Put(name, share) for share in self.share(array)])
        assert [answer.error for answer in answers] == [None] * 3

    def open(self, shares: Sequence[m.Share]) -> np.ndarray:
        return self._io.reconstruct([share.unpack() for share in shares])

    def check(self) -> None:
        """All is as it was: they run together, and right."""
        answers = self.each(requests([self.share(X)]))
        assert [answer.error for answer in answers] == [None] * 3
        np.testing.assert_allclose(self.open([answer.shares[0] for answer in answers]), X * 3 + 1, atol=1e-3)

    def refused(self, commands: Sequence[m.Command]) -> str:
        """What all of them answer, having stayed together."""
        answers = self.each(commands)
        assert all(answer.in_step for answer in answers)
        (reason,) = {answer.error for answer in answers}
        assert reason is not None
        return reason


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    started = Workers()
    started.put("o.w", W)
    yield started
    for process in started.processes:
        process.kill()


def code(fn=affine, *args) -> bytes:
    return secure.jit(fn, "ABY3").compile(*(args or (W, X))).code


def requests(given: Sequence[Sequence[m.Share]], **changes) -> list[m.Execute]:
    """A client's, of `affine`, for every party: `given` has every party's share of each input."""
    standard = {
        "facts": FACTS,
        "code": code(),
        "inputs": ["o.w", *(f"r.a.{i}" for i in range(len(given)))],
        "outputs": ["r.a.o0"],
        "takes": [ARRAY] * len(given),
        "answer": True,
        "gives": [ARRAY],
    }
    return [m.Execute(**{**standard, "given": [each[rank] for each in given], **changes}) for rank in range(3)]


def test_a_missing_value_is_named_and_the_parties_go_on(workers):
    workers.put("o.v", W)
    inputs = ["o.v", "r.a.0"]
    assert workers.each(requests([workers.share(X)], inputs=inputs))[0].error is None
    workers.processes[1].call(m.Delete(["o.v"]), 90)
    reason = workers.refused(requests([workers.share(X)], inputs=inputs))
    assert reason == "party 1 can't run this: it holds no value 'o.v'"
    workers.each([m.Delete(["o.v"])] * 3)
    reason = workers.refused(requests([workers.share(X)], inputs=inputs))
    assert reason == "party 0 can't run this: it holds no value 'o.v'"
    workers.check()


def test_a_request_that_one_was_not_sent_is_not_run(workers):
    commands = requests([workers.share(X)])
    commands[2] = m.Execute(None)
    assert workers.refused(commands) == "party 2 was not sent this request"
    workers.check()


def test_another_value_at_one_party_is_noticed(workers):
    workers.put("o.v", W)
    workers.processes[2].call(m.Put("o.v", workers.share(W.astype(np.int32))[2]), 90)
    reason = workers.refused(requests([workers.share(X)], inputs=["o.v", "r.a.0"]))
    assert "party 2 can't run this: the program has another signature: input 0 is secret int32 (4, 4)" in reason
    workers.each([m.Delete(["o.v"])] * 3)
    workers.check()


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_rows_than_the_programs_are_refused(workers, count):
    """With more in another request they would shift the rows of those between."""
    program = code(jointly(affine), W, *[(X,)] * count)
    rows = [1, 3][:count]
    given = [workers.share(np.ones((each, 4), np.float32)) for each in rows]
    gives = {"outputs": [f"r.a.o{i}" for i in range(count)], "gives": [ARRAY] * count}
    reason = workers.refused(requests(given, code=program, **gives))
    assert reason == "party 0 can't run this: value 'a.0': its shape is (1, 4), not (2, 4)"
    # Not even if the supervisors believed them.
    takes = [m.Array((each, 4), "float32") for each in rows]
    reason = workers.refused(requests(given, code=program, takes=takes, **gives))
    assert reason.endswith("input 1 is secret float32 (1, 4), secret float32 (2, 4) is needed")
    workers.check()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"outputs": ["r.a.o0", "r.a.o1"]}, "the program has 1 outputs, not 2"),
        ({"outputs": []}, "the program has 1 outputs, not 0"),
        ({"gives": [m.Array((2, 5), "float32")]}, "output 0 is secret float32 (2, 5), secret float32 (2, 4) is needed"),
        ({"gives": [m.Array((2, 4), "int32")]}, "output 0 is secret int32 (2, 4), secret float32 (2, 4) is needed"),
        ({"gives": [ARRAY, ARRAY]}, "2 outputs, 1 are needed"),
        ({"inputs": ["o.w", "o.w", "r.a.0"]}, "3 inputs, 2 are needed"),
        ({"inputs": ["r.a.0"]}, "1 inputs, 2 are needed"),
        ({"code": b""}, "the program is none that SPU's compiler wrote"),
    ],
)
def test_a_program_with_another_signature_is_not_run(workers, changes, reason):
    said = workers.refused(requests([workers.share(X)], **changes))
    assert said.startswith("party 0 can't run this: ")
    assert said.endswith(reason)
    workers.check()


def test_a_program_that_fails_at_all_alike_leaves_them_together(workers):
    program = code(lambda x: jax.lax.while_loop(lambda v: v.sum() < 100, lambda v: v * 2, x), X)
    reason = workers.refused([m.Execute(FACTS, program, ["o.w"], ["o.y"])] * 3)
    assert reason.endswith("input 0 is secret float32 (4, 4), secret float32 (2, 4) is needed")
    workers.put("o.x", X)
    reason = workers.refused([m.Execute(FACTS, program, ["o.x"], ["o.y"])] * 3)
    assert reason == "the secure run failed: While with secret condition is not supported"
    workers.check()


def test_no_share_ends_a_worker(workers):
    chance = random.Random(1)
    stored = refused = 0
    for _ in range(150):
        share = hostile(chance)
        answers = workers.each([m.Put("o.h", share)] * 3)
        assert all(answer.in_step for answer in answers)
        stored += answers[0].error is None
    for _ in range(50):
        share = hostile(chance)
        ranks = chance.choice(((0, 1, 2), (chance.randrange(3),)))
        given = [share if rank in ranks else good() for rank in range(3)]
        answers = workers.each(requests([given]))
        assert all(answer.in_step for answer in answers)
        refused += answers[0].error is not None
        assert len({answer.error for answer in answers}) == 1
    assert stored < 30
    assert refused > 30
    workers.check()


@pytest.mark.parametrize(
    "share",
    [
        m.Share(meta((1 << 32, 1 << 32)), []),
        m.Share(good().meta, [good().chunks[0][:-128] + bytes(4096)]),
        m.Share(meta((1 << 40,)), good().chunks),
    ],
)
def test_no_share_that_spu_fails_on_comes_to_it(workers, share):
    for answer in workers.each([m.Put("o.h", share)] * 3):
        assert answer.in_step
        assert answer.error is not None
        assert answer.error.startswith("value 'h': ")
    workers.check()


def links(timeout_ms: int):
    """Two ends of a link in this process."""
    link = load_spu().link
    desc = link.Desc()
    desc.id = secrets.token_hex(8)
    desc.recv_timeout_ms = timeout_ms
    for rank in range(2):
        desc.add_party(f"party{rank}", f"party{rank}")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: link.create_mem(desc, rank), range(2)))


def test_a_party_that_says_nothing_leaves_the_others_out_of_step():
    one, _ = links(100)
    with pytest.raises(OutOfStep, match=r"comparing what to run failed: .*[Tt]imeout"):
        agree(one, FACTS)


def test_what_is_no_fact_leaves_the_others_out_of_step():
    one, other = links(10_000)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        sent = pool.submit(other.all_gather, "no JSON")
        with pytest.raises(OutOfStep, match="comparing what to run failed"):
            agree(one, FACTS)
        sent.result()


def test_both_say_what_differs():
    ends = links(10_000)
    said = []
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(agree, end, {"session": name}) for end, name in zip(ends, "ab", strict=True)]:
            with pytest.raises(Disagreement) as error:
                future.result()
            said.append(str(error.value))
    assert said == ["party 1 differs from party 0: session 'b' against 'a'"] * 2
