"""The child process of a party that holds SPU, as its supervisor sees it; `flaxmpc.secure.deploy.worker` runs in it."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

from flaxmpc.secure._spu import thread_limit
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.errors import WorkerLost


class WorkerProcess:
    """A child process that holds SPU; commands take turns.

    Its folder for files goes with it: `kill` removes it, and the worker itself where its supervisor was killed.
    """

    def __init__(self, parties: int):
        """`parties`: how many are on this machine, and share its cores."""
        ours, theirs = socket.socketpair()
        package_root = Path(__file__).parents[3]
        paths = [str(package_root), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._directory = tempfile.TemporaryDirectory(prefix="flaxmpc-party-", ignore_cleanup_errors=True)
        arguments = [str(theirs.fileno()), self._directory.name]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "flaxmpc.secure.deploy.worker", *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **thread_limit(parties), "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C is the supervisor's to handle
            )
        self._pipe = Connection(ours.detach())
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def call(self, command: m.Command, timeout: float) -> m.Answer:
        """Gives the worker a command, and returns its answer.

        Raises:
            WorkerLost: it ended meanwhile, or took longer than `timeout` seconds and was ended.
        """
        with self._lock:
            # A frozen process takes no bytes either, so the bound is not on the answer alone.
            bound = threading.Timer(timeout, self.kill)
            end = time.monotonic() + timeout
            bound.start()
            try:
                self._pipe.send_bytes(m.encode(command))
                return m.decode(self._pipe.recv_bytes(), m.Answer)
            except (EOFError, OSError) as error:
                self.kill()
                ended = f"the worker's process ended (exit code {self._process.returncode})"
                late = time.monotonic() >= end
                raise WorkerLost(f"no answer in time, within {timeout:g} s" if late else ended) from error
            finally:
                bound.cancel()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._directory.cleanup()
