"""A model of how long a run takes over a network, from what it cost in process."""

from __future__ import annotations

import dataclasses

from flaxmpc.secure.cost import Cost


@dataclasses.dataclass(frozen=True)
class Network:
    """A network between the parties: every figure from it is modelled, not measured, and must be labelled so.

    seconds = compute + bytes of the busiest party / bandwidth + rounds * RTT / 2: a round is one message one way.
    Held within 15 % of runs in Linux network namespaces with a limited bandwidth, on ABY3 and SEMI2K; not for
    CHEETAH, whose send actions are not rounds.

    Attributes:
        name: what tables call it.
        bandwidth_bits_per_second: what one party can send.
        rtt_seconds: round-trip time between two parties.
    """

    name: str
    bandwidth_bits_per_second: float
    rtt_seconds: float

    def seconds(self, cost: Cost) -> float:
        """Modelled seconds of a run over this network that cost `cost` in process."""
        transfer = max(cost.bytes_sent_per_party) * 8 / self.bandwidth_bits_per_second
        return cost.seconds + transfer + cost.rounds * self.rtt_seconds / 2


LAN = Network("LAN", 3e9, 1e-3)
WAN = Network("WAN", 100e6, 80e-3)
