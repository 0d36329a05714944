"""What a process that holds shares, keys or texts keeps to itself."""

from __future__ import annotations

import ctypes
import os
import resource
import sys

_PR_SET_DUMPABLE = 4


def hide_memory() -> None:
    """A crash leaves no core file, and other processes of this user may not look into this one (Linux).

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
