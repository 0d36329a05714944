"""What a process keeps to itself, and what it leaves when it is killed; of real parties too."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clusters import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

CRASH = """
import os, resource
from flaxmpc.secure.deploy.process import hide_memory
most = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (most, most))
hide_memory()
os.abort()
"""


def test_a_crash_leaves_no_core_file(tmp_path):
    ended = subprocess.run([sys.executable, "-c", CRASH], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ended.returncode == -signal.SIGABRT
    assert list(tmp_path.iterdir()) == []


COMMANDS = """
import ctypes, sys
from flaxmpc.cli import main as cli
for command in (["party", "--rank", "0"], ["put", "nothing"], ["infer", "a text"]):
    ctypes.CDLL(None).prctl(4, 1)
    try:
        cli.main([*command, "--cluster", sys.argv[1]])
    except SystemExit:
        print(command[0], ctypes.CDLL(None).prctl(3))
"""


def test_who_holds_texts_weights_or_shares_hides_them_before_anything_else(tmp_path):
    command = [sys.executable, "-c", COMMANDS, str(tmp_path / "no cluster")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["party 0", "put 0", "infer 0"]


# Runs before anything else in a supervisor and, as sitecustomize, in its worker: says when its memory is hidden.
WATCH = """
import ctypes, os, threading, time
def watch():
    while ctypes.CDLL(None).prctl(3):
        time.sleep(0.01)
    open(os.path.join({folder!r}, "hidden." + str(os.getpid())), "w").close()
threading.Thread(target=watch, daemon=True).start()
"""
SUPERVISOR = """
import os, resource
most = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (most, most))
os.environ |= {environment!r}
"""


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_parties_leave_no_cores_keys_or_folders(mortal, tmp_path):
    watch = WATCH.format(folder=str(tmp_path))
    for name in ("python", "temporary"):
        (tmp_path / name).mkdir()
    (tmp_path / "python" / "sitecustomize.py").write_text(watch)
    key = secrets.token_hex(32)
    environment = {
        "PYTHONPATH": str(tmp_path / "python"), "TMPDIR": str(tmp_path / "temporary"), "FLAXMPC_SHARES_KEY": key,
    }  # fmt: skip
    mortal.restart(2, code=SUPERVISOR.format(environment=environment) + watch)
    mortal.wait_for(2, "session")
    supervisor, worker = mortal.processes[2].pid, mortal.worker_of(2)
    for pid in (supervisor, worker):
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert "Max core file size        0                    0" in limits
        until((tmp_path / f"hidden.{pid}").exists)
    with contextlib.suppress(PermissionError):  # for any but root
        environment = Path(f"/proc/{worker}/environ").read_bytes()
        assert b"FLAXMPC_SHARES_KEY" not in environment
        assert key.encode() not in environment
        assert b"TMPDIR" in environment  # it is read as it should
    folders = [path.name for path in (tmp_path / "temporary").iterdir()]
    assert len(folders) == 1
    assert folders[0].startswith("flaxmpc-party-")
    mortal.kill(2)
    until(lambda: list((tmp_path / "temporary").iterdir()) == [])
    until(lambda: not Path(f"/proc/{worker}").exists())
