"""Named entities in tags of words: B-kind begins one, I-kind goes on with it, O is in none."""

from collections.abc import Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """An entity: its kind, and its words from `start` to `end`, which is the first that is not its own."""

    kind: str
    start: int
    end: int


def spans(tags: Sequence[str]) -> list[Span]:
    """The entities of a text, from the tag of every word.

    As conlleval and seqeval's default read them: an I- that follows no tag of its kind begins an entity, too; and so
    does a tag that has neither prefix.
    """
    found: list[Span] = []
    for place, tag in enumerate(tags):
        if tag == "O":
            continue
        prefix, kind = (tag[:2], tag[2:]) if tag[:2] in ("B-", "I-") else ("", tag)
        goes_on = prefix != "B-" and found and found[-1].end == place and found[-1].kind == kind
        if goes_on:
            found[-1] = found[-1]._replace(end=place + 1)
        else:
            found.append(Span(kind, place, place + 1))
    return found
