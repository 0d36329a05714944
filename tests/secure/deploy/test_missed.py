"""Party 0 looks at its peers: when it gives a session up."""

import types

import grpc
import pytest

from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.leader import Leader
from flaxmpc.secure.deploy.local import write_local


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
        return m.Status(1, session, "ready", {}, {})


@pytest.mark.parametrize(
    ("answers", "dropped"),
    [
        (("s", None, None, "s", None, None, "s"), []),
        ((None, None, None), ["party 1 at 127.0.0.1:1 did not answer in time"]),
        (("s", None, None, "s", None, None, None), ["party 1 at 127.0.0.1:1 did not answer in time"]),
        (("s", "other"), ["party 1 lost its shares: ready"]),
        ((None, "other"), ["party 1 lost its shares: ready"]),
    ],
)
def test_a_session_is_given_up_after_several_missed_looks_in_a_row(tmp_path, answers, dropped):
    cluster = write_local(tmp_path / "c")
    reasons = []
    sessions = types.SimpleNamespace(drop=lambda _, reason: reasons.append(reason))
    leader = Leader(cluster, {}, sessions, lambda *_, **__: None)  # pyright: ignore[reportArgumentType]
    for peer in leader._peers.values():
        peer.close()
    leader._peers = {1: Peer(*answers)}  # pyright: ignore[reportAttributeAccessIssue]
    session = types.SimpleNamespace(id="s")
    for _ in answers:
        assert reasons == []
        leader._look_at_peers(session)  # pyright: ignore[reportArgumentType]
    assert [reason.replace(cluster.party[1].control, "127.0.0.1:1") for reason in reasons] == dropped
