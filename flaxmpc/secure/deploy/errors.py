"""Why a party does not do what it is asked."""

import contextlib
from collections.abc import Iterator

from grpc import StatusCode

STARTED_ANEW = "the parties started anew: shares that they don't keep on disk are gone: ask again, or put them again"


class Refused(Exception):
    """A party does not serve a call; the caller gets the code and the message."""

    def __init__(self, code: StatusCode, message: str):
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def refused_where(kind: type[Exception], code: StatusCode, what: str) -> Iterator[None]:
    """Refuses a call, with `what` and the error, if the block raises an error of this kind."""
    try:
        yield
    except kind as error:
        raise Refused(code, f"{what}: {error}") from error


class WorkerLost(Exception):
    """The worker's process has ended, or was ended because it did not answer in time."""
