"""What one client does to the others: real parties, two clients' certificates."""

import re
import threading
import time

import grpc
import msgspec
import numpy as np
import pytest
from clusters import TIMEOUT, W, X, affine, ask, publish

from flaxmpc import secure
from flaxmpc.secure._spu import load_spu
from flaxmpc.secure.deploy import client as client_module
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy import streams
from flaxmpc.secure.deploy.certificates import Authority
from flaxmpc.secure.deploy.cluster import Identity

# The last is gRPC's own word: a connection had as many calls under way as a party takes of one.
TOO_MANY = "the most that one may have|which is the limit|RST_STREAM"
UNNAMED = r"party 0 has not asked for this request for \d s: was it sent there\?"


def connect_as(parties, directory, name: str) -> secure.Cluster:
    """Connects as a client of its own."""
    Authority.read(parties.directory).issue(directory, name, server=False)
    identity = Identity(certificate=str(directory / f"{name}.pem"), key=str(directory / f"{name}.key"))
    return secure.Cluster(msgspec.structs.replace(parties.cluster, client=identity), "client")


@pytest.fixture(scope="module")
def alice(parties, owner, tmp_path_factory):
    with connect_as(parties, tmp_path_factory.mktemp("alice"), "client.alice") as connected:
        yield connected


class Hostile:
    """A client that says to each party what it likes."""

    def __init__(self, client: secure.Cluster, name: str = "affine", program: str = "2x4", x: np.ndarray = X):
        self._client = client
        self._model = client.find(name)
        self._program = program
        shares = client._io.make_shares(x, load_spu().parse_visibility("VIS_SECRET"))
        self._shares = [m.Share.pack(share) for share in shares]

    def send(self, id_: str, *ranks: int) -> list[grpc.Future]:
        """Asks some of the parties."""
        name, model = self._model
        session = self._client.session
        return [
            self._client._peers[rank].send_later(
                "infer",
                m.Infer(session, id_, name, model.hash, self._program),
                streams.of_shares({"0": self._shares[rank]}),
            )
            for rank in ranks
        ]


def ends(futures: list[grpc.Future]) -> list[str]:
    """How calls end: the error, of the call or of the answer; empty if it went well."""
    found = []
    for future in futures:
        error = future.exception(60)
        found.append(str(error) if error else msgspec.msgpack.decode(future.result(), type=m.Answer).error or "")
    return found


def test_requests_that_party_0_is_not_sent_end_and_cost_others_nothing(parties, client, alice):
    start = time.monotonic()
    with parties.connect("client") as own:
        hostile = Hostile(own)
        futures = [future for i in range(128) for future in hostile.send(f"lonely{i}", 1, 2)]
        for i in range(20):
            np.testing.assert_allclose(ask(alice, X + i), (X + i) * 3 + 1, atol=1e-3)
        # No more of a connection are taken at a time; the rest wait at the client.
        found = ends(futures[: 2 * parties.cluster.limits.calls_per_client])
        assert time.monotonic() - start < 2 * TIMEOUT + 10
        assert all(re.search(rf"{TOO_MANY}|{UNNAMED}", error) for error in found)
        assert len([error for error in found if re.search(UNNAMED, error)]) >= 2
        for future in futures:
            future.cancel()
    time.sleep(0.5)
    np.testing.assert_allclose(ask(client), X * 3 + 1, atol=1e-3)  # and its own go on after them


def test_requests_that_are_taken_back_leave_no_question_behind(parties, client, alice):
    """Party 0 asks the others for each request: many that are taken back at once must not fill their threads."""
    hostile = Hostile(client)
    session = alice.session
    for i in range(400):
        (future,) = hostile.send(f"back{i}", 0)
        time.sleep(0.003)
        future.cancel()
    for i in range(5):
        start = time.monotonic()
        np.testing.assert_allclose(ask(alice, X + i), (X + i) * 3 + 1, atol=1e-3)
        assert time.monotonic() - start < TIMEOUT / 2
    assert alice.session == session


def test_ids_of_another_client_are_no_ones_business(client, alice, monkeypatch):
    monkeypatch.setattr(client_module.secrets, "token_hex", lambda _: "same")
    hostile = Hostile(client)
    for i in range(5):
        lonely = hostile.send("same", 1, 2)
        np.testing.assert_allclose(ask(alice, X + i), (X + i) * 3 + 1, atol=1e-3)
        for future in lonely:
            assert not future.done()
            future.cancel()
    barrier = threading.Barrier(2)
    answers: dict[int, list[np.ndarray]] = {0: [], 1: []}

    def work(number: int, own: secure.Cluster) -> None:
        for _ in range(10):
            barrier.wait(60)
            answers[number].append(ask(own, X + number))

    threads = [threading.Thread(target=work, args=each) for each in enumerate((client, alice))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, found in answers.items():
        assert len(found) == 10
        np.testing.assert_allclose(found, [(X + number) * 3 + 1] * 10, atol=1e-3)


def swapped(w, one, other):
    """As `jointly` has it, but each gets the other's."""
    return [affine(w, *other), affine(w, *one)]


def test_a_program_that_swaps_requests_swaps_none_of_two_clients(parties, owner, client, alice):
    weights = owner.put(W)
    program = owner.program(affine, weights, X, length=4)
    code = secure.jit(swapped, parties=owner).compile(weights, (X,), (X,)).code
    owner.publish("affine", weights, {"2x4": msgspec.structs.replace(program, joint={2: code})}, b"")
    seen = len(parties.events(0, "run"))
    answers: dict[int, list[np.ndarray]] = {0: [], 1: []}

    def work(number: int, own: secure.Cluster) -> None:
        for _ in range(5):
            answers[number].append(ask(own, X + number))

    threads = [threading.Thread(target=work, args=each) for each in 4 * list(enumerate((client, alice)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, found in answers.items():
        np.testing.assert_allclose(found, [(X + number) * 3 + 1] * 20, atol=1e-3)
    np.testing.assert_allclose(ask(client, X), X * 3 + 1, atol=1e-3)  # alone
    assert {run["requests"] for run in parties.events(0, "run")[seen:]} == {1, 2}
    publish(owner)


def slow(w, x):
    for _ in range(40):
        w = w @ w * 0.001
    return x + x @ w


def test_one_client_with_many_requests_leaves_every_other_its_turn(mortal, tmp_path):
    x = np.ones((1, 32), np.float32)
    with mortal.connect() as owner:
        weights = owner.put(np.full((32, 32), 0.1, np.float32))
        owner.publish("slow", weights, {"1x32": owner.program(slow, weights, x, length=32)}, b"")
    stop = threading.Event()
    refused = f"{TOO_MANY}|{UNNAMED}|was not sent this request"
    with mortal.connect("client") as client, connect_as(mortal, tmp_path, "client.alice") as alice:
        hostile = Hostile(client, "slow", "1x32", x)
        found: list[list[str]] = []

        def crowd() -> None:
            while not stop.is_set():
                found.append(ends([future for i in range(64) for future in hostile.send(f"crowd{i}", 0, 1, 2)]))

        thread = threading.Thread(target=crowd)
        thread.start()
        try:
            name, model = alice.find("slow")
            for _ in range(3):
                mortal.wait_for_requests(4)
                before = len(mortal.events(0, "run"))
                np.testing.assert_allclose(alice.infer(name, model, "1x32", x).outputs, [x], atol=1e-2)
                # What ran already, one of the crowd's, and its own.
                assert len(mortal.events(0, "run")) - before <= 3
        finally:
            stop.set()
            thread.join()
        for each in found:
            assert each.count("") > 0
            assert [error for error in each if error and not re.search(refused, error)] == []
        assert alice.find(name)[1].hash == model.hash
