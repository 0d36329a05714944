"""The one place that touches what SPU keeps per process: its import, its log and its errors."""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import ctypes
import functools
import os
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any


class SecureError(RuntimeError):
    """What went wrong inside SPU, in one line; SPU's own exception is its `__cause__`."""

    @classmethod
    def wrap(cls, doing: str, error: BaseException, diagnostics: str = "") -> SecureError:
        """`error` while `doing` something, without SPU's stack trace.

        `diagnostics` is what the compiler printed meanwhile: its first error names the operation.
        """
        found = re.search(r"error: (.+)", diagnostics) or re.search(r"^\s*\[[^\]]*\]\s*(.+)", str(error), re.MULTILINE)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return cls(f"{doing} failed: {found.group(1) if found else lines[0]}")


THREAD_LIMIT = "OMP_THREAD_LIMIT"


def thread_limit(parties: int) -> dict[str, str]:
    """The environment in which SPU takes no more threads than cores, `parties` of it being on this machine.

    SPU multiplies matrices with more threads than a small machine has cores, and they wait for one another in a loop:
    on two cores, three parties, 128 x 768 by 768 x 128 took 0.19 s in place of 0.02 s. A limit that is set stays.
    """
    return {THREAD_LIMIT: os.environ.get(THREAD_LIMIT) or str(max(1, (os.cpu_count() or 1) // parties))}


_loaded: concurrent.futures.Future[ModuleType] = concurrent.futures.Future()
_load_lock = threading.Lock()


def load_spu() -> ModuleType:
    """The module spu, imported without its warnings, with its log off the terminal, and with as many threads as fit.

    In one process all parties run, so three.
    """
    if not _loaded.done():
        threading.Thread(target=_load, name="flaxmpc-spu", daemon=True).start()
    return _loaded.result()


def _load() -> None:
    """Loads spu, and stays: what SPU's links say of their caller lies on the stack of the thread that imported it.

    When that thread ends its stack goes, and the next use of a link reads what is no memory any more.
    """
    with _load_lock:
        if _loaded.done():
            return
        try:
            with warnings.catch_warnings(), _environment(thread_limit(3)):
                warnings.simplefilter("ignore")
                import spu

                _log()
            _loaded.set_result(spu)
        except BaseException as error:
            _loaded.set_exception(error)
            return
    threading.Event().wait()


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """With environment variables that a library reads when it is loaded, and that others are not to see."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@functools.cache
def _log() -> int:
    """File descriptor of SPU's log, set up on the first call.

    The file has no name any more, so nothing is left behind however the process ends.
    """
    from spu import libspu

    fd, path = tempfile.mkstemp(prefix="flaxmpc-spu-", suffix=".log")
    options = libspu.logging.LogOptions()
    options.enable_console_logger = False
    options.system_log_path = path
    options.max_log_file_size = 1 << 60  # never rotated: a rotation would go by the name
    libspu.logging.setup_logging(options)
    os.unlink(path)
    return fd


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_log.cache_clear)  # parent and child would write to one log


@functools.cache
def _scratch() -> str:
    path = tempfile.mkdtemp(prefix="flaxmpc-spu-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


_scratch_lock = threading.Lock()
_CLONE_FS = 0x200


def leave_working_directory() -> None:
    """Gives the calling thread a working directory of its own, one for the process, that is removed at its end.

    SEMI2K keeps what it opened in files, and only the working directory says where. Linux alone can do this, and may
    not be allowed to in a container; elsewhere the files (BeaverCache.*) are in the process's working directory.
    """
    unshare = getattr(ctypes.CDLL(None), "unshare", None)
    if unshare is not None and unshare(_CLONE_FS) == 0:
        with _scratch_lock:  # the cache alone would let two threads make one each
            path = _scratch()
        os.chdir(path)


class LogReader:
    """Reads what SPU logged since `recorded_log` was entered."""

    def __init__(self, fd: int):
        self._fd = fd

    def text(self) -> str:
        """All that was logged since; SPU flushes every line."""
        return os.pread(self._fd, os.fstat(self._fd).st_size, 0).decode(errors="replace")


# Held by who writes to SPU's log, or reads it.
log_lock = threading.Lock()


@contextlib.contextmanager
def recorded_log() -> Iterator[LogReader]:
    """Owns SPU's log: it is one per process and does not say which runtime wrote a line, so runs take turns."""
    with log_lock:
        fd = _log()
        os.ftruncate(fd, 0)  # SPU appends, so that its next line starts at 0 again
        yield LogReader(fd)


_stderr_lock = threading.Lock()


def compile_source(source: Any, options: Any) -> bytes:
    """The code of an spu.CompilationSource, with spu.CompilerOptions.

    SPU prints why it refuses a program to file descriptor 2 itself; that is caught, and is the error's message. If all
    goes well it prints nothing; what came meanwhile is then another thread's, and is passed on.

    Raises:
        SecureError: SPU refuses the program; one line, which names the operation.
    """
    from spu import libspu

    # No generator makes a context of this: an interrupt at its `yield` would leave the descriptor where it is.
    with _stderr_lock, tempfile.TemporaryFile() as file:
        reader = LogReader(file.fileno())
        kept = os.dup(2)
        try:
            os.dup2(file.fileno(), 2)
            code = libspu.compile(source, options)
        except RuntimeError as error:
            raise SecureError.wrap("compiling", error, reader.text()) from error
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        os.write(2, reader.text().encode())
        return code
