"""What goes between owner, client, parties and a party's own worker: a declared schema in MessagePack, no pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from flaxmpc.errors import brief

Positive = Annotated[int, Meta(ge=1)]
Name = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[\w.\-]+\Z")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Facts = dict[str, str]


def check_name(name: str) -> None:
    """ValueError: it can't be a model's."""
    try:
        msgspec.convert(name, Name)
    except msgspec.ValidationError as error:
        allowed = "1 to 128 letters, digits, '_', '-' and '.'"
        raise ValueError(f"a model's name has {allowed}, not {brief(name)}: give one with --name") from error


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What all messages are."""


T = TypeVar("T", bound=Message)
_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def digest(*parts: bytes) -> str:
    """SHA-256 of the parts and their lengths, in hex."""
    result = hashlib.sha256()
    for part in parts:
        result.update(len(part).to_bytes(8, "little"))
        result.update(part)
    return result.hexdigest()


def difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """What differs between two parties' facts, in one line; empty if nothing does."""
    keys = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    return ", ".join(f"{key} {theirs.get(key, 'none')[:40]!r} against {ours.get(key, 'none')[:40]!r}" for key in keys)


class Share(Message, frozen=True):
    """One party's share of a value, as SPU's Share has it."""

    meta: bytes
    chunks: list[bytes]

    @classmethod
    def pack(cls, share: Any) -> Share:
        """From an spu Share."""
        return cls(share.meta, list(share.share_chunks))

    def unpack(self) -> Any:
        """To an spu Share."""
        from spu import libspu

        share = libspu.Share()
        share.meta, share.share_chunks = self.meta, self.chunks
        return share

    @property
    def nbytes(self) -> int:
        return len(self.meta) + sum(map(len, self.chunks))


class Array(Message, frozen=True):
    """Shape, dtype and visibility of an array; its visibility says nothing for a result."""

    shape: tuple[int, ...]
    dtype: str
    visibility: str = "secret"


class Program(Message, frozen=True):
    """A compiled function of a model's weights and a request's inputs.

    Attributes:
        code: SPU's.
        inputs: what a client shares, in order, after the weights.
        outputs: what it gets.
        batch, length: sentences, and tokens of each, for the parties' limits.
        joint: the same function of several requests at once, by their number: the weights, the first's inputs, the
            second's, and so on; the outputs likewise.
    """

    code: bytes
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    batch: Positive
    length: Positive
    joint: dict[Annotated[int, Meta(ge=2)], bytes] = {}

    @property
    def digest(self) -> str:
        """Of all of it: what a party approves. The code says what weights it takes."""
        return digest(encode(self))


class Signature(Message, frozen=True):
    """A Program without its code."""

    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    batch: int
    length: int


class Model(Message, frozen=True):
    """What a party says of a model that it holds shares of.

    Attributes:
        hash: of this put: weights with a salt, programs and bundle. Two puts of one model differ.
        bundle: hash of what clients need in the clear.
        bundle_bytes: its size.
        programs: by name.
    """

    hash: str
    bundle: Digest
    bundle_bytes: int
    programs: dict[str, Signature]


class Empty(Message, frozen=True):
    pass


class Status(Message, frozen=True):
    """How a party is: `state` is "ready" when its group has formed, else what it waits for."""

    rank: int
    session: str
    state: str
    facts: Facts
    models: dict[str, Model]


class Piece(Message, frozen=True):
    """Part of a stream: of a value's share, of a program's code, or of a bundle.

    `meta` comes with the first piece of a share's chunk.
    """

    name: Name
    content: bytes
    meta: bytes | None = None


class Names(Message, frozen=True):
    session: str
    names: list[Name]


class Stored(Message, frozen=True):
    """Header of a stream of values, held for an owner's lease."""

    session: str
    lease: Name


class Lease(Message, frozen=True):
    """The owner needs what it holds under this name as long as it waits for the answer; or, at its end, no more."""

    session: str
    lease: Name
    ends: bool = False


class Publish(Message, frozen=True):
    """Makes stored values a put of a model, which is served after `Switch`.

    It goes without the programs' code; that follows, and then the bundle, in a stream.
    """

    session: str
    lease: Name
    name: Name
    hash: Name
    weights: list[Name]
    programs: dict[Name, Program]


class Switch(Message, frozen=True):
    """A put takes the place of the one before. The owner asks party 0, and that the others; none: not after all."""

    session: str
    hash: Name | None


class Run(Message, frozen=True):
    """The owner runs a program on what it stored, and keeps the outputs there for its lease."""

    session: str
    lease: Name
    id: Name
    inputs: list[Name]
    outputs: list[Name]


class Infer(Message, frozen=True):
    """A client asks a model; one party's shares of the inputs follow in a stream, named "0", "1", ... in order."""

    session: str
    id: Name
    model: Name
    hash: str
    program: Name


class OpProfile(Message, frozen=True):
    count: int
    seconds: float
    bytes_sent: int
    rounds: int


class Answer(Message, frozen=True):
    """How a run ended at one party.

    Attributes:
        error: in one line; None if it went well.
        in_step: whether the party still agrees with the others on where they are.
        shares: of the outputs, for the client that asked.
        seconds, bytes_sent, rounds, ops: what it cost at this party.
    """

    error: str | None = None
    in_step: bool = True
    shares: tuple[Share, ...] = ()
    seconds: float = 0.0
    bytes_sent: int = 0
    rounds: int = 0
    ops: dict[str, OpProfile] = {}


class Form(Message, frozen=True):
    """Party 0 asks the others to start a session, and to serve these puts, by the model's name, from their disks."""

    session: str
    facts: Facts
    models: dict[Name, Name]


class Key(Message, frozen=True):
    """Which request: an id is its caller's own.

    Attributes:
        caller: the common name of the certificate that it came with; every party reads that for itself.
        id: what the caller calls it.
    """

    caller: str
    id: Name


class Turn(Message, frozen=True):
    """Requests that party 0 asks for, or gives a turn, together; and those that still wait there."""

    session: str
    requests: list[Key]
    waiting: list[Key] = []


# To and from a party's worker process, over a pipe of its own.


class Join(Message, frozen=True, tag=True):
    addresses: tuple[str, ...]
    rank: int
    session: str
    protocol: str
    ring: str
    fraction_bits: int
    exp_mode: str
    timeout_ms: int
    facts: Facts


class Put(Message, frozen=True, tag=True):
    name: str
    share: Share


class Fetch(Message, frozen=True, tag=True):
    name: str


class Delete(Message, frozen=True, tag=True):
    names: list[str]


class Execute(Message, frozen=True, tag=True):
    """Runs a program if all parties have the same facts; without facts this party has no such request.

    `given` are stored under the last of the input names and deleted after; with `answer`, the outputs are returned
    and deleted too. `takes` says what each that is given must be, and `gives`, with `answer`, what the outputs are.
    """

    facts: Facts | None
    code: bytes = b""
    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()
    given: Sequence[Share] = ()
    takes: Sequence[Array] = ()
    answer: bool = False
    gives: Sequence[Array] = ()


Command = Join | Put | Fetch | Delete | Execute
