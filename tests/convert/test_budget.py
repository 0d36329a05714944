import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from flaxmpc import secure
from flaxmpc.convert.budget import Budget, choose, front

NUMBERS = st.floats(-5, 5).map(lambda x: round(x, 2))
TABLES = st.lists(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=3), min_size=1, max_size=4)


def tables(drawn):
    """Losses from 0, and costs of any sign."""
    losses, costs = {}, {}
    for layer, own in enumerate(drawn):
        losses[layer, "attention"] = {str(i): abs(loss) for i, (loss, _) in enumerate(own)}
        costs[layer, "attention"] = {str(i): cost for i, (_, cost) in enumerate(own)}
    return losses, costs


@pytest.mark.parametrize(
    ("text", "what", "most"),
    [
        ("wan=20s", "wan", 20.0),
        ("lan=1.5s", "lan", 1.5),
        ("bytes=300MB", "bytes", 300e6),
        ("rounds=200", "rounds", 200.0),
        ("wan=2e1s", "wan", 20.0),
    ],
)
def test_a_budget_is_read(text, what, most):
    assert Budget.parse(text) == Budget(what, most)


@pytest.mark.parametrize(
    "text",
    ["", "wan", "wan=", "wan=20", "wan=20ms", "wan=-1s", "wan=0s", "wan=1e999s", "wan=nans", "wan=1-2s", "wan=--s",
     "rounds=200s", "bytes=3GB", "man=20s", "wan=20s\n", " wan=20s", "wan=20s " + "x" * 500],
)  # fmt: skip
def test_another_budget_is_refused_with_what_is_allowed(text):
    message = r"is none of the form lan=20s, wan=20s, bytes=20MB, rounds=20, with a number above 0$"
    with pytest.raises(ValueError, match=message) as error:
        Budget.parse(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_what_a_run_takes_of_each_budget(group):
    cost = secure.jit(lambda x: x * x, parties=group("ABY3")).run(np.ones(8, np.float32)).cost
    taken = {what: Budget(what, 1.0).of(cost) for what in ("lan", "wan", "bytes", "rounds")}
    assert taken == {
        "lan": secure.LAN.seconds(cost),
        "wan": secure.WAN.seconds(cost),
        "bytes": cost.bytes_sent,
        "rounds": cost.rounds,
    }
    assert Budget("bytes", 1.0).text(23.4e6) == "23.4 MB"
    assert Budget("rounds", 1.0).text(280.0) == "280 rounds"


@hypothesis.given(TABLES, NUMBERS, st.booleans())
@hypothesis.settings(deadline=None, max_examples=60)
def test_the_choice_is_the_best_of_all_within_the_budget(drawn, most, apart):
    losses, costs = tables(drawn)
    groups = [[(where, next(iter(own))) for where, own in losses.items()]] if apart else []
    every = [dict(zip(losses, names, strict=True)) for names in itertools.product(*losses.values())]

    def total(table, parts):
        return sum(table[where][name] for where, name in parts.items())

    every = [parts for parts in every if all(sum(parts[where] == name for where, name in own) <= 1 for own in groups)]
    within = [parts for parts in every if total(costs, parts) <= most + 1e-9]
    found = choose(losses, costs, most + 1e-9, groups)
    if not within:
        assert found is None
        return
    assert found is not None
    assert found.cost == pytest.approx(total(costs, found.parts))
    assert found.cost <= most + 1e-6
    assert found.loss == pytest.approx(min(total(losses, parts) for parts in within), abs=1e-6)


def test_of_equal_losses_the_cheapest_is_chosen():
    losses = {(0, "attention"): {"a": 0.0, "b": 0.0, "c": 0.0}}
    found = choose(losses, {(0, "attention"): {"a": 3.0, "b": 1.0, "c": 2.0}}, 10.0)
    assert found is not None
    assert found.parts == {(0, "attention"): "b"}


def test_the_front_loses_less_where_it_costs_more():
    rng = np.random.default_rng(0)
    losses, costs = tables([[tuple(rng.normal(size=2)) for _ in range(3)] for _ in range(6)])
    found = front(losses, costs, base=20.0)
    assert len(found) > 3
    assert all(a.cost < b.cost and a.loss > b.loss for a, b in itertools.pairwise(found))
    cheapest = 20.0 + sum(min(own.values()) for own in costs.values())
    assert found[0].cost == pytest.approx(cheapest)
    assert found[-1].loss == pytest.approx(sum(min(own.values()) for own in losses.values()))
