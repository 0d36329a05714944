import dataclasses

import pytest

from flaxmpc import secure
from flaxmpc.secure.cost import Profile


def cost(protocol, totals):
    return secure.Cost.from_profile(secure.Config(protocol), Profile(totals, {}), seconds=2.0, compile_seconds=9.0)


def test_presets():
    assert (secure.LAN.bandwidth_bits_per_second, secure.LAN.rtt_seconds) == (3e9, 1e-3)
    assert (secure.WAN.bandwidth_bits_per_second, secure.WAN.rtt_seconds) == (100e6, 80e-3)


def test_compute_plus_busiest_party_plus_one_way_latencies():
    run = cost("ABY3", ((100_000_000, 90), (125_000_000, 100), (110_000_000, 110)))
    assert secure.WAN.seconds(run) == pytest.approx(2 + 10 + 4)
    assert secure.LAN.seconds(run) == pytest.approx(2 + 1 / 3 + 0.05)


def test_no_network_for_one_party():
    assert secure.WAN.seconds(cost("REF2K", ((0, 0),))) == 2


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        secure.LAN.name = "x"  # pyright: ignore[reportAttributeAccessIssue]
