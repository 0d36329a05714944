"""README's deployment section as a new user tries it: every line a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from flaxmpc.cli import main as cli
from flaxmpc.secure.deploy.local import write_local


@pytest.fixture
def start(tmp_path):
    """start(*arguments) -> the running command, which ends with the test."""
    started = []

    def start_(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "flaxmpc", *arguments]
        environment = os.environ | {"COLUMNS": "80"}
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        started.append(process)
        return process

    yield start_
    for process in started:
        process.terminate()
        process.communicate(timeout=60)


def test_the_four_lines(start, write_classifier, tmp_path):
    model = write_classifier(tmp_path / "made", num_hidden_layers=1).rename(tmp_path / "tiny")

    def done(*arguments: str) -> str:
        process = start(*arguments)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out

    begin = time.monotonic()
    assert "ABY3, 3 parties; start them: flaxmpc cluster up demo" in done("cluster", "init", "demo")
    up = start("cluster", "up", "demo")
    assert "tiny: 1 program (1x16), hash" in done("put", str(model), "--cluster", "demo", "--lengths", "16")
    assert "positive" in (table := done("infer", "A gripping film.", "--cluster", "demo")) or "negative" in table
    print(f"{time.monotonic() - begin:.1f} s")  # under a minute on an idle machine
    answer = json.loads(done("infer", "A gripping film.", "--cluster", "demo", "--model", "tiny", "--json"))
    assert answer["model"] == "tiny"
    assert [result["text"] for result in answer["results"]] == ["A gripping film."]
    assert answer.keys() == {"results", "model", "cost", "versions", "seconds", "bytes_sent"}
    # The only model is meant where none is named; no other one is asked in place of the zoo's default.
    process = start("infer", "good", "--cluster", "demo", "--model", "movie-minilm-l6-2quad-freediv", "--json")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "do not hold model 'movie-minilm-l6-2quad-freediv'" in json.loads(out)["error"]

    up.send_signal(signal.SIGTERM)
    _, log = up.communicate(timeout=60)
    assert up.returncode == 0
    assert sum(json.loads(line)["event"] == "stopped" for line in log.splitlines()) == 3
    assert "gripping" not in log


def test_who_runs_a_party_approves_a_model(write_classifier, tmp_path, capsys):
    model = write_classifier(tmp_path / "made", num_hidden_layers=1).rename(tmp_path / "tiny")
    (model / "model.safetensors").unlink()
    path = write_local(tmp_path / "c").path
    command = ["approve", str(model), "--cluster", str(path), "--lengths", "16"]
    with pytest.raises(SystemExit, match="2"):
        cli.main(command)
    assert 'add the line programs = "programs.txt" above its first [table]' in capsys.readouterr().err
    text = path.read_text()
    path.write_text(text.replace('# programs = "programs.txt"', 'programs = "programs.txt"'))
    assert path.read_text() != text
    for _ in range(2):
        cli.main(command)
        found = re.fullmatch(r"approved 1x16: ([0-9a-f]{64})\n", capsys.readouterr().out)
        assert found
        assert (path.parent / "programs.txt").read_text() == f"{found[1]}  tiny 1x16\n"
