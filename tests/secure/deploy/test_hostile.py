"""What a hostile client or owner sends to running parties: it is refused, and costs the others nothing."""

import random
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from clusters import SHORT, W, X, affine, ask, check_served
from hostile import WRAPPED, chunk, good, hostile, meta

from flaxmpc import secure
from flaxmpc.secure._spu import load_spu
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy import streams


def shared(client: secure.Cluster, x: np.ndarray) -> list[m.Share]:
    secret = load_spu().parse_visibility("VIS_SECRET")
    return [m.Share.pack(share) for share in client._io.make_shares(x, secret)]


def send(client: secure.Cluster, shares: list[m.Share]) -> list[m.Answer]:
    """Asks `affine` with these, whatever they are."""
    name, model = client.find("affine")
    header = m.Infer(client.session, secrets.token_hex(16), name, model.hash, "2x4")
    return client._run("infer", header, [streams.of_shares({"0": share}) for share in shares])


def error_of(call: Callable[..., Any], *args: Any) -> str:
    """What is said in place of an answer; empty if there is one."""
    try:
        call(*args)
    except secure.SecureError as error:
        return str(error)
    return ""


@pytest.fixture
def unharmed(client):
    """After the test the session is the same, and the answers are right."""
    session = client.session
    yield
    np.testing.assert_allclose(ask(client), X * 3 + 1, atol=1e-3)
    assert client.session == session


@pytest.mark.usefixtures("unharmed")
def test_a_client_that_sends_other_rows_than_the_programs_gets_no_others(parties):
    done = threading.Event()
    refusals: list[str] = []
    answers: dict[int, np.ndarray] = {}

    def attack(rows: int) -> None:
        with parties.connect("client") as own:
            while not done.is_set():
                refusals.append(error_of(send, own, shared(own, np.full((rows, 4), 7, np.float32))))

    def work(number: int) -> None:
        with parties.connect("client") as own:
            for i in range(6):
                answers[number * 6 + i] = ask(own, X + number * 6 + i)

    attacks = [threading.Thread(target=attack, args=(rows,)) for rows in (1, 3)]
    victims = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in (*attacks, *victims):
        thread.start()
    for thread in victims:
        thread.join()
    done.set()
    for thread in attacks:
        thread.join()
    assert len(answers) == 18
    for number, y in answers.items():
        np.testing.assert_allclose(y, (X + number) * 3 + 1, atol=1e-3)
    assert len(refusals) >= 2
    reasons = ("input 0: its shape is (1, 4), not (2, 4)", "the share of '0' is larger than 192 bytes")
    assert {said.partition(": ")[2] for said in refusals} == set(reasons)


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("share", "reason"),
    [
        (m.Share(meta(WRAPPED), []), r"input 0: its shape is \(4294967296, 4294967296\), not \(2, 4\)"),
        (m.Share(meta(), [chunk(128, 0, bytes(140))]), "input 0: its chunk's size is 140, not 128"),
        (m.Share(meta(), [chunk(128, 0, bytes(4096))]), "the share of '0' is larger than 192 bytes"),
        (m.Share(meta(data_type=6), good().chunks), "input 0: its data type is 'DT_I32', not 'DT_F32'"),
    ],
)
def test_no_message_of_a_client_ends_the_workers(client, share, reason):
    with pytest.raises(secure.SecureError, match=rf"^party \d at \S+: {reason}$"):
        send(client, [share] * 3)


@pytest.mark.usefixtures("unharmed")
def test_whatever_a_client_sends_is_answered_or_refused(client):
    chance = random.Random(2)
    right = shared(client, X)
    refusals = 0
    for _ in range(60):
        share = hostile(chance)
        said = error_of(send, client, [share] * 3 if chance.random() < 0.9 else [share, *right[1:]])
        assert " input 0: " in said or "the share of '0' " in said or (not said and share.meta == good().meta)
        refusals += bool(said)
    assert 40 < refusals < 60


@pytest.mark.usefixtures("unharmed")
def test_whatever_an_owner_stores_is_stored_or_refused(owner):
    chance = random.Random(3)
    refusals = 0
    for i in range(60):
        said = error_of(owner.store, f"h{i}", [hostile(chance).unpack()] * 3)
        assert not said or f"value 'h{i}': " in said
        refusals += bool(said)
        owner.delete([f"h{i}"])
    assert 40 < refusals < 60


def test_an_array_without_elements_is_shared(owner):
    f = secure.jit(lambda a, b: (a.sum() + b, a * 2), parties=owner)
    total, empty = f(owner.put(np.zeros((0, 4), np.float32)), np.float32(2))
    np.testing.assert_allclose(total, 2, atol=1e-4)
    assert empty.shape == (0, 4)


@pytest.fixture(scope="module")
def published(owner):
    """Weights, and the program that goes with them."""
    weights = owner.put(W)
    return weights, owner.program(affine, weights, X, length=4)


ARRAY, OTHER = m.Array((2, 4), "float32"), m.Array((2, 5), "float32")


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"inputs": (OTHER,)}, r"its code for 1 requests has another signature: input 0 is secret float32 \(2, 5\), "),
        ({"inputs": (ARRAY, ARRAY)}, "its code for 1 requests has another signature: 2 inputs, 1 are needed"),
        ({"inputs": (m.Array((2, 4), "int32"),)}, r"signature: input 0 is secret int32 \(2, 4\), "),
        ({"inputs": (m.Array((2, 4), "float32", "public"),)}, "input 0 is 'public': what clients send is secret"),
        ({"inputs": (m.Array((2, 4), "float16"),)}, "its dtype is 'float16', not one of bool, int8, "),
        ({"inputs": (m.Array((2, *WRAPPED), "float32"),)}, r"its shape is \(2, .*\), which no array has"),
        (
            {"inputs": (m.Array((2, 1 << 25), "float32"),)},
            "its shares have 1073741824 bytes, the limit is max_request_b",
        ),
        ({"outputs": (OTHER,)}, r"its code for 1 requests has another signature: output 0 is secret float32 \(2, 5\)"),
        ({"outputs": ()}, "its code for 1 requests has another signature: 0 outputs, 1 are needed"),
        ({"outputs": (ARRAY, ARRAY)}, "its code for 1 requests has another signature: 2 outputs, 1 are needed"),
        ({"batch": 1}, r"it is for 1 rows, but has an array of \(2, 4\)"),
        ({"batch": -1}, "not of the schema: Expected `int` >= 1 - at `.*batch`"),
        ({"joint": {1: b""}}, "not of the schema: Expected `int` >= 2 - at `key` in .*joint"),
        ({"joint": {2: b""}}, "the program is none that SPU's compiler wrote"),
        ({"code": b"\x00\xff" * 50}, "the program is none that SPU's compiler wrote"),
    ],
)
def test_a_program_that_is_not_what_it_says_is_refused(owner, published, changes, reason):
    weights, program = published
    with pytest.raises(secure.SecureError, match=reason):
        owner.publish("lie", weights, {"2x4": msgspec.structs.replace(program, **changes)}, b"")


@pytest.mark.usefixtures("unharmed")
def test_a_client_sends_nothing_in_the_clear(client):
    name, model = client.find("affine")
    program = msgspec.structs.replace(model.programs["2x4"], inputs=(m.Array((2, 4), "float32", "public"),))
    with pytest.raises(secure.SecureError, match="program 2x4 would take inputs that every party may see"):
        client.infer(name, msgspec.structs.replace(model, programs={"2x4": program}), "2x4", X)


@pytest.mark.usefixtures("unharmed")
def test_a_joint_program_that_is_another_is_refused(owner, published):
    weights, program = published
    assert sorted(program.joint) == [2, 4]
    swapped = msgspec.structs.replace(program, joint={2: program.joint[4]})
    with pytest.raises(
        secure.SecureError, match="its code for 2 requests has another signature: 2 inputs, 4 are needed"
    ):
        owner.publish("lie", weights, {"2x4": swapped}, b"")
    more = owner.put((W, W))
    with pytest.raises(
        secure.SecureError, match="its code for 1 requests has another signature: 1 inputs, 0 are needed"
    ):
        owner.publish("lie", more, {"2x4": program}, b"")


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        ("wx", "ab", "can't run this: .*the program has 1 outputs, not 2"),
        ("wx", "", "can't run this: .*the program has 1 outputs, not 0"),
        ("w", "a", "can't run this: .*1 inputs, 2 are needed"),
        ("ww", "a", r"can't run this: .*input 1 is secret float32 \(4, 4\), secret float32 \(2, 4\) is needed"),
        ("wy", "a", "holds 1 of the values no more: ask again, or put them again"),
    ],
)
def test_an_owner_runs_a_program_on_what_it_takes_only(owner, published, inputs, outputs, reason):
    weights, program = published
    held = owner.put(X)
    names = {"w": weights.names[0], "x": held.names[0], "y": "y"}
    taken = [names[name] for name in inputs]
    header = m.RunProgram(owner.session, owner._lease, secrets.token_hex(16), taken, list(outputs))
    with pytest.raises(secure.SecureError, match=rf"^party \d {reason}$"):
        owner._run("run", header, [streams.of_contents([program.code]) for _ in range(3)])


def test_a_program_of_the_owners_own_making_ends_the_session_at_most(mortal):
    """On some that its compiler does not write SPU ends its process."""
    with mortal.connect() as owner:
        held = owner.put(X)
        program = secure.jit(lambda x: x * 2, parties=owner).compile(held).code
        bad = program.replace(b"    return", b"    %i = pphlo.iota dim = -1 : tensor<4xi32>\n    return", 1)
        header = m.RunProgram(owner.session, owner._lease, secrets.token_hex(16), held.names, ["y"])
        start = time.monotonic()
        with pytest.raises(secure.SecureError, match=r"party \d"):
            owner._run("run", header, [streams.of_contents([bad]) for _ in range(3)])
        assert time.monotonic() - start < 4 * SHORT + 10
    check_served(mortal)


def test_parties_that_answer_with_too_little_are_refused(client):
    answer = m.Answer(shares=())
    with pytest.raises(secure.SecureError, match=r"^party 0 sent 0 results, not 1$"):
        client._results([answer] * 3, [ARRAY])
    answers = [m.Answer(shares=(share,)) for share in shared(client, X)]
    np.testing.assert_allclose(client._io.reconstruct(client._results(answers, [ARRAY])[0]), X, atol=1e-4)
    unlike = [m.Answer(shares=(m.Share(meta(storage_type="aby3.BShr<PT_U8,8>"), good().chunks),))] * 3
    with pytest.raises(secure.SecureError, match=r"^opening a result failed: [^\n]+$"):
        client._reconstruct(client._results(unlike, [ARRAY])[0])
    answers[2] = m.Answer(shares=(m.Share(good().meta, [chunk(128, 0, bytes(4096))]),))
    with pytest.raises(
        secure.SecureError, match=r"^result 0 can't be opened: party 2's share: its chunk's size is 4096"
    ):
        client._results(answers, [ARRAY])
