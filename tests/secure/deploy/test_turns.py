import collections
import itertools
import threading

import grpc
import hypothesis
import pytest
from hypothesis import strategies as st

from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.errors import Refused
from flaxmpc.secure.deploy.turns import Request, Turns, command

PEERS = (1, 2)
PATIENCE = 10.0
HERE = threading.Event()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def key(id_: str, caller: str = "client") -> m.Key:
    return m.Key(caller, id_)


def request(id_: str, what: str = "film/1x16", counts=(1, 2, 4), caller: str = "client") -> Request:
    codes = {count: f"code for {count}".encode() for count in counts}
    return Request(key(id_, caller), what, "hash", codes, ["o.w"], ["o0"], [m.Share(id_.encode(), [])])


def arrived(turns: Turns, *requests: Request) -> None:
    for each in requests:
        turns.add(each)
        for rank in PEERS:
            turns.came(each, rank)


def refused(turns: Turns, each: Request) -> Refused | None:
    try:
        turns.add(each)
    except Refused as error:
        return error


def ids(requests) -> str:
    return " ".join(each.key.id for each in requests)


def run_all(turns: Turns) -> list[str]:
    """What runs, turn by turn, until nothing waits."""
    runs = []
    while requests := turns.next(2, 0):
        runs.append(ids(requests))
        turns.end(requests, m.Answer())
    return runs


def test_requests_of_a_kind_that_wait_run_together_as_far_as_there_is_a_program():
    turns = Turns(64, 16)
    others = [request("x", "film/1x32"), request("y", "other/1x16")]
    arrived(turns, *(request(f"a{i}") for i in range(3)), *others, *(request(f"a{i}") for i in range(3, 7)))
    assert run_all(turns) == ["a0 a1 a2 a3", "x", "y", "a4 a5", "a6"]


def test_a_request_waits_until_all_parties_have_it():
    turns = Turns(16, 16)
    late, early = request("late"), request("early")
    turns.add(late)
    turns.came(late, 1)
    arrived(turns, early)
    assert run_all(turns) == ["early"]
    turns.came(late, 2)
    assert run_all(turns) == ["late"]


def test_other_parties_take_the_same_or_none():
    turns = Turns(16, 16)
    for each in (request("a"), request("b"), request("c"), request("x", "film/1x32")):
        turns.add(each)
    assert turns.has(key("a"), 0, HERE)
    assert not turns.has(key("z"), 0, HERE)
    assert turns.named([key("a"), key("z")]) == []
    assert turns.named([key("a"), key("x")]) == []
    assert turns.named([key("a"), key("b"), key("c")]) == []  # no program for three
    assert ids(turns.named([key("b"), key("a")])) == "b a"
    assert turns.named([key("a")]) == []


def test_each_gets_its_own_shares_and_the_cost_of_the_run():
    turns = Turns(16, 16)
    arrived(turns, request("a"), request("b"))
    running = turns.next(2, 0)
    shares = tuple(m.Share(name, []) for name in (b"a", b"b"))
    turns.end(running, m.Answer(shares=shares, bytes_sent=7, rounds=3))
    for each, share in zip(running, shares, strict=True):
        assert each.answer.result(0) == m.Answer(shares=(share,), bytes_sent=7, rounds=3)
    assert len(turns) == 0


def test_who_has_an_answer_has_room_for_the_next_request():
    turns = Turns(16, 1)
    first = request("a")
    arrived(turns, first)
    first.answer.add_done_callback(lambda _: turns.add(request("b")))
    turns.end(turns.next(2, 0), m.Answer())
    assert turns.keys() == [key("b")]


def test_what_fails_together_is_tried_alone_before_what_came_later():
    turns = Turns(16, 16)
    arrived(turns, request("a"), request("b"))
    running = turns.next(2, 0)
    arrived(turns, request("c"))
    running[0].end(m.Answer(error="the caller went away"))
    turns.separate(running)
    assert run_all(turns) == ["b", "c"]


def test_what_fails_together_costs_no_caller_a_turn():
    turns = Turns(16, 16, mixed=True)
    arrived(turns, request("a", caller="alice"), request("h", caller="hostile"))
    turns.separate(turns.next(2, 0))
    arrived(turns, request("b", caller="bob"), request("i", caller="hostile"))
    assert run_all(turns) == ["a", "h", "b i"]


def test_a_caller_that_went_away_gets_no_turn():
    turns = Turns(16, 16)
    gone, other = request("gone"), request("other")
    arrived(turns, gone, other)
    turns.abandon(gone, "the caller went away")
    assert run_all(turns) == ["other"]
    assert gone.answer.result(0).error == "the caller went away"


def test_closing_ends_those_that_wait_and_not_those_that_run():
    turns = Turns(16, 16)
    arrived(turns, request("a"), request("b"), request("x", "film/1x32"))
    running = turns.next(2, 0)
    turns.close(Refused(grpc.StatusCode.ABORTED, "lost"))
    assert turns.next(2, 10) == []
    assert not running[0].answer.done()
    assert len(turns) == 2
    with pytest.raises(Refused, match="lost"):
        turns.add(request("y"))
    turns.separate(running)
    assert [each.answer.result(0).error for each in running] == ["lost", "lost"]
    turns.wait_until_idle()


def test_the_command_names_all_that_runs():
    execute = command([request("a"), request("b", caller="client.bob")], {"session": "s"})
    assert execute.code == b"code for 2"
    assert execute.inputs == ["o.w", "r.0.0", "r.1.0"]
    assert execute.outputs == ["r.0.o0", "r.1.o0"]
    assert [share.meta for share in execute.given] == [b"a", b"b"]
    assert execute.facts == {
        "session": "s",
        "request": "client/a client.bob/b",
        "program": m.digest(b"code for 2"),
        "model": "hash",
    }
    assert execute.answer


def test_what_an_owner_runs_keeps_its_names():
    execute = command([Request(key("a", "owner"), "run", "", {1: b"code"}, ["o.x"], ["o.y"])], {})
    assert (execute.inputs, execute.outputs, execute.answer) == (["o.x"], ["o.y"], False)


# ------------------------------------------------------------------------------------------------------------- fairness


def test_an_id_is_its_callers_own():
    turns = Turns(16, 16, mixed=True)
    mine, theirs = request("a", caller="alice"), request("a", caller="hostile")
    turns.add(theirs)
    turns.add(mine)
    with pytest.raises(Refused, match="request a is known already"):
        turns.add(request("a", caller="alice"))
    assert turns.has(key("a", "alice"), 0, HERE)
    assert not turns.has(key("a", "bob"), 0, HERE)
    turns.abandon(theirs, "the caller went away")
    assert not mine.answer.done()
    assert turns.named([key("a", "hostile")]) == []
    assert turns.named([key("a", "alice")]) == [mine]
    turns.add(request("a", caller="hostile"))  # while the other one runs
    assert ids(turns.named([key("a", "hostile")])) == "a"


def test_a_request_that_has_ended_takes_no_other_of_its_id_along():
    turns = Turns(16, 16)
    first, second = request("a"), request("a")
    turns.add(first)
    turns.abandon(first, "the caller went away")
    turns.add(second)
    turns.abandon(first, "the caller went away")
    assert turns.keys() == [key("a")]
    assert not second.answer.done()


def test_one_caller_has_a_quota_and_leaves_room_for_others():
    turns = Turns(64, 16)
    for i in range(16):
        turns.add(request(f"a{i}", caller="one"))
    with pytest.raises(Refused, match=r"^one has 16 requests here, the most that one may have: ask again later$"):
        turns.add(request("b", caller="one"))
    crowd = [f"hostile{i}" for i in range(30)]
    for i, caller in itertools.product(range(16), crowd):
        error = refused(turns, request(f"h{i}", caller=caller))
        assert error is None or "requests wait: try again later" in str(error)
    assert len(turns) < 64
    turns.add(request("a", caller="a newcomer"))
    turns = Turns(2, 16)
    turns.add(request("a", caller="one"))
    with pytest.raises(Refused, match=r"^1 requests wait: try again later$"):
        turns.add(request("b", caller="one"))
    turns.add(request("a", caller="two"))
    with pytest.raises(Refused, match=r"^2 requests wait: try again later$"):
        turns.add(request("a", caller="three"))


def test_what_runs_counts_too():
    turns = Turns(16, 1)
    arrived(turns, request("a"))
    turns.next(2, 0)
    with pytest.raises(Refused, match="has 1 requests here"):
        turns.add(request("b"))


def test_turns_go_round():
    turns = Turns(64, 16)
    arrived(turns, *(request(f"h{i}", f"kind {i}", caller="hostile") for i in range(4)))
    arrived(turns, *(request(f"a{i}", f"kind {i}", caller="alice") for i in range(2)))
    arrived(turns, request("b", caller="bob"))
    assert run_all(turns) == ["h0", "a0", "b", "h1", "a1", "h2", "h3"]


def test_who_asks_one_after_another_waits_for_one_turn_of_each_other():
    turns = Turns(64, 16)
    arrived(turns, *(request(f"h{i}", f"kind {i}", caller="hostile") for i in range(16)))
    order = []
    for i in range(6):
        running = turns.next(2, 0)
        if running[0].key.caller == "hostile":  # asked while that runs
            arrived(turns, request(f"a{i}", caller="alice"))
        order.append(running[0].key.caller)
        turns.end(running, m.Answer())
    assert order == ["hostile", "alice"] * 3


def test_a_joint_run_takes_one_of_each_caller_first():
    turns = Turns(64, 16, mixed=True)
    arrived(turns, *(request(f"h{i}", caller="hostile") for i in range(6)))
    arrived(turns, request("a", caller="alice"), request("b", caller="bob"))
    assert run_all(turns) == ["h0 a b h1", "h2 h3 h4 h5"]


def test_without_approval_requests_of_one_caller_alone_run_together():
    turns = Turns(64, 16)
    arrived(turns, request("h0", caller="hostile"), request("a", caller="alice"), request("h1", caller="hostile"))
    assert run_all(turns) == ["h0 h1", "a"]


# ------------------------------------------------------------------------------------------------- what party 0 says no


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def follower(clock):
    return Turns(64, 16, patience=PATIENCE, clock=clock)


def test_what_party_0_never_asks_for_ends_whatever_else_runs(follower, clock):
    lonely, other = request("lonely"), request("other")
    follower.add(lonely)
    follower.add(other)
    follower.has(other.key, 0, HERE)
    for _ in range(20):
        running = follower.named([other.key])
        clock.now += 1
        follower.expire()
        assert lonely.answer.done() == (clock.now >= PATIENCE)
        follower.end(running, m.Answer())
        other = request("other")
        follower.add(other)
        follower.has(other.key, 0, HERE)
    assert "party 0 has not asked for this request for 10 s: was it sent there?" in str(lonely.answer.result(0).error)


def test_what_waits_at_party_0_is_waited_for_however_long_runs_take(follower, clock):
    patient, other = request("patient"), [request(f"other{i}") for i in range(4)]
    for each in (patient, *other):
        follower.add(each)
        follower.has(each.key, 0, HERE)
    for each in other:
        running = follower.named([each.key], [patient.key, *(key.key for key in other)])
        clock.now += 5 * PATIENCE
        follower.expire()
        follower.end(running, m.Answer())
        clock.now += PATIENCE / 2
        follower.expire()
    assert not patient.answer.done()
    clock.now += PATIENCE / 2
    follower.expire()
    assert patient.answer.done()


def test_what_party_0_gave_up_ends_though_it_was_asked_for(follower, clock):
    gone, other = request("gone"), [request(f"other{i}") for i in range(3)]
    for each in (gone, *other):
        follower.add(each)
        follower.has(each.key, 0, HERE)
    for each, over in zip(other, (False, False, True), strict=True):
        running = follower.named([each.key], [key.key for key in other])
        assert gone.answer.done() == over
        clock.now += PATIENCE * 0.6
        follower.expire()  # not while a run goes on, as party 0 can't speak then
        follower.end(running, m.Answer())


def test_waiting_for_an_answer_ends_with_patience(clock):
    turns = Turns(64, 16, patience=0.01)
    each = request("a")
    turns.add(each)
    error = turns.wait(each).error
    assert error is not None
    assert "party 0 has not asked" in error


def test_party_0_does_not_wait_for_whom_nobody_waits():
    turns, gone = Turns(64, 16), threading.Event()

    def leave() -> None:
        gone.set()
        turns.wake()

    timer = threading.Timer(0.05, leave)
    timer.start()
    assert not turns.has(key("a"), 60, gone)
    timer.join()


# ------------------------------------------------------------------------------------- any order, any number of callers

CALLERS = ("alice", "bob", "hostile")
KINDS = ("film/1x16", "film/1x32")
EACH, LIMIT = 4, 9

caller, kind = st.sampled_from(CALLERS), st.sampled_from(KINDS)
ranks = st.sampled_from([(0, 1, 2), (0, 1, 2), (0, 1, 2), (0,), (1,), (1, 2), (0, 2)])
operation = st.one_of(
    st.tuples(st.just("send"), caller, st.integers(0, 5), kind, ranks),
    st.tuples(st.just("send"), caller, st.integers(0, 5), kind, st.just((0, 1, 2))),
    st.tuples(st.just("leave"), caller, st.integers(0, 5), ranks),
    st.tuples(st.just("tell")),
    st.tuples(st.just("wait"), st.sampled_from([0.5, 4.0, 11.0])),
    st.tuples(st.just("turn"), st.sampled_from(["well", "well", "fails"]), st.floats(0, 30), caller, ranks),
)


class Group:
    """Three parties without their processes; party 0 is told what the others have when it hears of it."""

    def __init__(self, mixed: bool):
        self.clock = Clock()
        self.turns = [
            Turns(LIMIT, EACH, patience=PATIENCE if rank else None, mixed=mixed, clock=self.clock) for rank in range(3)
        ]
        self.mixed = mixed
        self.sent: list[tuple[int, Request]] = []
        self.asked: list[tuple[Request, int, float]] = []  # whether a peer has it, until when
        self.waited: collections.Counter[Request] = collections.Counter()
        self.bound: dict[Request, int] = {}

    def send(self, caller: str, number: int, kind: str, ranks: tuple[int, ...]) -> None:
        for rank in ranks:
            turns, each = self.turns[rank], request(str(number), kind, (1, 2, 4), caller)
            held = [*turns.keys(), *(each.key for each in turns._running)]
            own = sum(key.caller == caller for key in held)
            known = each.key in held
            if error := refused(
                turns, each
            ):  # another's ids are no reason, nor are another's requests unless all is full
                assert known or own >= EACH or own >= LIMIT - len(held)
                assert known == (error.code is grpc.StatusCode.ALREADY_EXISTS)
                continue
            self.sent.append((rank, each))
            if rank == 0:
                self.asked += [(each, peer, self.clock.now + PATIENCE / 2) for peer in PEERS]

    def leave(self, caller: str, number: int, ranks: tuple[int, ...]) -> None:
        for rank in ranks:
            if each := self.turns[rank]._waiting.get(key(str(number), caller)):
                self.turns[rank].abandon(each, "the caller went away")

    def tell(self) -> None:
        """Party 0's questions are answered as far as they can be."""
        still = []
        for each, peer, until in self.asked:
            if each.answer.done():
                continue
            if self.turns[peer].has(each.key, 0, HERE):
                self.turns[0].came(each, peer)
            elif self.clock.now >= until:
                self.turns[0].abandon(each, "was not sent this request")
            else:
                still.append((each, peer, until))
        self.asked = still

    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.expire()
        self.tell()

    def expire(self) -> None:
        for rank in PEERS:
            self.turns[rank].expire()

    def turn(self, how: str, seconds: float, leaver: str, ranks: tuple[int, ...]) -> None:
        ready = {each for each in self.turns[0]._waiting.values() if len(each.peers) == len(PEERS)}
        for each in ready - set(self.bound):
            ahead = sum(
                other.key.caller == each.key.caller and other.number < each.number
                for other in self.turns[0]._waiting.values()
            )
            self.bound[each] = (ahead + 1) * len(CALLERS)
        chosen = self.turns[0].next(len(PEERS), 0)
        assert bool(chosen) == bool(ready)
        if not chosen:
            return
        assert set(chosen) <= ready
        assert len(chosen) in (1, 2, 4)
        assert len({(each.model, each.what) for each in chosen}) == 1
        assert self.mixed or len({each.key.caller for each in chosen}) == 1
        keys = [each.key for each in chosen]
        waiting = self.turns[0].keys()
        self.leave(leaver, int(keys[0].id), ranks)  # just before, at some of them
        running = [chosen, *(self.turns[rank].named(keys, waiting) for rank in PEERS)]
        assert all(not each or [one.key for one in each] == keys for each in running)
        went = how == "well" and all(running)
        for each in ready - set(chosen):
            if not each.answer.done():
                self.waited[each] += 1 if went or len(chosen) == 1 else 0  # what fails together did not take long
                assert self.waited[each] <= self.bound[each], "a caller waits for more than a round of the others"
        self.clock.now += seconds
        self.expire()
        for turns, requests in zip(self.turns, running, strict=True):
            if went:
                shares = tuple(m.Share(f"{one.key.caller} {one.key.id}".encode(), []) for one in requests)
                turns.end(requests, m.Answer(shares=shares))
            elif len(requests) > 1:
                turns.separate(requests)
            else:
                turns.end(requests, m.Answer(error="failed"))

    def check(self) -> None:
        for turns in self.turns:
            held = [*turns.keys(), *(each.key for each in turns._running)]
            assert len(held) == len(turns) <= LIMIT
            assert max(collections.Counter(each.caller for each in held).values(), default=0) <= EACH
        for _, each in self.sent:
            if each.answer.done() and (shares := each.answer.result().shares):
                assert [share.meta.decode() for share in shares] == [f"{each.key.caller} {each.key.id}"]


@hypothesis.settings(max_examples=150)
@hypothesis.given(st.lists(operation, max_size=80), st.booleans())
def test_whatever_callers_do(operations, mixed):
    group = Group(mixed)
    for name, *arguments in operations:
        getattr(group, name)(*arguments)
        group.check()
    # Nothing waits for ever: neither here nor there.
    for _ in range(LIMIT + 1):
        group.wait(PATIENCE / 2)
        group.turn("well", 1.0, "nobody", ())
        group.check()
    for _ in range(3):
        group.wait(PATIENCE)
    assert all(each.answer.done() for _, each in group.sent)
    assert [len(turns) for turns in group.turns] == [0, 0, 0]


@hypothesis.settings(max_examples=50)
@hypothesis.given(st.lists(operation, max_size=40))
def test_a_closed_session_holds_nothing(operations):
    group = Group(mixed=True)
    for name, *arguments in operations:
        getattr(group, name)(*arguments)
    for turns in group.turns:
        turns.close(Refused(grpc.StatusCode.ABORTED, "lost"))
        turns.wait_until_idle()
    assert all(each.answer.done() for _, each in group.sent)
