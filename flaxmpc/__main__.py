"""The process of the command line: signals, streams and exit codes. What the commands do stands in `flaxmpc.cli`."""

import atexit
import contextlib
import functools
import gc
import os
import signal
import sys
from typing import Any

# Exit codes: what the user can mend is 2, see `cli.main`; that nobody reads the output any more is 1, as in Python.
_FAILED, _UNREAD, _INTERRUPTED = 2, 1, 128 + signal.SIGINT


def main() -> None:
    """Runs the command of this process, and ends the process. Nothing is imported before: that takes seconds."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as it is in a background job of a script
        # A stream of its own: while SPU computes, what is written to standard error is held back.
        signal.signal(signal.SIGINT, functools.partial(_interrupt, os.dup(sys.stderr.fileno())))
    if sys.stdout is None:  # the next file that is opened would get what libraries print
        print("flaxmpc: standard output is closed", file=sys.stderr)
        raise SystemExit(_FAILED)
    # What tracing a model makes lives on, and each collection looks through all of it: a twentieth of a command's time.
    gc.set_threshold(20_000)
    code = _run()
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the same error comes again at the end
        if not code and not isinstance(error, BrokenPipeError):
            print(f"flaxmpc: standard output: {error.strerror}", file=sys.stderr)
            code = _FAILED
        code = code or _UNREAD
    raise SystemExit(code)


def _run() -> Any:
    """The exit code."""
    try:
        from flaxmpc.cli import main as cli

        cli.main()
    except SystemExit as end:
        return end.code
    except BrokenPipeError:
        return _UNREAD
    return 0


def _interrupt(stderr: int, *_: object) -> None:
    """Ctrl-C: one line, and the process ends where it is; a second one, or 2 seconds, end it whatever it waits for.

    A KeyboardInterrupt would be lost in callbacks, and kill the process where C++ calls Python; and the interpreter's
    own end waits for threads that compute.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(_INTERRUPTED))
    signal.alarm(2)
    show_cursor = b"\x1b[?25h\n" if os.isatty(stderr) else b""  # progress hides it
    with contextlib.suppress(OSError):
        os.write(stderr, show_cursor + b"flaxmpc: interrupted\n")  # print may be at work already
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    atexit._run_exitfuncs()  # temporary files
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
