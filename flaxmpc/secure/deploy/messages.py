"""The messages between owner, client, parties and a party's own worker: a declared schema in MessagePack, no pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from flaxmpc.errors import brief
from flaxmpc.secure.protocol import Config

Positive = Annotated[int, Meta(ge=1)]
Name = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[\w.\-]+\Z")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Facts = dict[str, str]


def check_name(name: str) -> None:
    """ValueError: a model can't have this name."""
    try:
        msgspec.convert(name, Name)
    except msgspec.ValidationError as error:
        allowed = "1 to 128 letters, digits, '_', '-' and '.'"
        raise ValueError(f"a model's name has {allowed}, not {brief(name)}: give one with --name") from error


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The base of all messages."""


T = TypeVar("T", bound=Message)
_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(content: bytes, kind: type[T]) -> T:
    """A message of the schema.

    Raises:
        msgspec.MsgspecError: it is none.
    """
    try:
        return msgspec.msgpack.decode(content, type=kind)
    except UnicodeDecodeError as error:  # msgspec lets it through
        raise msgspec.DecodeError(str(error)) from error


def digest(*parts: bytes) -> str:
    """SHA-256 of the parts and their lengths, in hex."""
    result = hashlib.sha256()
    for part in parts:
        result.update(len(part).to_bytes(8, "little"))
        result.update(part)
    return result.hexdigest()


def difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """The difference between two parties' facts in one line; empty if there is none."""
    keys = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    return ", ".join(f"{key} {theirs.get(key, 'none')[:40]!r} against {ours.get(key, 'none')[:40]!r}" for key in keys)


class Share(Message, frozen=True):
    """One party's share of a value, as SPU's Share has it."""

    meta: bytes
    chunks: list[bytes]

    @classmethod
    def pack(cls, share: Any) -> Share:
        """Makes it of an spu Share."""
        return cls(share.meta, list(share.share_chunks))

    def unpack(self) -> Any:
        """The spu Share that it is."""
        from spu import libspu

        share = libspu.Share()
        share.meta, share.share_chunks = self.meta, self.chunks
        return share


class Array(Message, frozen=True):
    """Shape, dtype and visibility of an array; its visibility says nothing for a result."""

    shape: tuple[int, ...]
    dtype: str
    visibility: str = "secret"


class ModelProgram(Message, frozen=True):
    """A compiled function of a model's weights and a request's inputs.

    Attributes:
        code: the function of one request, in SPU's language; it takes the weights, and then the inputs.
        inputs: the arrays that a client shares.
        outputs: the arrays that it gets.
        batch, length: rows of a request, and size of a row, for the parties' limits.
        joint: code of the same function of several requests at once, by their number: it takes the weights, the first's
            inputs, the second's, and so on; the outputs likewise.
    """

    code: bytes
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    batch: Positive
    length: Positive
    joint: dict[Annotated[int, Meta(ge=2)], bytes] = {}

    @property
    def digest(self) -> str:
        """The hash of all of it, which a party approves. The code says what weights it takes."""
        return digest(encode(self))


class PublicModel(Message, frozen=True):
    """A party's word on a model that it holds shares of.

    Attributes:
        hash: the put's: a hash of its weights, its programs and their names, its bundle, and a salt that only the owner
            knows. Two puts of the same model differ in it.
        bundle: hash of what clients need in the clear.
        bundle_bytes: size of the bundle.
        programs: those that can be asked for, by name; their code stays at the parties.
    """

    hash: str
    bundle: Digest
    bundle_bytes: int
    programs: dict[str, ModelProgram]


class Empty(Message, frozen=True):
    """Nothing to say."""


class Status(Message, frozen=True):
    """A party's state: "ready" when its group has formed, else what it waits for; and the models that it serves."""

    rank: int
    session: str
    state: str
    facts: Facts
    models: dict[str, PublicModel]


class Piece(Message, frozen=True):
    """Part of a stream: of a value's share, of a program's code, or of a bundle.

    `meta` comes with the first piece of a share's chunk.
    """

    name: Name
    content: bytes
    meta: bytes | None = None


class InSession(Message, frozen=True):
    """Something that is asked of a session, by its id; a party refuses what is asked of one that it is not in."""

    session: str


class OfLease(InSession, frozen=True):
    """Something that an owner asks, whose lease holds the values."""

    lease: Name


class Names(InSession, frozen=True):
    """Values, puts or models that something is asked of, by their names."""

    names: list[Name]


class Stored(OfLease, frozen=True):
    """The header of a stream of values, which are held for an owner's lease."""


class KeepLease(OfLease, frozen=True):
    """The owner needs what its lease holds as long as it waits for the answer; or no more, where the lease `ends`."""

    ends: bool = False


class Publish(OfLease, frozen=True):
    """Makes stored values a put of a model, which is served after `Switch`.

    It goes without the programs' code; that follows, and then the bundle, in a stream.
    """

    name: Name
    hash: Name
    weights: list[Name]
    programs: dict[Name, ModelProgram]


class Switch(InSession, frozen=True):
    """A put takes the place of the one before. The owner asks party 0, and that the others; None: not after all."""

    hash: Name | None


class RunProgram(OfLease, frozen=True):
    """The owner runs a program on what it stored, and keeps the outputs there for its lease."""

    id: Name
    inputs: list[Name]
    outputs: list[Name]


class Infer(InSession, frozen=True):
    """A client asks a model; one party's shares of the inputs follow in a stream, named "0", "1", ... in order."""

    id: Name
    model: Name
    hash: str
    program: Name


class Answer(Message, frozen=True):
    """The end of a run at one party.

    Attributes:
        error: what went wrong, in one line; None if it went well.
        in_step: whether the party still agrees with the others on where they are.
        shares: those of the outputs, for the client that asked.
        seconds, bytes_sent, rounds: the cost at this party.
        ops: the same by operation, as `Profile.ops` has it.
    """

    error: str | None = None
    in_step: bool = True
    shares: tuple[Share, ...] = ()
    seconds: float = 0.0
    bytes_sent: int = 0
    rounds: int = 0
    ops: dict[str, tuple[int, float, int, int]] = {}


class Form(Message, frozen=True):
    """Party 0 asks the others to start a session, and to serve these puts, by the model's name, from their disks."""

    session: str
    facts: Facts
    models: dict[Name, Name]


class Key(Message, frozen=True):
    """The name of a request at all parties.

    Attributes:
        caller: the common name of the certificate that it came with; every party reads that for itself.
        id: the caller's own name for it.
    """

    caller: str
    id: Name


class Turn(InSession, frozen=True):
    """Requests that party 0 asks for, or gives a turn, together; and those that still wait there."""

    requests: list[Key]
    waiting: list[Key] = []


# To and from a party's worker process, over a pipe of its own.


class Join(Message, frozen=True, tag=True):
    addresses: tuple[str, ...]
    rank: int
    session: str
    config: Config
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
