import json

import jax
import numpy as np
import pytest

from flaxmpc import secure
from flaxmpc.secure.cost import Profile

X = np.linspace(-2, 2, 32, dtype=np.float32).reshape(4, 8)


def layer(x):
    return jax.nn.softmax(x @ x.T) @ x


@pytest.mark.parametrize("protocol", ["ABY3", "SEMI2K", "REF2K"])
def test_bytes_and_rounds_repeat_exactly(group, protocol):
    f = secure.jit(layer, parties=group(protocol))
    first, second = f.run(X).cost, f.run(X + 1).cost
    assert first.bytes_sent == second.bytes_sent
    assert first.rounds == second.rounds
    if protocol == "REF2K":
        assert first.bytes_sent == first.rounds == 0
    else:
        assert first.bytes_sent > 0 < first.rounds
    if protocol == "SEMI2K":
        assert first.bytes_sent_per_party == second.bytes_sent_per_party


def test_operations_add_up(group):
    """Also with one that SPU's compiler leaves as a call of its own function."""
    cost = secure.jit(lambda x: jax.lax.erf(layer(x)), parties=group("ABY3")).run(X).cost
    assert sum(op.bytes_sent for op in cost.per_op.values()) == cost.bytes_sent == sum(cost.bytes_sent_per_party)
    assert sum(op.rounds for op in cost.per_op.values()) == pytest.approx(cost.rounds)
    assert sum(op.seconds for op in cost.per_op.values()) < cost.seconds
    assert cost.per_op["pphlo.dot"].count == 2
    assert cost.per_op["pphlo.custom_call: mhlo.erf"].count == 1
    assert list(cost.bytes_sent_per_party) == sorted(cost.bytes_sent_per_party, reverse=True)


@pytest.mark.parametrize(("protocol", "bytes_per_element"), [("ABY3", 52), ("SEMI2K", 40)])
def test_a_product_costs_what_the_protocol_says(group, protocol, bytes_per_element):
    """Sum over the parties, the truncation included; measured once, and equal on spu 0.9.5 and 0.10."""
    x = np.ones(4096, np.float32)
    cost = secure.jit(lambda x, y: x * y, parties=group(protocol)).run(x, x).cost
    assert cost.bytes_sent / x.size == pytest.approx(bytes_per_element, rel=0.1)
    assert 1 <= cost.rounds <= 3


def test_record(group):
    cost = secure.jit(layer, parties=group("SEMI2K")).run(X).cost
    record = json.loads(cost.to_json())
    assert record == cost.as_dict()
    assert list(record) == [
        *("protocol", "ring", "fraction_bits", "exp_mode", "parties", "seconds", "compile_seconds"),
        *("bytes_sent", "bytes_sent_per_party", "rounds", "per_op", "versions", "machine", "date"),
    ]
    assert (record["protocol"], record["ring"], record["fraction_bits"], record["parties"]) == ("SEMI2K", "FM64", 18, 2)
    assert record["per_op"]["pphlo.dot"].keys() == {"count", "seconds", "bytes_sent", "rounds"}
    assert record["versions"].keys() == {"flaxmpc", "spu", "jax", "numpy", "python"}
    assert record["machine"].keys() == {"platform", "processor", "cpus"}
    assert record["machine"]["processor"]


def test_interleaved_lines_of_two_parties():
    line = "2026-01-01 00:00:00.000 [info] [api.cc:printProfilingData:1] "
    op = (
        line
        + "- pphlo.dot, executed 2 times, duration {}s, send bytes {} recv bytes 9, send actions {}, recv actions 9\n"
    )
    link = line + "Link details: total send bytes {}, recv bytes 9, send actions {}, recv actions 9\n"
    log = op.format("1e-06", 10, 3) + op.format("0.5", 20, 4) + link.format(20, 4) + link.format(10, 3)
    profile = Profile.parse(log, num_parties=2)
    assert profile == Profile(((20, 4), (10, 3)), {"pphlo.dot": (4, 0.500001, 30, 7)})
    cost = secure.Cost.from_profile(secure.Config("SEMI2K"), profile, seconds=1.0, compile_seconds=0.0)
    assert (cost.bytes_sent, cost.bytes_sent_per_party, cost.rounds) == (30, (20, 10), 3.5)
    with pytest.raises(RuntimeError, match="2 run summaries for 3 parties"):
        Profile.parse(log, num_parties=3)
