"""README's deployment section as a new user tries it: every line a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest


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
    model = write_classifier(tmp_path / "made").rename(tmp_path / "tiny")

    def done(*arguments: str) -> str:
        process = start(*arguments)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out

    begin = time.monotonic()
    assert "ABY3, 3 parties; start them: flaxmpc cluster up demo" in done("cluster", "init", "demo")
    up = start("cluster", "up", "demo")
    assert "tiny: 1 programs (1x16), hash" in done("put", str(model), "--cluster", "demo", "--lengths", "16")
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
