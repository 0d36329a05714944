import json
import re

import pytest

from flaxmpc.training.log import TrainingLog


def log(folder, done=0):
    (folder / "toy").mkdir(exist_ok=True)
    return TrainingLog(folder / "toy", epochs=3, steps_per_epoch=2, batch_size=4, done=done)


def records(folder):
    return [json.loads(line) for line in (folder / "toy" / "metrics.jsonl").read_text().splitlines()]


def test_an_epoch_is_a_line_with_the_means_of_its_steps_and_its_figures(tmp_path, capsys):
    with log(tmp_path) as found:
        for epoch in (1, 2):
            for step in (0, 1):
                found.step(2 * (epoch - 1) + step, {"loss": float(epoch + step)})
            found.epoch(epoch, {"accuracy": epoch / 10})
    lines = records(tmp_path)
    assert all(line.pop("seconds") >= 0 for line in lines)
    assert lines == [
        {"name": "toy", "epoch": 1, "loss": 1.5, "accuracy": 0.1},
        {"name": "toy", "epoch": 2, "loss": 2.5, "accuracy": 0.2},
    ]
    shown = capsys.readouterr().out
    assert "4/6" in shown
    epochs = [line.strip() for line in shown.splitlines() if "epoch" in line]
    assert [re.sub(r"\d+\.\d s$", "0.1 s", line) for line in epochs] == [
        "toy, epoch 1 of 3: loss 1.5000, accuracy 0.1000, 0.1 s",
        "toy, epoch 2 of 3: loss 2.5000, accuracy 0.2000, 0.1 s",
    ]
    assert "sentences/s" in shown


@pytest.mark.parametrize(("done", "kept"), [(1, []), (2, [1]), (3, [1]), (4, [1, 2])])
def test_epochs_after_the_last_checkpoint_are_logged_anew(done, kept, tmp_path):
    with log(tmp_path) as killed:
        for epoch in (1, 2):
            killed.step(0, {"loss": 1.0})
            killed.epoch(epoch, {})
    with log(tmp_path, done):
        pass
    assert [line["epoch"] for line in records(tmp_path)] == kept


def test_metrics_go_to_tensorboard(tmp_path):
    with log(tmp_path) as found:
        found.step(0, {"loss": 1.0})
        found.epoch(1, {"accuracy": 0.5})
    with log(tmp_path, done=2):  # at once: in the same second
        pass
    files = list((tmp_path / "toy" / "tensorboard").glob("events.out.tfevents.*"))
    assert len(files) == 2
    written = b"".join(path.read_bytes() for path in files)
    assert b"train/loss" in written
    assert b"accuracy" in written


@pytest.mark.parametrize("line", ['{"name": "toy", "epo', '{"name": "toy"}', "[1]", '{"epoch": null}'])
def test_a_damaged_line_is_named(line, tmp_path):
    with log(tmp_path) as killed:
        killed.step(0, {"loss": 1.0})
        killed.epoch(1, {})
    with (tmp_path / "toy" / "metrics.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged: remove the line"):
        log(tmp_path, done=2)
