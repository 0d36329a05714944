"""What is sent in pieces comes out whole, or is refused where it is more than it may be."""

import pytest

from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy import streams
from flaxmpc.secure.deploy.errors import Refused

LARGE = bytes(range(256)) * 10_000
SHARES = {"a": m.Share(b"meta", [LARGE, b"x"]), "b": m.Share(b"", []), "c": m.Share(b"m" * 4096, [b"y"])}


def test_shares_come_out_as_they_were():
    sent = list(streams.of_shares(SHARES))
    assert max(len(piece.content) for piece in sent) == 1 << 20
    assert {put.name: put.share for put in streams.shares(sent, lambda _: len(LARGE) + 1)} == SHARES


def test_nothing_is_held_of_what_is_too_large():
    taken = []

    def endless():
        yield m.Piece("a", b"", b"meta")
        for number in range(1000):
            taken.append(number)
            yield m.Piece("a", bytes(100))

    with pytest.raises(Refused, match="the share of 'a' is larger than 1000 bytes"):
        list(streams.shares(endless(), lambda _: 1000))
    assert len(taken) == 11


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([m.Piece("a", b"x")], "a share must begin with its meta"),
        ([m.Piece("a", b"x", b"m" * 4097)], "the share of 'a' has 4097 bytes of meta and 1 chunks"),
        ([m.Piece("a", b"", b"")] * 65, "the share of 'a' has 0 bytes of meta and 65 chunks"),
    ],
)
def test_a_share_that_is_none_is_refused(pieces, reason):
    with pytest.raises(Refused, match=reason):
        list(streams.shares(pieces, lambda _: 1 << 20))


def test_a_name_may_be_refused_before_anything_is_kept():
    def unknown(name: str) -> int:
        raise KeyError(name)

    with pytest.raises(KeyError):
        list(streams.shares(streams.of_shares(SHARES), unknown))


def test_a_model_comes_out_as_it_was_and_its_header_is_small():
    array = m.Array((2, 4), "float32")
    programs = {
        "2x4": m.ModelProgram(LARGE, (array,), (array,), 2, 4, {2: b"two", 4: b""}),
        "1x4": m.ModelProgram(b"one", (array,), (array,), 1, 4),
    }
    model = m.Publish("session", "lease", "film", "hash", ["w0"], programs)
    header, contents = streams.of_model(model, b"bundle")
    assert len(m.encode(header)) < 500
    assert streams.model(header, streams.of_contents(contents), 1 << 22) == (model, b"bundle")
    with pytest.raises(Refused, match="model 'film' has more than max_request_bytes 1000000"):
        streams.model(header, streams.of_contents(contents), 1_000_000)
    with pytest.raises(Refused, match="4 contents, 5 are needed"):
        streams.model(header, streams.of_contents(contents[:4]), 1 << 22)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "0 contents, 2 are needed"),
        (["0"], "1 contents, 2 are needed"),
        (["1"], "piece '1' is not of the 2 contents, in their order"),
        (["0", "0", "2"], "piece '2' is not of"),
        (["0", "1", "0"], "piece '0' is not of"),
        (["0", "1", "2"], "piece '2' is not of"),
    ],
)
def test_contents_come_in_their_order(names, reason):
    assert streams.contents(streams.of_contents([b"", b"x"]), 2, 1, "it") == [b"", b"x"]
    with pytest.raises(Refused, match=reason):
        streams.contents([m.Piece(name, b"") for name in names], 2, 1, "it")
