"""Real party processes on loopback: what they compute, whom they serve, and how every fault ends."""

import base64
import concurrent.futures
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from clusters import ROOT, SHORT, TIMEOUT, W, X, affine, ask, check_served, publish

from flaxmpc import secure
from flaxmpc.secure._spu import load_spu
from flaxmpc.secure.deploy import certificates, rpc, server, streams
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.certificates import Authority
from flaxmpc.secure.deploy.cluster import ClusterFile, Identity, split
from flaxmpc.secure.deploy.local import issue_client, write_local


def long(x):
    for _ in range(250):
        x = x @ x * 0.001
    return x


def party_process(cluster: ClusterFile, rank: int) -> subprocess.CompletedProcess:
    """A party that is expected to end at once."""
    command = [sys.executable, "-m", "flaxmpc", "party", "--cluster", str(cluster.path), "--rank", str(rank)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


# ------------------------------------------------------------------------------------------------------- what it is for


def test_jit_runs_on_a_cluster(owner):
    f = secure.jit(affine, parties=owner)
    weights = owner.put(W)
    y, cost = f.run(weights, X)
    np.testing.assert_allclose(y, X * 3 + 1, atol=1e-3)
    in_process = secure.jit(affine, "ABY3").run(W, X).cost
    assert (cost.bytes_sent, cost.rounds) == (in_process.bytes_sent, in_process.rounds)
    assert len(cost.bytes_sent_per_party) == 3


def test_a_client_asks_a_model(client):
    np.testing.assert_allclose(ask(client), X * 3 + 1, atol=1e-3)


def test_the_bundle_is_what_the_owner_gave(client):
    assert client.bundle(*client.find(None)) == b"public " * 3


def test_a_warm_request_sends_the_inputs_shares_and_little_more(client):
    ask(client)
    before = client.bytes_sent
    ask(client)
    shares = 3 * 2 * 8 * X.size  # ABY3: two of three 64-bit parts at each party
    assert shares < client.bytes_sent - before < shares + 65536


def test_clients_at_once_get_their_own_answers(parties, owner):
    results: dict[int, np.ndarray] = {}

    def work(number: int) -> None:
        with parties.connect("client") as own:
            for i in range(5):
                results[number * 5 + i] = ask(own, X + number * 5 + i)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    for number, y in results.items():
        np.testing.assert_allclose(y, (X + number) * 3 + 1, atol=1e-3)


def test_requests_that_wait_run_together_and_each_client_gets_its_own(parties, owner):
    clients = [parties.connect("client") for _ in range(3)]
    _, model = clients[0].find("affine")
    assert model.programs["2x4"].batch == 2
    barrier = threading.Barrier(12)
    results: dict[int, np.ndarray] = {}

    def work(number: int) -> None:
        barrier.wait()
        results[number] = ask(clients[number % 3], X + number)

    end = time.monotonic() + 60
    together: list[dict] = []
    while not together:  # whether they wait is a matter of time
        assert time.monotonic() < end
        seen = len(parties.events(0, "run"))
        threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, y in results.items():
            np.testing.assert_allclose(y, (X + number) * 3 + 1, atol=1e-3)
        runs = parties.events(0, "run")[seen:]
        assert sum(run["requests"] for run in runs) == 12
        assert {run["requests"] for run in runs} <= {1, 2, 4}  # of 2 rows; at most 8 run together
        together = [run for run in runs if run["requests"] > 1]
    for connected in clients:
        connected.close()


def test_dropped_values_are_freed_with_the_next_use(owner):
    resident = owner.put(np.ones(3, np.float32))
    name = resident.names[0]
    np.testing.assert_allclose(owner.open(name), 1, atol=1e-4)
    del resident
    owner.put(1.0)
    with pytest.raises(secure.SecureError, match=r"party . holds 1 of the values no more"):
        owner.open(name)


def test_a_model_keeps_its_weights_when_the_owner_drops_them(parties, client):
    with parties.connect() as other:
        publish(other)
        other.put(1.0)
    np.testing.assert_allclose(ask(client), X * 3 + 1, atol=1e-3)


def test_health_and_metrics(parties, client):
    ask(client)
    for entry in parties.cluster.party:
        with urllib.request.urlopen(f"http://{entry.metrics}/health", timeout=5) as response:
            assert json.load(response) == {"state": "ready"}
        with urllib.request.urlopen(f"http://{entry.metrics}/metrics", timeout=5) as response:
            values = dict(line.split() for line in response.read().decode().splitlines() if line[0] != "#")
        assert float(values["flaxmpc_requests_total"]) >= 1
        for counted in ("run_seconds", "bytes_sent", "rounds"):
            assert float(values[f"flaxmpc_{counted}_total"]) > 0
        assert "flaxmpc_failures_total" in values
        assert float(values["flaxmpc_ready"]) == 1
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://{entry.metrics}/other", timeout=5)


def test_a_program_that_fails_everywhere_leaves_the_shares(parties, owner, client):
    import jax

    loop = secure.jit(lambda x: jax.lax.while_loop(lambda v: v.sum() < 100, lambda v: v * 2, x), parties=owner)
    session = owner.session
    failures = parties.metrics(0)["flaxmpc_failures_total"]
    with pytest.raises(secure.SecureError, match="While with secret condition is not supported"):
        loop(X)
    assert parties.metrics(0)["flaxmpc_failures_total"] == failures + 1
    assert owner.session == session
    np.testing.assert_allclose(ask(client), X * 3 + 1, atol=1e-3)


# ------------------------------------------------------------------------------------------------------- who may what


@pytest.mark.parametrize(
    "method",
    ["store", "fetch", "delete", "lease", "publish", "commit", "run", "form", "has", "step", "promise", "switch"],
)
def test_a_client_may_only_ask(client, method):
    messages = {
        "store": m.Stored(client.session, "l"),
        "fetch": m.Names(client.session, ["x"]),
        "delete": m.Names(client.session, ["x"]),
        "lease": m.KeepLease(client.session, "l"),
        "publish": m.Publish(client.session, "l", "x", "h", [], {}),
        "commit": m.Switch(client.session, "h"),
        "run": m.RunProgram(client.session, "l", "x", [], []),
        "form": m.Form("s", {}, {}),
        "has": m.Turn("s", [m.Key("client", "x")]),
        "step": m.Turn("s", [m.Key("client", "x")]),
        "promise": m.Switch("s", "h"),
        "switch": m.Switch("s", "h"),
    }
    peer = client._peers[0]
    if server.METHODS[method].stream:
        future = peer.send_later(method, messages[method], ())
    else:
        future = peer.ask_later(method, messages[method])
    with pytest.raises(Exception, match=f"a client may not ask for '{method}'"):
        future.result()


def test_the_owner_does_not_order_the_parties(owner):
    orders = {"form": m.Form("s", {}, {}), "promise": m.Switch("s", "h"), "switch": m.Switch("s", "h")}
    for method, order in orders.items():
        with pytest.raises(Exception, match=f"a owner may not ask for '{method}'"):
            owner._peers[1].ask(method, order, m.Empty)


def test_what_is_not_of_the_schema_is_refused(client):
    channel = client._peers[0]._channel
    for content in (
        b"",
        b"\x00\xff garbage",
        b"\x81\xa2\xff\xfe\x01",
        msgspec.msgpack.encode({"session": 3}),
        os.urandom(1000),
    ):
        with pytest.raises(Exception, match="not of the schema"):
            channel.unary_unary("/flaxmpc.Party/infer")(content)


def test_an_answer_that_is_not_of_the_schema_names_the_party(client, monkeypatch):
    garbled: concurrent.futures.Future[bytes] = concurrent.futures.Future()
    garbled.set_result(b"\x81\xa2\xff\xfe\x01")
    monkeypatch.setattr(client._peers[2], "ask_later", lambda *_: garbled)
    with pytest.raises(secure.SecureError, match=r"party 2 at .* answered what is not of the schema: all need the"):
        client._peers.statuses()


def test_more_than_the_limit_is_refused(owner, client, parties):
    name, model = client.find("affine")
    with pytest.raises(ValueError, match="takes"):
        client.infer(name, model, "2x4", np.ones((3, 4), np.float32))
    with pytest.raises(secure.SecureError, match=r"has no program '9x9': more or larger rows than it was put for"):
        client._run("infer", m.Infer(client.session, "a", name, model.hash, "9x9"), [()] * 3)
    weights = owner.put(W)
    too_long = {"1x4096": m.ModelProgram(b"", (), (), 1, 4096)}
    with pytest.raises(secure.SecureError, match="1x4096 is for 1 rows of size 4096, the limit is 32 of size 512"):
        owner.publish("big", weights, too_long, b"")
    too_many = {"33x16": m.ModelProgram(b"", (), (), 33, 16)}
    with pytest.raises(secure.SecureError, match="33x16 is for 33 rows of size 16, the limit is 32 of size 512"):
        owner.publish("big", weights, too_many, b"")
    too_many_together = {"2x16": m.ModelProgram(b"", (), (), 2, 16, {8: b""})}
    with pytest.raises(secure.SecureError, match="joins 8 requests of 2 rows, the limit is max_batch_rows 8"):
        owner.publish("big", weights, too_many_together, b"")
    header = m.Infer(client.session, "b", name, model.hash, "2x4")
    for share, refused in (
        ({"0": m.Share(b"meta", [bytes(193)])}, "the share of '0' is larger than 192 bytes"),
        ({"0": m.Share(b"", [b""] * 65)}, "the share of '0' has 0 bytes of meta and 65 chunks"),
        ({"1": m.Share(b"", [b""])}, "input '1' is not one of 1"),
        ({}, "0 inputs, 1 are needed"),
    ):
        with pytest.raises(secure.SecureError, match=refused):
            client._run("infer", header, [streams.of_shares(share) for _ in range(3)])
    np.testing.assert_allclose(ask(client), X * 3 + 1, atol=1e-3)


# ---------------------------------------------------------------------------------------------- disagreement of parties


def sent(model: m.Publish) -> tuple[m.Publish, Iterator[m.Piece]]:
    """As `publish` sends it, without a bundle."""
    header, contents = streams.of_model(model, b"")
    return header, streams.of_contents(contents)


def test_another_program_at_one_party_is_refused_with_the_difference(owner, client):
    weights = owner.put(W)
    programs = [secure.jit(f, parties=owner).compile(weights, X) for f in (affine, lambda w, x: x @ w - 1)]
    array = m.Array(X.shape, "float32")
    for rank, peer in enumerate(owner._peers):
        program = m.ModelProgram(programs[rank == 2].code, (array,), (array,), 2, 4)
        header = m.Publish(owner.session, owner._lease, "affine", "same", weights.names, {"2x4": program})
        peer.send_later("publish", *sent(header)).result()
    owner._peers[0].ask("commit", m.Switch(owner.session, "same"), m.Empty)
    model = m.PublicModel("same", "", 0, {"2x4": m.ModelProgram(b"", (array,), (array,), 2, 4)})
    with pytest.raises(
        secure.SecureError, match=r"party 2 differs from party 0: program '[0-9a-f]+' against '[0-9a-f]+'"
    ):
        client.infer("affine", model, "2x4", X)
    publish(owner)
    np.testing.assert_allclose(ask(client), X * 3 + 1, atol=1e-3)


def test_a_request_that_one_party_was_not_sent_ends(owner, client):
    name, model = client.find("affine")
    start = time.monotonic()
    header = m.RunProgram(owner.session, owner._lease, "lonely", [], [])
    future = owner._peers[0].send_later("run", header, streams.of_contents([b""]))
    answer = m.decode(future.result(timeout=60), m.Answer)
    assert answer.error is not None
    assert "was not sent this request" in answer.error
    assert time.monotonic() - start < TIMEOUT
    np.testing.assert_allclose(ask(client), X * 3 + 1, atol=1e-3)
    assert client.find("affine") == (name, model)


@pytest.mark.parametrize("what", ["garbage", "a larger one"])
def test_a_client_that_sends_one_party_another_share_costs_the_others_nothing(client, what):
    name, model = client.find("affine")
    session = client.session
    shares = client._io.make_shares(X, load_spu().parse_visibility("VIS_SECRET"))
    sent = [m.Share.pack(share) for share in shares]
    if what == "garbage":
        sent[1] = m.Share(b"garbage", [b"\xff"])
        refused = "input 0: its meta is none that SPU writes"
    else:
        sent[1] = m.Share(sent[1].meta, sent[1].chunks * 3)
        refused = "the share of '0' is larger than 192 bytes"
    with pytest.raises(secure.SecureError, match=refused):
        client._run(
            "infer",
            m.Infer(session, what.replace(" ", "-"), name, model.hash, "2x4"),
            [streams.of_shares({"0": share}) for share in sent],
        )
    np.testing.assert_allclose(ask(client), X * 3 + 1, atol=1e-3)
    assert client.session == session


@pytest.mark.parametrize(
    ("how", "difference"),
    [
        ("config", "exp_mode 'taylor' against 'pade', fraction_bits '17' against '18'"),
        ("spu", "spu '0.0.1' against '[0-9.a-z]+'"),
        ("flaxmpc", "flaxmpc '0.0.1' against '[0-9.a-z]+'"),
    ],
)
def test_another_config_or_version_at_one_party_is_refused(mortal, how, difference):
    if how == "config":
        other = mortal.changed("other.toml", ("fraction_bits = 18", 'fraction_bits = 17\nexp_mode = "taylor"'))
        mortal.restart(2, path=other.path)
    else:
        changed = f"h.versions = lambda: real() | {{'{how}': '0.0.1'}}"
        code = f"import flaxmpc.secure.deploy.host as h; real = h.versions; {changed}"
        mortal.restart(2, code=code)
    mortal.wait_for(2, "serving")
    refused_within(mortal, f"party 2 differs from party 0: {difference}")
    mortal.restore()
    check_served(mortal)


# --------------------------------------------------------------------------------------------------- parties that fail


def refused_within(parties, reason: str) -> None:
    """Nobody can connect, for `reason`, soon said by all that are there."""
    end = time.monotonic() + 60
    while True:
        start = time.monotonic()
        with pytest.raises(secure.SecureError) as error:
            secure.Cluster(parties.cluster, "owner")
        assert time.monotonic() - start < 4 * SHORT + 10
        if re.search(reason, str(error.value)):
            return
        assert time.monotonic() < end, error.value


def test_a_party_that_is_absent_at_start_is_named_and_waited_for(mortal):
    mortal.kill(2)
    mortal.restart(0, 1)
    refused_within(mortal, r"^party 2 at 127.0.0.1:\d+ can't be reached")
    mortal.restore()
    check_served(mortal)


@contextlib.contextmanager
def long_run(parties, owner: secure.Cluster):
    """A run of some seconds in the background; yields what it raises."""
    f = secure.jit(long, parties=owner)
    x = np.full((32, 32), 0.1, np.float32)
    f.compile(x)
    errors: list[Exception] = []

    def work() -> None:
        try:
            f(x)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    parties.wait_for_requests(1)
    time.sleep(0.3)
    assert thread.is_alive()
    yield errors
    thread.join(300)
    assert not thread.is_alive()


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("what", ["worker", "party"])
def test_a_kill_in_the_middle_of_a_run_ends_it_and_put_heals(mortal, rank, what):
    with mortal.connect() as owner:
        publish(owner)
        resident = owner.put(W)
        with long_run(mortal, owner) as errors:
            start = time.monotonic()
            if what == "worker":
                os.kill(mortal.worker_of(rank), signal.SIGKILL)
            else:
                mortal.kill(rank)
        assert time.monotonic() - start < 4 * SHORT + 10
        (error,) = errors
        assert isinstance(error, secure.SecureError)
        assert "\n" not in str(error)
        assert f"party {rank}" in str(error)
        mortal.restore()
        again = r"was a party restarted\? The owner puts it again"
        with mortal.connect("client") as client, pytest.raises(secure.SecureError, match=again):
            ask(client)
        with pytest.raises((ValueError, secure.SecureError), match=r"started anew.* put them again"):
            secure.jit(affine, parties=owner)(resident, X)
        check_served(mortal)


def test_a_party_that_is_frozen_is_bounded(mortal):
    with mortal.connect() as owner:
        publish(owner)
        os.kill(mortal.worker_of(1), signal.SIGSTOP)
        start = time.monotonic()
        with mortal.connect("client") as client, pytest.raises(secure.SecureError, match=r"[Tt]imeout|in time|lost"):
            ask(client)
        assert time.monotonic() - start < 4 * SHORT + 10
    with mortal.connect() as owner:
        os.kill(mortal.worker_of(1), signal.SIGSTOP)
        with pytest.raises(secure.SecureError, match=r"put them again|can't be reached|in time"):
            owner.put(np.zeros((256, 256), np.float32))
    check_served(mortal)


def test_a_run_that_another_party_ended_says_why(mortal):
    with mortal.connect() as owner:
        publish(owner)
    os.kill(mortal.worker_of(1), signal.SIGSTOP)
    with mortal.connect("client") as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, client)
        mortal.wait_for_requests(1)
        os.kill(mortal.worker_of(0), signal.SIGKILL)
        with pytest.raises(secure.SecureError, match="lost"):
            asked.result()
    check_served(mortal)
    errors = [event["error"] for event in mortal.events(1, "run") if event["error"]]
    assert errors[-1] == "party 0 lost this session, and started another"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_host_that_is_frozen_is_bounded(mortal, rank):
    with mortal.connect() as owner:
        publish(owner)
    with mortal.connect("client") as client:
        name, model = client.find("affine")
        mortal.processes[rank].send_signal(signal.SIGSTOP)
        start = time.monotonic()
        try:
            with pytest.raises(secure.SecureError, match=f"party {rank}"):
                client.infer(name, model, "2x4", X)
            assert time.monotonic() - start < 4 * SHORT + 10
        finally:
            mortal.processes[rank].send_signal(signal.SIGCONT)
    check_served(mortal)


def test_a_slow_party_is_waited_for(parties, client):
    worker = parties.worker_of(1)
    os.kill(worker, signal.SIGSTOP)
    timer = threading.Timer(2.0, os.kill, (worker, signal.SIGCONT))
    timer.start()
    try:
        np.testing.assert_allclose(ask(client), X * 3 + 1, atol=1e-3)
    finally:
        timer.join()


class Throttle:
    """A TCP proxy that takes all to `target` at so many bytes a second in all."""

    def __init__(self, target: tuple[str, int]):
        self.bytes_per_second = 1e9
        self._target = target
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._spawn(self._accept)

    def _spawn(self, target, *args: socket.socket) -> None:
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._server.accept()
                self._open.append(here)
                there = socket.create_connection(self._target)
                self._open.append(there)
                self._spawn(self._copy, here, there)
                self._spawn(self._copy, there, here)

    def _copy(self, source: socket.socket, to: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(1024):
                with self._lock:
                    time.sleep(len(content) / self.bytes_per_second)
                to.sendall(content)
        for end in (source, to):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for end in (self._server, *self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in (self._server, *self._open):
            end.close()


def test_a_party_behind_a_thin_line_is_waited_for_or_given_up(mortal):
    with contextlib.closing(Throttle(split(mortal.cluster.party[2].link))) as line:
        other = mortal.changed("other.toml", (mortal.cluster.party[2].link, line.address))
        mortal.restart(0, 1, path=other.path)
        with mortal.connect() as owner:
            publish(owner)
            line.bytes_per_second = 50e3
            with mortal.connect("client") as client:
                np.testing.assert_allclose(ask(client), X * 3 + 1, atol=1e-3)
            line.bytes_per_second = 200
            start = time.monotonic()
            with (
                mortal.connect("client") as client,
                pytest.raises(secure.SecureError, match=r"[Tt]imeout|in time|lost|has not asked"),
            ):
                ask(client)
            assert time.monotonic() - start < 4 * SHORT + 10
        line.bytes_per_second = 1e9
        check_served(mortal)


def test_a_client_that_reaches_one_party_too_late_is_told(parties, owner):
    with contextlib.closing(Throttle(split(parties.cluster.party[2].control))) as line:
        other = parties.changed("thin.toml", (parties.cluster.party[2].control, line.address))
        with secure.Cluster(other, "client") as client:
            np.testing.assert_allclose(ask(client), X * 3 + 1, atol=1e-3)
            name, model = client.find("affine")
            line.bytes_per_second = 50
            start = time.monotonic()
            with pytest.raises(secure.SecureError, match="party 2 was not sent this request"):
                client.infer(name, model, "2x4", X)
            assert time.monotonic() - start < 4 * TIMEOUT
            line.bytes_per_second = 1e9
    np.testing.assert_allclose(ask(owner), X * 3 + 1, atol=1e-3)


def test_sigterm_finishes_the_running_request_first(mortal):
    def long_affine(w, x):
        return x + x @ long(w)

    with mortal.connect() as owner:
        w, x = np.full((32, 32), 0.1, np.float32), np.ones((1, 32), np.float32)
        weights = owner.put(w)
        owner.publish("long", weights, {"1x32": owner.program(long_affine, weights, x, length=32)}, b"")
    answers = []
    with mortal.connect("client") as client:
        name, model = client.find("long")
        thread = threading.Thread(target=lambda: answers.append(client.infer(name, model, "1x32", x).outputs[0]))
        thread.start()
        mortal.wait_for_requests(1)
        time.sleep(0.3)
        assert thread.is_alive()
        for process in mortal.processes.values():
            process.terminate()
        assert [process.wait(300) for process in mortal.processes.values()] == [0, 0, 0]
        thread.join(60)
    np.testing.assert_allclose(answers, [x], atol=1e-3)
    for rank in range(3):
        assert mortal.events(rank, "stopped")
        assert mortal.events(rank, "run")[-1]["error"] is None


@pytest.mark.parametrize("port", ["control", "link", "metrics"])
def test_a_port_that_is_taken_is_named(tmp_path, port):
    cluster = write_local(tmp_path / "c")
    address = getattr(cluster.party[1], port)
    with socket.create_server(split(address)):
        ended = party_process(cluster, 1)
    assert ended.returncode == 2
    assert f"party 1 can't listen on its {port} {address}" in ended.stderr


# --------------------------------------------------------------------------------------------------- clients that fail


def test_a_client_that_is_killed_costs_the_others_nothing(parties, client):
    script = (
        "import sys, threading, numpy as np; from flaxmpc import secure\n"
        "c = secure.Cluster(sys.argv[1], 'client'); name, model = c.find('affine')\n"
        "ask = lambda: [c.infer(name, model, '2x4', np.ones((2, 4), np.float32)) for _ in range(1000)]\n"
        "[threading.Thread(target=ask).start() for _ in range(3)]; print('asking', flush=True)"
    )
    command = [sys.executable, "-c", script, str(parties.cluster.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"asking\n"
        time.sleep(1)
        process.kill()
    start = time.monotonic()
    np.testing.assert_allclose(ask(client), X * 3 + 1, atol=1e-3)
    assert time.monotonic() - start < TIMEOUT


def brpc_push() -> bytes:
    """What SPU's link takes as a message of rank 1, as JSON over HTTP."""
    body = json.dumps(
        {"sender_rank": 1, "key": "root:0:ALLGATHER", "value": base64.b64encode(b"forged").decode(), "trans_type": 1}
    )
    return (
        "POST /yacl.link.transport.internal.ReceiverService/Push HTTP/1.1\r\nHost: x\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


@pytest.mark.parametrize("port", ["control", "link"])
@pytest.mark.parametrize("content", [b"\x00" * 64, os.urandom(4096), b"GET / HTTP/1.1\r\n\r\n", brpc_push()])
def test_garbage_plain_text_and_a_forged_push_get_no_answer(parties, client, port, content):
    for entry in parties.cluster.party:
        answer = b""
        connection = socket.create_connection(split(getattr(entry, port)), timeout=5)
        with contextlib.suppress(ConnectionError), connection:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(65536)
        assert not answer or answer[0] == 0x15  # a TLS alert, nothing else
    np.testing.assert_allclose(ask(client), X * 3 + 1, atol=1e-3)


def tls(cluster: ClusterFile, certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cluster.file(cluster.ca))
    context.load_cert_chain(certificate, key)
    return context


@pytest.fixture(scope="module")
def strangers(parties, tmp_path_factory):
    """Certificates that are no party's: of another authority, expired, a client's, and the party's own."""
    directory = tmp_path_factory.mktemp("strangers")
    other = directory / "other"
    other.mkdir()
    authority = Authority()
    authority.write(other)
    authority.issue(other, "party1", server=True)
    authority.issue(other, "client", server=False)
    return {
        "wrong CA": other / "party1",
        "a client": parties.directory / "client",
        "the owner": parties.directory / "owner",
        "itself": parties.directory / "party0",
    }


@pytest.mark.parametrize("who", ["wrong CA", "a client", "the owner", "itself"])
def test_the_tunnel_takes_only_another_partys_certificate(parties, client, strangers, who):
    stem = strangers[who]
    context = tls(parties.cluster, stem.with_suffix(".pem"), stem.with_suffix(".key"))
    answer = b""
    plain = socket.create_connection(split(parties.cluster.party[0].link), 5)
    with contextlib.suppress(OSError), plain, context.wrap_socket(plain) as connection:
        connection.sendall(brpc_push())
        answer = connection.recv(65536)
    assert answer == b""
    np.testing.assert_allclose(ask(client), X * 3 + 1, atol=1e-3)


def test_without_a_certificate_there_is_no_way_in(parties):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    for port in ("control", "link"):
        answer = b""
        plain = socket.create_connection(split(getattr(parties.cluster.party[0], port)), 5)
        # In TLS 1.3 the refusal comes after the client's handshake.
        with contextlib.suppress(OSError), plain, context.wrap_socket(plain) as connection:
            connection.sendall(brpc_push())
            answer = connection.recv(100)
        assert answer == b""


@pytest.mark.parametrize("how", ["wrong CA", "expired"])
def test_a_client_with_a_wrong_certificate_is_refused(parties, owner, strangers, tmp_path, how, monkeypatch):
    monkeypatch.setattr(certificates, "check_identity", lambda *_: None)  # it would not even try
    short = msgspec.structs.replace(parties.cluster, timeout_seconds=1.0)
    if how == "wrong CA":
        stem = strangers["wrong CA"].with_name("client")
    else:
        authority = Authority.read(parties.directory)
        authority.issue(tmp_path, "client", server=False, valid=-datetime.timedelta(minutes=5))
        stem = tmp_path / "client"
    identity = msgspec.structs.replace(
        short.identity("client"), certificate=str(stem.with_suffix(".pem")), key=str(stem.with_suffix(".key"))
    )
    start = time.monotonic()
    with pytest.raises(secure.SecureError, match=r"^party \d at 127.0.0.1:\d+ can't be reached"):
        secure.Cluster(msgspec.structs.replace(short, client=identity), "client")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("which", ["another party's", "expired"])
def test_a_party_with_a_wrong_certificate_is_refused(mortal, which):
    if which == "expired":
        stem = mortal.directory / "expired" / "party2"
        stem.parent.mkdir()
        Authority.read(mortal.directory).issue(stem.parent, "party2", server=True, valid=-datetime.timedelta(minutes=5))
    else:
        stem = mortal.directory / "misled" / "party2"
        stem.parent.mkdir()
        for suffix in (".pem", ".key"):
            shutil.copy(mortal.directory / f"party1{suffix}", stem.with_suffix(suffix))
    careless = "from flaxmpc.secure.deploy import certificates\ncertificates.check_party = lambda *_: None"
    other = mortal.changed(
        "other.toml",
        ('"party2.pem"', f'"{stem.with_suffix(".pem")}"'),
        ('"party2.key"', f'"{stem.with_suffix(".key")}"'),
    )
    # Where it is expired all parties name it, and so does the owner: it is refused for its age alone.
    mortal.restart(*((0, 1, 2) if which == "expired" else (2,)), path=other.path, code=careless)
    mortal.wait_for(2, "serving")
    refused_within(mortal, r"party 2 at \S+ can't be reached: its TLS certificate or ours is refused")
    with contextlib.suppress(OSError), socket.create_connection(split(mortal.cluster.party[0].link), 5) as plain:
        context = tls(mortal.cluster, stem.with_suffix(".pem"), stem.with_suffix(".key"))
        with context.wrap_socket(plain) as connection:
            connection.sendall(brpc_push())
            answer = connection.recv(65536)
        assert answer == b"" or which != "expired"
    mortal.restore()
    check_served(mortal)


def test_a_client_that_is_not_in_the_list_is_refused(parties, client):
    for name, allowed in (("alice", True), ("bob", False)):
        certificate = issue_client(parties.directory, name)
        identity = Identity(certificate=str(certificate), key=str(certificate.with_suffix(".key")))
        cluster = msgspec.structs.replace(parties.cluster, client=identity)
        if allowed:
            with secure.Cluster(cluster, "client") as connected:
                np.testing.assert_allclose(ask(connected), X * 3 + 1, atol=1e-3)
        else:
            short = msgspec.structs.replace(cluster, timeout_seconds=1.0)
            refused = r"'client\.bob' is not one of the clients that cluster.toml allows"
            with pytest.raises(secure.SecureError, match=refused):
                secure.Cluster(short, "client")


def test_a_role_is_the_whole_of_its_name(parties, tmp_path):
    """The authority signed them; but what only begins like a role, or hides a second name, is nobody."""
    authority = Authority.read(parties.directory)
    names = ("owner.bob", "owner\n", "Owner", "client\n", "client.alice\n", "client.", "clients", "leader", "party0")
    for name in names:
        authority.issue(tmp_path, name, server=False)
        identity = Identity(certificate=str(tmp_path / f"{name}.pem"), key=str(tmp_path / f"{name}.key"))
        peer = rpc.Peer(parties.cluster, identity, parties.cluster.party[1])
        for method, message in (("status", m.Empty()), ("delete", m.Names("s", [])), ("bundle", m.Names("s", []))):
            with pytest.raises(Exception, match=f"a stranger may not ask for '{method}'"):
                peer.ask(method, message, m.Empty, timeout=10)
        peer.close()


def test_another_authority_at_a_client_is_noticed(parties, strangers, monkeypatch):
    monkeypatch.setattr(certificates, "check_identity", lambda *_: None)  # it would not even try
    other = msgspec.structs.replace(
        parties.cluster, timeout_seconds=1.0, ca=str(strangers["wrong CA"].with_name("ca.pem"))
    )
    with pytest.raises(secure.SecureError, match=r"can't be reached: its TLS certificate or ours is refused"):
        secure.Cluster(other, "client")


def test_a_missing_key_is_named(parties, tmp_path):
    for name in ("cluster.toml", "ca.pem", "client.pem"):
        shutil.copy(parties.directory / name, tmp_path / name)
    with pytest.raises(ValueError, match=r"names .*client.key: No such file"):
        secure.Cluster(tmp_path, "client")


# --------------------------------------------------------------------------------------------------------- two parties


def test_semi2k_demands_to_be_allowed(tmp_path):
    ended = party_process(write_local(tmp_path / "c", "SEMI2K"), 0)
    assert ended.returncode == 2
    assert "That party can compute every secret" in ended.stderr
    assert "--allow-insecure-dealer" in ended.stderr


def test_a_party_that_allows_it_says_what_that_means(tmp_path):
    cluster = write_local(tmp_path / "c", "SEMI2K")
    command = [sys.executable, "-m", "flaxmpc", "party", "--cluster", str(cluster.path), "--rank", "0"]
    with subprocess.Popen([*command, "--allow-insecure-dealer"], cwd=ROOT, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        said = json.loads(process.stderr.readline())
        assert said["event"] == "insecure_dealer"
        assert "That party can compute every secret" in said["meaning"]
        while json.loads(process.stderr.readline())["event"] != "serving":
            pass
        process.terminate()
        assert process.wait(60) == 0


@pytest.mark.parametrize("protocol", ["SEMI2K", "CHEETAH"])
def test_two_parties(running, tmp_path, protocol):
    """With SEMI2K over IPv6 too, where this machine has that."""
    changes = []
    if protocol == "SEMI2K":
        with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
            changes = [("127.0.0.1", "[::1]")]
    with running(tmp_path / "c", protocol=protocol, timeout=20, changes=changes) as parties:
        check_served(parties)
        assert parties.metrics(1)["flaxmpc_ready"] == 1
        if protocol == "SEMI2K":
            with parties.connect() as owner:
                resident = owner.put(np.eye(64, dtype=np.float32))
                runs = [
                    secure.jit(lambda a, b: a @ b, parties=owner).run(resident, np.ones((64, 2), np.float32))
                    for _ in range(2)
                ]
            assert runs[0].cost.bytes_sent > 4 * runs[1].cost.bytes_sent  # opened once
            np.testing.assert_allclose(runs[1].output, 1.0, atol=1e-3)
            assert "can compute every secret" in parties.wait_for(0, "insecure_dealer")["meaning"]
    assert not list(ROOT.glob("BeaverCache*"))
