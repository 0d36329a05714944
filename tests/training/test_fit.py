"""The training loop on a least-squares problem: y = x W, x given as the attention mask."""

import dataclasses
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmpc.data.batches import Batch
from flaxmpc.training.checkpoint import Checkpoints
from flaxmpc.training.fit import Objective, Schedule, fit, merge, partition

PARAMS = {
    "bert": {"embeddings": {"table": np.full((4, 1), 0.5, np.float32)}, "layer": {"w": np.zeros((4, 1), np.float32)}},
    "head": {"b": np.zeros(1, np.float32)},
}
SCHEDULE = Schedule(epochs=4, learning_rate=0.3, batch_size=6, checkpoint_every=5)


def loss(params, batch, key):
    table, w = params["bert"]["embeddings"]["table"], params["bert"]["layer"]["w"]
    noise = 0.01 * jax.random.normal(key)  # so that a resumed run needs the right key of each step
    output = (batch.input_ids @ (w + table) + params["head"]["b"])[:, 0] + noise
    value = jnp.square(output - batch.label).mean()
    return value, {"error": jnp.sqrt(value)}


def epoch_batches(epoch):
    """Four batches, others in every epoch."""
    rng = np.random.default_rng(epoch)
    for _ in range(4):
        x = rng.integers(0, 3, (6, 4)).astype(np.int32)
        label = x @ np.array([1, -2, 3, 0]) + 1
        yield Batch(x, np.ones_like(x), np.zeros_like(x), label, np.ones(6, np.float32), np.arange(6))


def train(folder, schedule=SCHEDULE, **options):
    own = {"loss": loss, "frozen": "bert/embeddings/", **options}
    seed, batches_of = own.pop("seed", 0), own.pop("epoch_batches", epoch_batches)
    return fit(Objective(**own), PARAMS, batches_of, schedule, folder, seed=seed)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder and the parameters of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("run")
    return folder, train(folder, evaluate=lambda params: {"bias": float(params["head"]["b"][0])})


def test_the_loss_falls(run):
    losses = [record["loss"] for record in records(run[0])]
    assert losses[-1] < losses[0] / 2


def test_what_is_frozen_stays_as_it_was(run):
    _, params = run
    np.testing.assert_array_equal(params["bert"]["embeddings"]["table"], PARAMS["bert"]["embeddings"]["table"])
    assert (params["bert"]["layer"]["w"] != 0).all()
    assert (params["head"]["b"] != 0).all()


def test_every_epoch_is_a_line_of_metrics(run):
    folder, params = run
    lines = records(folder)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert all(line.keys() == {"name", "epoch", "seconds", "loss", "error", "bias"} for line in lines)
    assert lines[-1]["bias"] == pytest.approx(params["head"]["b"][0])


def test_a_finished_run_is_not_run_again(run):
    folder, params = run
    before = records(folder)
    assert same(train(folder), params)
    assert records(folder) == before


def test_the_seed_of_dropout_counts(run, tmp_path):
    assert not same(train(tmp_path, seed=1), run[1])


# Runs until the loss is asked for step `kill_at`, then gets a signal that nothing can catch.
KILLED = """
import os, signal, sys, time
from pathlib import Path
import jax
import test_fit
folder, kill_at = Path(sys.argv[1]), int(sys.argv[2])
steps = []

def count(epoch):
    for batch in batches(epoch):
        steps.append(epoch)
        if len(steps) > 4 + kill_at:  # `fit` counts the batches of one epoch first
            while not any(path.name.isdigit() for path in folder.glob("checkpoints/*")):  # written in the background
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch

batches, test_fit.epoch_batches = test_fit.epoch_batches, count
test_fit.train(folder)
"""


@pytest.mark.parametrize("kill_at", [7, 13])
def test_a_killed_run_goes_on_to_the_same_parameters(kill_at, run, tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(kill_at)]
    killed = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert kept
    assert kept[-1] <= kill_at
    assert not (tmp_path / "metrics.jsonl").read_text().count('"epoch": 4')

    steps = []

    def spy(params, batch, key):
        jax.debug.callback(lambda: steps.append(1))
        return loss(params, batch, key)

    params = train(tmp_path, loss=spy)
    jax.effects_barrier()
    assert len(steps) == 16 - kept[-1]
    assert same(params, run[1])
    assert [record["epoch"] for record in records(tmp_path)] == [1, 2, 3, 4]


def test_a_run_that_was_killed_at_any_moment_goes_on_to_the_same_parameters(run, tmp_path, monkeypatch):
    """What a kill leaves is what the disk holds then: looked at before files are made whole, moved and removed."""
    folder, seen, rng = tmp_path / "run", [], np.random.default_rng()

    def watched(call):
        def looked(what, *arguments, **options):
            if rng.random() < (0.05 if call is fsync else 0.5):
                copy = tmp_path / f"killed{rng.integers(1 << 60)}"
                try:
                    shutil.copytree(folder, copy)
                    seen.append(copy)
                except (shutil.Error, OSError):  # what a thread that goes on meanwhile took away: no moment of a kill
                    pass
            return call(what, *arguments, **options)

        return looked

    fsync = os.fsync
    with monkeypatch.context() as patch:
        for module, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (shutil, "rmtree")):
            patch.setattr(module, name, watched(getattr(module, name)))
        params = train(folder, evaluate=third_weight, choose_by="third")
    assert same(params, run[1])
    assert len(seen) > 20
    for copy in rng.choice(seen, 4, replace=False):
        assert same(train(copy, evaluate=third_weight, choose_by="third"), run[1]), copy
        assert [record["epoch"] for record in records(copy)] == [1, 2, 3, 4]


def damage(step: Path) -> None:
    path = max((path for path in (step / "default").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_trained_again_from_the_one_before(run, tmp_path, capsys):
    folder = shutil.copytree(run[0], tmp_path / "run")
    damage(folder / "checkpoints" / "16")
    assert same(train(folder), run[1])
    assert f"{folder}/checkpoints/16/default/" in capsys.readouterr().out
    assert [record["epoch"] for record in records(folder)] == [1, 2, 3, 4]
    for step in (folder / "checkpoints").iterdir():
        damage(step)
    with pytest.raises(
        ValueError, match=rf"checkpoints/15/default/.* is not as it was written, .*: remove {folder}, and"
    ):
        train(folder)


@pytest.mark.parametrize("lost", ["damaged", "removed"])
def test_without_the_best_epoch_nothing_else_is_returned(lost, tmp_path):
    options = {"evaluate": third_weight, "choose_by": "third"}
    train(tmp_path, **options)
    if lost == "damaged":
        damage(tmp_path / "best" / "3")
    else:
        shutil.rmtree(tmp_path / "best" / "3")
    with pytest.raises(ValueError, match=rf"{tmp_path}.*: remove {tmp_path}, and"):
        train(tmp_path, **options)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    def evaluate(params):
        with pytest.raises(ValueError, match=f"^process {os.getpid()} on .* writes to {tmp_path / 'run'}: wait"):
            train(tmp_path / "run")
        return {}

    train(tmp_path / "run", evaluate=evaluate)
    assert not (tmp_path / "run.lock").exists()


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    def diverges(params, batch, key):
        value, metrics = loss(params, batch, key)
        return jnp.where((batch.input_ids == third).all(), jnp.nan, value), metrics

    third = list(epoch_batches(0))[2].input_ids
    with pytest.raises(FloatingPointError, match=r"^toy: the loss is nan at step 2; a lower learning rate than 0\.3"):
        train(tmp_path / "toy", loss=diverges)


@pytest.mark.parametrize("bad", [0, 3, 4, 6])
def test_no_state_after_a_step_that_went_wrong_is_kept(bad, tmp_path):
    """Metrics are read when the next step has started; before a checkpoint they are waited for."""
    wrong = [batch for epoch in (0, 1) for batch in epoch_batches(epoch)][bad].input_ids

    def diverges(params, batch, key):
        value, metrics = loss(params, batch, key)
        return jnp.where((batch.input_ids == wrong).all(), jnp.nan, value), metrics

    schedule = dataclasses.replace(SCHEDULE, checkpoint_every=1)
    with pytest.raises(FloatingPointError, match=f"the loss is nan at step {bad};"):
        train(tmp_path / "run", schedule, loss=diverges)
    with Checkpoints(tmp_path / "run" / "checkpoints") as kept:
        assert kept.step() == (bad or -1)
    assert len(records(tmp_path / "run")) == bad // 4
    whole = train(tmp_path / "whole", schedule)
    assert same(train(tmp_path / "run", schedule), whole)  # from that checkpoint on, with a loss that is right


def test_batches_are_prepared_while_devices_compute(tmp_path):
    prepared = []

    def prepare(batch):
        prepared.append(threading.current_thread())
        return batch

    train(tmp_path / "run", prepare=prepare)
    assert len(prepared) == 16
    assert threading.main_thread() not in prepared
    assert not any(thread.is_alive() for thread in prepared)


def test_what_fails_while_a_batch_is_prepared_ends_the_run(tmp_path):
    def prepare(batch):
        raise RuntimeError(f"no memory for {len(batch.label)} rows")

    with pytest.raises(RuntimeError, match=r"^no memory for 6 rows$"):
        train(tmp_path / "run", prepare=prepare)
    assert not (tmp_path / "run.lock").exists()


def test_what_is_prepared_on_a_device_does_not_go_through_the_host(tmp_path, monkeypatch):
    def from_the_host(*_):
        raise AssertionError("it was on a device")

    monkeypatch.setattr(jax, "make_array_from_process_local_data", from_the_host)
    train(tmp_path / "run", prepare=lambda batch: jax.tree.map(jnp.asarray, batch))


def test_the_loss_gets_what_is_prepared_of_a_batch(tmp_path):
    def to_target(params, prepared, key):
        batch, target = prepared
        return jnp.square(params["head"]["b"] - target).mean() + 0.0 * batch.label.sum(), {}

    def prepare(batch):
        return batch, np.full((6, 1), 7.0, np.float32)

    params = train(tmp_path, loss=to_target, prepare=prepare, frozen="bert/")
    assert params["head"]["b"][0] > 0.5
    assert same(params["bert"], PARAMS["bert"])


def test_the_best_epoch_is_returned_also_after_a_restart(run, tmp_path):
    by_epoch = []

    def evaluate(params):
        by_epoch.append(params)
        return {"figure": [0.5, 0.9, 0.9, 0.2][len(by_epoch) - 1]}

    found = train(tmp_path, evaluate=evaluate, choose_by="figure")
    assert len(by_epoch) == 4
    assert same(found, by_epoch[2])
    assert not same(found, run[1])
    assert same(train(tmp_path, evaluate=evaluate, choose_by="figure"), found)
    assert same(by_epoch[3], run[1])


@pytest.mark.parametrize("stopped", [2, 4])
def test_a_run_that_was_killed_while_an_epoch_was_evaluated_evaluates_it_again(stopped, run, tmp_path):
    asked = []

    def evaluate(params):
        asked.append(params)
        if len(asked) == stopped:
            raise KeyboardInterrupt
        return third_weight(params)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, evaluate=evaluate, choose_by="third")
    assert same(train(tmp_path, evaluate=evaluate, choose_by="third"), run[1])
    assert same(asked[stopped - 1], asked[stopped])
    assert [record["epoch"] for record in records(tmp_path)] == [1, 2, 3, 4]
    assert all("loss" in record for record in records(tmp_path))


def test_no_epochs_leave_the_parameters_as_they_are(tmp_path):
    assert same(train(tmp_path / "none", dataclasses.replace(SCHEDULE, epochs=0)), PARAMS)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", -1),
        *(("learning_rate", value) for value in (0.0, -1e-3, math.inf, math.nan)),
        *(("warmup", value) for value in (-0.1, 1.0, 8, math.nan)),
        *(("weight_decay", value) for value in (-0.1, math.inf)),
        ("clip_norm", 0.0),
        ("batch_size", 0),
        ("checkpoint_every", 0),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} of a schedule is {value:g}, not "):
        dataclasses.replace(SCHEDULE, **{field: value})


@pytest.mark.parametrize("lengths", [(), (0, 16), (-1,), (32, 16), (16, 16)])
def test_lengths_that_cannot_be_are_refused(lengths):
    with pytest.raises(ValueError, match=r"^padded_lengths of a schedule is .*, not numbers from 1, ascending$"):
        dataclasses.replace(SCHEDULE, padded_lengths=lengths)


def test_another_type_of_numbers_is_refused():
    with pytest.raises(ValueError, match=r"^unknown dtype of a schedule 'bfloat61'.*Did you mean 'bfloat16'"):
        dataclasses.replace(SCHEDULE, dtype="bfloat61")


# Trains the toy on two devices, of this process or of two, and writes its parameters.
ON_TWO_DEVICES = """
import json, sys
from pathlib import Path
import jax
import test_fit
from flaxmpc.training.hosts import Hosts
folder, address = Path(sys.argv[1]), sys.argv[2:]
if address:
    Hosts(address[0], 2, int(address[1])).join()
assert jax.device_count() == 2, jax.devices()
params = test_fit.train(folder, evaluate=test_fit.third_weight, choose_by="third")
(folder / "found.json").write_text(json.dumps([float(x) for leaf in jax.tree.leaves(params) for x in leaf.ravel()]))
"""


def third_weight(params):
    """Grows from epoch to epoch, so the last is the best."""
    return {"third": float(params["bert"]["layer"]["w"][2, 0])}


def environment(**variables):
    here = Path(__file__).parent
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])]), **variables}


def on_two_hosts(*folders):
    """Trains on two processes, each with its folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    commands = [[sys.executable, "-c", ON_TWO_DEVICES, str(own), address, str(i)] for i, own in enumerate(folders)]
    hosts = [subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        for host in hosts:
            _, errors = host.communicate(timeout=120)
            assert host.returncode == 0, errors
    finally:
        for host in hosts:
            host.kill()
            host.communicate()


def assert_close(run, folder):
    found = json.loads((folder / "found.json").read_text())
    np.testing.assert_allclose(found, [x for leaf in jax.tree.leaves(run[1]) for x in leaf.ravel()], atol=1e-4)


def assert_close_curves(run, folder):
    curves = [[record["loss"] for record in records(path)] for path in (folder, run[0])]
    np.testing.assert_allclose(curves[0], curves[1], atol=1e-4)


def test_two_devices_follow_the_same_loss_curve(run, tmp_path):
    two = environment(XLA_FLAGS="--xla_force_host_platform_device_count=2")
    subprocess.run([sys.executable, "-c", ON_TWO_DEVICES, str(tmp_path)], env=two, check=True)
    assert_close(run, tmp_path)
    assert_close_curves(run, tmp_path)


def test_two_hosts_follow_the_same_loss_curve_and_the_first_keeps_it(run, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    on_two_hosts(first, second)
    assert_close(run, first)
    assert_close_curves(run, first)
    assert (first / "found.json").read_text() == (second / "found.json").read_text()
    assert [path.name for path in (second / "checkpoints").iterdir()] == []


def test_two_hosts_go_on_from_what_the_first_kept(run, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"

    def three_epochs(epoch):
        if epoch == 3:
            raise KeyboardInterrupt
        return epoch_batches(epoch)

    with pytest.raises(KeyboardInterrupt):
        train(first, epoch_batches=three_epochs, evaluate=third_weight, choose_by="third")
    on_two_hosts(first, second)
    assert_close(run, first)
    assert [record["epoch"] for record in records(second)] == [4]  # the checkpoint is of the end of the third


def test_a_batch_that_the_devices_do_not_divide_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    with pytest.raises(ValueError, match="batch_size 6 is not a multiple of the 4 devices"):
        train(tmp_path)


def test_the_rate_warms_up_and_goes_to_zero():
    """AdamW moves a parameter by the rate itself where every gradient is the same."""
    optimizer: Any = Schedule(epochs=1, learning_rate=0.1, warmup=0.25, weight_decay=0.0).optimizer(20)
    params = {"b": jnp.zeros(1)}
    state, rates = optimizer.init(params), []
    for _ in range(20):
        updates, state = optimizer.update({"b": jnp.ones(1)}, state, params)
        rates.append(-float(updates["b"][0]))
    cosine = [0.05 * (1 + np.cos(np.pi * step / 15)) for step in range(15)]
    np.testing.assert_allclose(rates, [0, 0.02, 0.04, 0.06, 0.08, *cosine], atol=1e-4)


def test_only_matrices_decay():
    optimizer: Any = Schedule(epochs=1, learning_rate=0.1, weight_decay=0.5).optimizer(2)
    params = {"matrix": jnp.ones((2, 2)), "vector": jnp.ones(2)}
    zero, state = jax.tree.map(jnp.zeros_like, params), optimizer.init(params)
    _, state = optimizer.update(zero, state, params)  # at rate 0
    updates, _ = optimizer.update(zero, state, params)
    assert (updates["matrix"] < 0).all()
    assert (updates["vector"] == 0).all()


def test_partition_and_merge_are_inverse():
    trainable, frozen = partition(PARAMS, "bert/embeddings/")
    assert set(trainable) == {"bert/layer/w", "head/b"}
    assert set(frozen) == {"bert/embeddings/table"}
    assert same(merge(trainable, frozen), PARAMS)
