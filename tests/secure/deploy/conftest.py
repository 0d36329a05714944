"""The clusters that the tests of a deployment share."""

import pytest
from clusters import SHORT, TIMEOUT, publish


@pytest.fixture(scope="session")
def parties(running, tmp_path_factory):
    """A cluster that tests leave as they found it, or heal."""
    some = [('# clients = ["client", "client.NAME"]', 'clients = ["client", "client.alice"]')]
    with running(tmp_path_factory.mktemp("cluster") / "c", timeout=TIMEOUT, changes=some) as started:
        yield started


@pytest.fixture(scope="session")
def shaken(running, tmp_path_factory):
    """A cluster for `mortal`."""
    with running(tmp_path_factory.mktemp("shaken") / "c", timeout=SHORT) as started:
        yield started


@pytest.fixture
def mortal(shaken):
    """A cluster whose parties tests may end or start otherwise; all run, but they hold nothing."""
    shaken.restore()
    return shaken


@pytest.fixture(scope="session")
def owner(parties):
    with parties.connect() as connected:
        publish(connected)
        yield connected


@pytest.fixture(scope="session")
def client(parties, owner):
    with parties.connect("client") as connected:
        yield connected
