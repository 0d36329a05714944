"""Party 0 looks at its peers: when it gives a session up."""

import concurrent.futures
import types

import grpc
import pytest

from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.leader import Leader
from flaxmpc.secure.deploy.local import write_local

NO_ANSWER = (
    "party 1 at 127.0.0.1:1 answered what is not of the schema: all need the same version of flaxmpc "
    "('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)"
)


class Lost(grpc.RpcError):
    pass


class Peer:
    """Answers a look as told: with the session that it is in, or not at all."""

    def __init__(self, *answers: str | None):
        self._answers = iter(answers)

    def ask(self, *_: object, **__: object) -> m.Status:
        session = next(self._answers)
        if session is None:
            raise Lost
        if session == "garbled":
            return m.decode(b"\x81\xa2\xff\xfe\x01", m.Status)
        return m.Status(1, session, "ready", {}, {})


def leader_and_reasons(folder) -> tuple[Leader, list[str]]:
    """A leader without peers, and why it gives sessions up."""
    reasons = []
    sessions = types.SimpleNamespace(drop=lambda _, reason: reasons.append(reason))
    leader = Leader(write_local(folder / "c"), {}, sessions, lambda *_, **__: None)  # pyright: ignore[reportArgumentType]
    for peer in leader._peers.values():
        peer.close()
    return leader, reasons


def plain(leader: Leader, reason: str) -> str:
    return reason.replace(leader._cluster.party[1].control, "127.0.0.1:1")


@pytest.mark.parametrize(
    ("answers", "dropped"),
    [
        (("s", None, None, "s", None, None, "s"), []),
        ((None, None, None), ["party 1 at 127.0.0.1:1 did not answer in time"]),
        (("s", None, None, "s", None, None, None), ["party 1 at 127.0.0.1:1 did not answer in time"]),
        (("s", "other"), ["party 1 lost its shares: ready"]),
        ((None, "other"), ["party 1 lost its shares: ready"]),
        (("garbled", None, "garbled"), [NO_ANSWER]),
    ],
)
def test_a_session_is_given_up_after_several_missed_looks_in_a_row(tmp_path, answers, dropped):
    leader, reasons = leader_and_reasons(tmp_path)
    leader._peers = {1: Peer(*answers)}  # pyright: ignore[reportAttributeAccessIssue]
    session = types.SimpleNamespace(id="s")
    for _ in answers:
        assert reasons == []
        leader._look_at_peers(session)  # pyright: ignore[reportArgumentType]
    assert [plain(leader, reason) for reason in reasons] == dropped


def test_a_turn_that_a_peer_answers_with_no_message_ends_the_session(tmp_path):
    leader, reasons = leader_and_reasons(tmp_path)
    garbled: concurrent.futures.Future[bytes] = concurrent.futures.Future()
    garbled.set_result(b"\x81\xa2\xff\xfe\x01")
    lost: dict[int, str] = {}
    assert leader._errors({1: garbled}, lost) == []
    assert [plain(leader, reason) for reason in lost.values()] == [NO_ANSWER]
    leader._heard(types.SimpleNamespace(id="s"), {}, 1, garbled)  # pyright: ignore[reportArgumentType]
    assert [plain(leader, reason) for reason in reasons] == [NO_ANSWER]
