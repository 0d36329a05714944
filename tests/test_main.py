"""The process of the command line, as a shell starts it: what interrupts, pipes and full disks do to it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# Tables, JSON, Markdown, and what the parser of arguments prints.
PRINTING = (("zoo", "list"), ("zoo", "list", "--json"), ("zoo", "show"), ("--version",), ("--help",))
# Says when signals are looked after: before, it is Python that starts.
READY = "from flaxmpc import __main__ as m; run = m._run; m._run = lambda: (print(flush=True), run())[1]; m.main()"


@pytest.fixture(scope="module", autouse=True)
def shipped_zoo():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLAXMPC_ZOO", raising=False)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("COLUMNS", "80")
        patch.delenv("PYTHONUNBUFFERED", raising=False)  # what is printed may fail when it is flushed
        yield


def start(*arguments, code=None, **options) -> Any:
    command = [sys.executable, *(("-m", "flaxmpc") if code is None else ("-c", code)), *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **{**pipes, **options})


def ended(processes, timeout=120):
    """Exit code and standard error of each."""
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


# ------------------------------------------------------------------------------------------------------------- Ctrl-C


def interrupted(process, seconds):
    """Interrupts so many seconds after it has begun."""
    assert process.stdout.readline() == "\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    return process


def test_an_interrupt_while_it_imports_is_one_line():
    processes = [interrupted(start("cost", "--tokens", 64, code=READY), seconds) for seconds in (0, 0.2, 0.4, 0.8)]
    assert ended(processes) == [(130, "flaxmpc: interrupted\n")] * 4


def test_an_interrupt_while_it_compiles_or_computes_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("FLAXMPC_CACHE", str(tmp_path))
    command = ("cost", "--tokens", 64, "--sentences", 64)
    processes = [interrupted(start(*command, code=READY), seconds) for seconds in (4, 8)]
    assert ended(processes) == [(130, "flaxmpc: interrupted\n")] * 2


def test_an_interrupt_while_training_is_one_line(tmp_path, write_classifier):
    data = tmp_path / "films.csv"
    data.write_text("sentence,label\n" + "".join(f"a film {'very ' * i}good,{i % 2}\n" for i in range(40)))
    encoder = write_classifier(tmp_path / "encoder", attention="softmax", hidden_act="gelu")
    options = ("--encoder", encoder, "--data", data, "--out", tmp_path / "teacher", "--max-length", 16)
    process = start("finetune", *options, "--schedule.epochs", 1000)
    assert any("texts are cut at 16 tokens" in line for line in process.stdout)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    assert ended([process]) == [(130, "flaxmpc: interrupted\n")]


def test_a_background_job_that_ignores_interrupts_goes_on():
    ignoring = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {READY}"
    process = interrupted(start("--version", code=ignoring), 0.2)
    assert ended([process]) == [(0, "")]


# ------------------------------------------------------------------------------------------------------------ streams


def test_a_reader_that_has_seen_enough_is_no_error():
    processes = [start(*arguments) for arguments in PRINTING]
    for process in processes:
        process.stdout.close()
        process.stdout = None
    assert ended(processes) == [(1, "")] * len(PRINTING)


def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        found = ended([start(*arguments, stdout=full) for arguments in (PRINTING[0], PRINTING[1], PRINTING[-1])])
    for code, error in found:
        assert code == 2
        assert error.startswith("flaxmpc: ")
        assert error.endswith("No space left on device\n")
        assert error.count("\n") == 1


def test_closed_streams():
    command = f"exec {sys.executable} -m flaxmpc"
    shell = "import os, sys; os.execvp('sh', ['sh', '-c', sys.argv[1]])"
    endings = ("--version >&-", "--version >&- 2>&-", "nothing 2>&-")
    processes = [start(f"{command} {ending}", code=shell) for ending in endings]
    assert ended(processes) == [(2, "flaxmpc: standard output is closed\n"), (2, ""), (2, "")]


def test_the_module_runs_as_the_command(tmp_path):
    done = subprocess.run([sys.executable, "-m", "flaxmpc", "infre"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("flaxmpc: unknown command 'infre'. Did you mean 'infer'? Known: ")
    assert os.listdir(tmp_path) == []
