"""The MPC protocols, what each protects against, and the settings of a run."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import TYPE_CHECKING, SupportsIndex

from flaxmpc.errors import unknown

if TYPE_CHECKING:
    import spu


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A protocol as SPU implements it. All are semi-honest: the parties follow the program but may look.

    Attributes:
        name: SPU's name of it.
        num_parties: how many computing parties it takes.
        threat_model: who learns what, in plain words.
        rounds_exact: whether the send actions that a run counts are network rounds (measured as the slope of the run
            time against the latency). Where not, the round count and a modelled latency are only indicative.
        opens_once: whether a product opens its operands, masked, and of a resident value this is done on its first use
            only (SPU's cached variables: 11.8 MB in all for 128 x 768 by 768 x 768, then 2.4 MB). ABY3 and CHEETAH
            open no operand, and have nothing like it.
        grouped_products: whether many small products sent as one grouped convolution take no more bytes than one by
            one, and so only save rounds. Where a product opens its operands SPU opens them once for every group.
    """

    name: str
    num_parties: int
    threat_model: str
    rounds_exact: bool
    opens_once: bool = False
    grouped_products: bool = True


PROTOCOLS = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            Protocol(
                "ABY3",
                3,
                "Three semi-honest parties, at most one of them corrupt: no single party learns anything but the "
                "shapes and the program. Two that collude learn everything.",
                rounds_exact=True,
            ),
            Protocol(
                "SEMI2K",
                2,
                "Two semi-honest parties with Beaver triples from the first party. That party can compute every secret "
                "from the triples' seeds, so nothing is hidden from it: for development and measurement only.",
                rounds_exact=True,
                opens_once=True,
                grouped_products=False,
            ),
            Protocol(
                "CHEETAH",
                2,
                "Two semi-honest parties without a helper: neither learns anything but the shapes and the program. "
                "Homomorphic encryption and oblivious transfer make it slow: for small models.",
                rounds_exact=False,
            ),
            Protocol(
                "REF2K",
                1,
                "One party that sees everything: no secrecy at all. It is the same fixed-point arithmetic, fast, for "
                "accuracy over whole test sets (and more lenient on overflow than the others).",
                rounds_exact=True,
            ),
        )
    }
)

# How SPU computes an exponential, and its own name for that.
EXP_MODES = MappingProxyType({"taylor": "EXP_TAYLOR", "pade": "EXP_PADE"})

MODEL_EXP_MODE = "taylor"
"""What parties for one of our models are given: its softmax has operands from -500 to 0, which this is exact for."""

NETWORKS = ("wan", "lan")

RING_BITS = MappingProxyType({"FM32": 32, "FM64": 64, "FM128": 128})


def get_protocol(name: str) -> Protocol:
    """The protocol called `name` (one of PROTOCOLS); ValueError, with the closest name, if there is none."""
    if name not in tuple(PROTOCOLS):  # in a mapping a list could not be looked up
        raise unknown("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


@dataclasses.dataclass(frozen=True)
class Config:
    """What all parties of a run must agree on.

    Attributes:
        protocol: a name in PROTOCOLS.
        ring: "FM32", "FM64" or "FM128": secrets are integers modulo 2^32, 2^64 or 2^128.
        fraction_bits: bits after the binary point of the fixed-point encoding.
        exp_mode: how exponentials are computed. "taylor": (1 + x/256)^256, off by x^2/512 of the value, and by anything
            below -512; tanh is then within 0.005. "pade": by the bits of x log2 e, off by 1e-4 of the value and right
            for any negative x, at four times the bytes and three times the rounds (ABY3), and tanh is as exact; not in
            FM32, and with at most 28 fraction bits in FM64, 60 in FM128. "auto" is "pade" where there is room for it,
            and else "taylor".
        network: the line between the parties that products are arranged for: "wan", a slow one, or "lan".

    Raises:
        ValueError: an unknown protocol, ring, exp_mode or network, an exp_mode that the ring has no room for, or
            fraction bits that leave a product of two small numbers none.
    """

    protocol: str = "ABY3"
    ring: str = "FM64"
    fraction_bits: int = 18
    exp_mode: str = "auto"
    network: str = "wan"

    def __post_init__(self):
        get_protocol(self.protocol)
        if self.ring not in tuple(RING_BITS):
            raise unknown("ring", self.ring, RING_BITS)
        if self.exp_mode not in ("auto", *EXP_MODES):
            raise unknown("exp_mode", self.exp_mode, ("auto", *EXP_MODES))
        if self.network not in NETWORKS:
            raise unknown("network", self.network, NETWORKS)
        half = RING_BITS[self.ring] // 2
        # A product carries twice the fraction bits until it is truncated; SPU would return garbage without a word.
        whole = isinstance(self.fraction_bits, SupportsIndex) and not isinstance(self.fraction_bits, bool)
        if not whole or not 1 <= self.fraction_bits <= half - 2:
            raise ValueError(
                f"fraction_bits must be in 1..{half - 2} with ring {self.ring}, not {self.fraction_bits!r}"
            )
        object.__setattr__(self, "fraction_bits", int(self.fraction_bits))  # of numpy, say
        # SPU raises 2 to products of up to 32. With one bit more they overflow: exp(-20) is 9.
        room = self.ring != "FM32" and self.fraction_bits <= half - 4
        if self.exp_mode == "pade" and not room:
            raise ValueError(
                "exp_mode 'pade' is for the ring FM64 with at most 28 fraction bits and FM128 with at most 60, not "
                f"{self.ring} with {self.fraction_bits}: 'taylor' is for all"
            )
        if self.exp_mode == "auto":
            object.__setattr__(self, "exp_mode", "pade" if room else "taylor")

    @property
    def world_size(self) -> int:
        """The number of parties."""
        return get_protocol(self.protocol).num_parties

    @property
    def opens_once(self) -> bool:
        """See Protocol."""
        return get_protocol(self.protocol).opens_once

    @property
    def grouped_products(self) -> bool:
        """Whether many small products are grouped, see Protocol: on a fast line one by one they take less work."""
        return get_protocol(self.protocol).grouped_products and self.network == "wan"

    @property
    def limit(self) -> float:
        """Magnitude at which the encoding of a number saturates: 2^(ring bits - 2 - fraction bits)."""
        return 2.0 ** (RING_BITS[self.ring] - 2 - self.fraction_bits)

    @property
    def product_limit(self) -> float:
        """The same for a product, which has twice the fraction bits until it is truncated."""
        return self.limit / 2.0**self.fraction_bits

    def runtime_config(self) -> spu.RuntimeConfig:
        """The same as SPU's RuntimeConfig, with its profile on and its operations one after another.

        SPU's inter- and intra-op parallelism stay off: on, they took the same time on two cores, and added up to 84 %
        to the counted send actions.
        """
        from flaxmpc.secure._spu import load_spu

        spu = load_spu()
        config = spu.RuntimeConfig(
            protocol=spu.parse_protocol_kind(self.protocol),
            field=spu.parse_field_type(self.ring),
            fxp_fraction_bits=self.fraction_bits,
        )
        config.enable_pphlo_profile = True
        config.fxp_exp_mode = getattr(spu.RuntimeConfig, EXP_MODES[self.exp_mode])
        return config
