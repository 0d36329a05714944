"""Errors that name the bad value and what is allowed."""

import contextlib
import difflib
import reprlib
from collections.abc import Iterable, Iterator

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 80


def brief(value: object) -> str:
    """`repr` of at most a line: what stands in a file may be long, or nested deeply."""
    return _BRIEF.repr(value)


def listed(names: Iterable[object]) -> str:
    """Names, each in quotes where it would not be seen; of many the first."""
    shown = [str(name) for name in names]
    plain = [name if name.isprintable() and 0 < len(name.strip()) == len(name) < 80 else brief(name) for name in shown]
    more = f" and {len(plain) - 20} more" if len(plain) > 20 else ""
    return ", ".join(plain[:20]) + more or "none"


def unknown(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name that does not exist: says which do, and the closest."""
    names = sorted(known)
    by_lower = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(str(name)[:80].lower(), by_lower, n=1, cutoff=0.4)
    hint = f" Did you mean {by_lower[close[0]]!r}?" if close else ""
    return ValueError(f"unknown {kind} {brief(name)}.{hint} Known: {', '.join(names)}")


@contextlib.contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Whatever a tokenizer raises becomes a ValueError of one line: `tokenizers` raises Exception, and panics."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic is no Exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{what}: {reason}") from error
