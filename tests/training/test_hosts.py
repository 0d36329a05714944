"""What one process can see of several hosts; two processes train in test_fit.py and in tests/cli/test_convert.py."""

from pathlib import Path

import jax
import numpy as np
import pytest

from flaxmpc.convert.configs import FineTuning
from flaxmpc.training import hosts

CONFIG = FineTuning(Path("encoder"), "movie", Path("out"))


def test_alone_a_host_is_the_first_and_keeps_what_it_is_told():
    hosts.Hosts().join()
    assert hosts.first()
    assert hosts.from_first(np.float32(2.0)) == 2.0
    with hosts.kept(CONFIG) as config:
        assert config == CONFIG


def test_another_host_writes_to_a_folder_that_goes(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert not hosts.first()
    with hosts.kept(CONFIG) as config:
        assert (config.encoder, config.data) == (CONFIG.encoder, CONFIG.data)
        assert config.out.parent.is_dir()
        assert config.runs is not None
        assert config.runs.parent == config.out.parent
    assert not config.out.parent.exists()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"num_processes": 2}, "2 hosts need a --coordinator HOST:PORT"),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
            "process_id 2 is not one of the 2 hosts: 0",
        ),
        ({"coordinator": "a:1", "process_id": -1}, "process_id -1"),
    ],
)
def test_hosts_that_cannot_be_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        hosts.Hosts(**bad)


def test_hosts_that_do_not_come_are_an_error_of_the_connection(monkeypatch):
    def never(*_):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out")

    monkeypatch.setattr(jax.distributed, "initialize", never)
    with pytest.raises(ConnectionError, match=r"not all of the 2 hosts came to host0:4321: DEADLINE_EXCEEDED"):
        hosts.Hosts("host0:4321", 2, 1).join()


def test_hosts_that_learn_from_other_data_are_refused(monkeypatch):
    ours = {"data": "00ff", "teacher": "1234"}
    assert hosts.agreed(ours) == ours
    theirs = {"data": np.array([0, 254], np.uint8), "teacher": np.array([0x12, 0x34], np.uint8)}
    monkeypatch.setattr(hosts, "from_first", lambda _: theirs)
    with pytest.raises(ValueError, match="the data of this host and of the first host are not the same"):
        hosts.agreed(ours)
