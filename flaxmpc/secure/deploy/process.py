"""Keeps the memory of a process that holds shares, keys or inputs to itself."""

import ctypes
import os
import resource
import sys

_PR_SET_DUMPABLE = 4


def hide_memory() -> None:
    """Sees that a crash leaves no core file, and that this user's other processes don't look into this one (Linux).

    A limit of core files is not enough: Linux does not ask it where cores go to a program.
    Processes that this one starts have the limit, and look after the rest themselves.

    Raises:
        OSError: the system refuses.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_DUMPABLE, *(ctypes.c_ulong(0),) * 4):
            number = ctypes.get_errno()
            raise OSError(number, f"this process can't be made to leave no core files: {os.strerror(number)}")
