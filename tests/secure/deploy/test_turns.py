import grpc
import pytest

from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.rpc import Refused
from flaxmpc.secure.deploy.turns import Request, Turns, command

PEERS = (1, 2)


def request(id_: str, what: str = "film/1x16", counts=(1, 2, 4)) -> Request:
    codes = {count: f"code for {count}".encode() for count in counts}
    return Request(id_, what, "hash", codes, ["o.w"], [f"r.{id_}.o0"], [m.Share(id_.encode(), [])])


def arrived(turns: Turns, *requests: Request) -> None:
    for each in requests:
        turns.add(each)
        for rank in PEERS:
            turns.came(each, rank)


def ids(requests) -> str:
    return " ".join(each.id for each in requests)


def test_requests_of_a_kind_that_wait_run_together_as_far_as_there_is_a_program():
    turns = Turns(16)
    others = [request("x", "film/1x32"), request("y", "other/1x16")]
    arrived(turns, *(request(f"a{i}") for i in range(3)), *others, *(request(f"a{i}") for i in range(3, 7)))
    assert [ids(turns.next(2, 0)) for _ in range(6)] == ["a0 a1 a2 a3", "x", "y", "a4 a5", "a6", ""]


def test_a_request_waits_until_all_parties_have_it():
    turns = Turns(16)
    late, early = request("late"), request("early")
    turns.add(late)
    turns.came(late, 1)
    arrived(turns, early)
    assert ids(turns.next(2, 0)) == "early"
    assert turns.next(2, 0) == []
    turns.came(late, 2)
    assert ids(turns.next(2, 0)) == "late"


def test_other_parties_take_the_same_or_none():
    turns = Turns(16)
    for each in (request("a"), request("b"), request("c"), request("x", "film/1x32")):
        turns.add(each)
    assert turns.has("a", 0)
    assert not turns.has("z", 0)
    assert turns.named(["a", "z"]) == []
    assert turns.named(["a", "x"]) == []
    assert turns.named(["a", "b", "c"]) == []  # no program for three
    assert ids(turns.named(["b", "a"])) == "b a"
    assert turns.named(["a"]) == []


def test_each_gets_its_own_shares_and_the_cost_of_the_run():
    turns = Turns(16)
    arrived(turns, request("a"), request("b"))
    running = turns.next(2, 0)
    shares = tuple(m.Share(name, []) for name in (b"a", b"b"))
    turns.end(running, m.Answer(shares=shares, bytes_sent=7, rounds=3))
    for each, share in zip(running, shares, strict=True):
        assert each.answer.result(0) == m.Answer(shares=(share,), bytes_sent=7, rounds=3)
    assert len(turns) == 0


def test_what_fails_together_is_tried_alone_before_all_others():
    turns = Turns(16)
    arrived(turns, request("a"), request("b"))
    running = turns.next(2, 0)
    arrived(turns, request("c"))
    running[0].end(m.Answer(error="the caller went away"))
    turns.separate(running)
    assert ids(turns.next(2, 0)) == "b"
    assert ids(turns.next(2, 0)) == "c"


def test_a_caller_that_went_away_gets_no_turn():
    turns = Turns(16)
    gone, other = request("gone"), request("other")
    arrived(turns, gone, other)
    turns.abandon(gone, "the caller went away")
    assert ids(turns.next(2, 0)) == "other"
    assert gone.answer.result(0).error == "the caller went away"


def test_closing_ends_those_that_wait_and_not_those_that_run():
    turns = Turns(16)
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


def test_the_queue_is_limited_and_ids_are_new():
    turns = Turns(2)
    turns.add(request("a"))
    with pytest.raises(Refused, match="request a is known already"):
        turns.add(request("a"))
    turns.add(request("b"))
    with pytest.raises(Refused, match="2 requests wait: try again later"):
        turns.add(request("c"))


def test_the_command_names_all_that_runs():
    execute = command([request("a"), request("b")], {"session": "s"})
    assert execute.code == b"code for 2"
    assert execute.inputs == ["o.w", "r.a.0", "r.b.0"]
    assert execute.outputs == ["r.a.o0", "r.b.o0"]
    assert [share.meta for share in execute.given] == [b"a", b"b"]
    assert execute.facts == {"session": "s", "request": "a b", "program": m.digest(b"code for 2"), "model": "hash"}
    assert execute.answer
