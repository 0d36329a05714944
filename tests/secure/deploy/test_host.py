"""What an owner's program can reach: real parties, and a client that asks meanwhile."""

import threading
import types

import numpy as np
import pytest
from clusters import X, ask

from flaxmpc import secure


@pytest.fixture
def busy(client):
    """A client asks all the time; its answers are right at the end."""
    stop = threading.Event()
    answers: list[np.ndarray] = []

    def work() -> None:
        while not stop.is_set():
            answers.append(ask(client))

    thread = threading.Thread(target=work)
    thread.start()
    yield
    stop.set()
    thread.join()
    assert len(answers) > 0
    np.testing.assert_allclose(answers, [X * 3 + 1] * len(answers), atol=1e-3)


@pytest.fixture
def same(owner):
    """same(input name, output name): the owner runs the program that returns what it is given."""
    code = secure.jit(lambda x: x, parties=owner).compile(X).code

    def run(name: str, output: str) -> None:
        owner.run(types.SimpleNamespace(code=code, input_names=[name], output_names=[output]))

    return run


# As parties call what lasts as long as a run.
NAMES = ["r.0.0", "r.0.o0", "r.1.0", "o.r.0.0", "r..0.0"]


def test_an_owners_program_reads_no_value_of_a_client(owner, busy, same):
    session = owner.session
    for name in NAMES * 5:
        with pytest.raises(secure.SecureError, match=rf"o\.{name}|no value|values|not found"):
            same(name, "stolen")
        with pytest.raises(secure.SecureError):
            owner.fetch(name)
    for name in ("../r.0.0", "r.0.0\x00", "r.0.0 ", "", "r/0"):
        with pytest.raises(secure.SecureError, match="not of the schema"):
            same(name, "stolen")
    assert owner.session == session


def test_an_owners_program_writes_no_value_of_a_client(owner, busy, same):
    mine = owner.put(X + 7)
    for name in NAMES * 5:
        same(mine.names[0], name)
        np.testing.assert_allclose(owner.open(name), X + 7, atol=1e-3)
        owner.delete([name])
