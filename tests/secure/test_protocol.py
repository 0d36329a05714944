import dataclasses
from typing import Any

import numpy as np
import pytest

from flaxmpc import secure


@pytest.mark.parametrize(("name", "parties"), [("REF2K", 1), ("SEMI2K", 2), ("CHEETAH", 2), ("ABY3", 3)])
def test_every_protocol_states_its_parties_and_its_threat_model(name, parties):
    protocol = secure.get_protocol(name)
    assert (protocol.name, protocol.num_parties) == (name, parties)
    assert protocol.threat_model.endswith(".")
    assert secure.Config(name).world_size == parties


def test_semi2k_says_that_the_first_party_sees_all():
    assert "nothing is hidden from it" in secure.get_protocol("SEMI2K").threat_model


def test_unknown_protocol_names_the_closest():
    with pytest.raises(ValueError, match=r"unknown protocol 'aby-3'. Did you mean 'ABY3'\? Known: ABY3, CHEETAH"):
        secure.get_protocol("aby-3")
    with pytest.raises(ValueError, match=r"unknown protocol 'x'\. Known: ABY3,"):
        secure.get_protocol("x")


def test_unknown_ring_and_useless_fraction_bits():
    with pytest.raises(ValueError, match=r"unknown ring 'FM63'.*Did you mean 'FM64'\?"):
        secure.Config(ring="FM63")
    with pytest.raises(ValueError, match=r"unknown network 'wam'\. Did you mean 'wan'"):
        secure.Config(network="wam")
    with pytest.raises(ValueError, match=r"fraction_bits must be in 1\.\.30 with ring FM64, not 31"):
        secure.Config(fraction_bits=31)
    with pytest.raises(ValueError, match=r"fraction_bits must be in 1\.\.14 with ring FM32, not 18"):
        secure.Config(ring="FM32")
    wrong: tuple[Any, ...] = ("18", 18.0, True, None)
    for bits in wrong:
        with pytest.raises(ValueError, match=rf"fraction_bits must be in 1\.\.30 with ring FM64, not {bits!r}$"):
            secure.Config(fraction_bits=bits)
    assert type(secure.Config(fraction_bits=np.int64(20)).fraction_bits) is int  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("ring", "room"), [("FM64", 28), ("FM128", 60), ("FM32", 0)])
def test_exponentials_are_as_exact_as_there_is_room_for(ring, room):
    def chosen(bits, mode="auto"):
        return secure.Config(ring=ring, fraction_bits=bits, exp_mode=mode).exp_mode

    if room:
        assert chosen(room) == chosen(room, "pade") == "pade"
        assert chosen(room, "taylor") == "taylor"
    assert chosen(room + 1) == "taylor"
    with pytest.raises(
        ValueError, match=rf"^exp_mode 'pade' is for .*, not {ring} with {room + 1}: 'taylor' is for all"
    ):
        chosen(room + 1, "pade")


def test_config_is_frozen_and_reaches_spu():
    config = secure.Config("SEMI2K", "FM128", 26)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.ring = "FM64"  # pyright: ignore[reportAttributeAccessIssue]
    runtime = config.runtime_config()
    assert (runtime.protocol.name, runtime.field.name, runtime.fxp_fraction_bits) == ("SEMI2K", "FM128", 26)
    assert runtime.fxp_exp_mode.name == "EXP_PADE"
    assert secure.Config(exp_mode="taylor").runtime_config().fxp_exp_mode.name == "EXP_TAYLOR"
    assert runtime.enable_pphlo_profile
    assert not runtime.experimental_enable_inter_op_par
    assert not runtime.experimental_enable_intra_op_par


def test_limit_of_the_encoding():
    assert secure.Config().limit == 2**44
    assert secure.Config(ring="FM32", fraction_bits=8).limit == 2**22


@pytest.mark.parametrize("setting", ["protocol", "ring", "exp_mode", "network"])
@pytest.mark.parametrize("value", [["FM64"], {}, 64, None])
def test_what_is_no_name_is_refused_as_an_unknown_one(setting, value):
    with pytest.raises(ValueError, match=f"^unknown {setting} "):
        secure.Config(**{setting: value})
