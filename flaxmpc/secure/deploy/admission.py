"""What a party takes: which models, and which inputs of a request."""

from collections.abc import Iterable

from grpc import StatusCode

from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy import shares, streams
from flaxmpc.secure.deploy.cluster import ClusterFile
from flaxmpc.secure.deploy.errors import Refused, refused_where
from flaxmpc.secure.deploy.programs import Approved
from flaxmpc.secure.deploy.signature import check_program


class Admission:
    """Looks at what owners and clients send to one party, before anything is done with it."""

    def __init__(self, cluster: ClusterFile, rank: int):
        """ValueError: the file of approved programs can't be read."""
        self._cluster = cluster
        self._limits = cluster.limits
        self._rank = rank
        self._approved = Approved.of(cluster)
        if self._approved is not None:
            self._approved.digests()  # what can't be read is said at once

    def check(self, header: m.Publish) -> None:
        """Refused: a put of a model that may not be served here."""
        self.check_name_and_sizes(header)
        self.check_programs(header)

    def check_name_and_sizes(self, header: m.Publish) -> None:
        """Refused: another model than cluster.toml allows, or larger programs; their code is not looked at."""
        allowed, limits = self._cluster.models, self._limits
        if allowed is not None and header.name not in allowed:
            may = f"{self._cluster.path.name} allows {', '.join(allowed)}"
            raise Refused(StatusCode.PERMISSION_DENIED, f"model {header.name!r} may not be put here: {may}")
        for name, program in header.programs.items():
            if program.batch > limits.max_batch or program.length > limits.max_length:
                limit = f"the limit is {limits.max_batch} of size {limits.max_length}"
                reason = f"program {name} is for {program.batch} rows of size {program.length}, {limit}"
                raise Refused(StatusCode.INVALID_ARGUMENT, reason)
            most = max(program.joint, default=1)
            if most > 1 and most * program.batch > limits.max_batch_rows:
                joined = f"{most} requests of {program.batch} rows, the limit is max_batch_rows {limits.max_batch_rows}"
                raise Refused(StatusCode.INVALID_ARGUMENT, f"program {name} joins {joined}")

    def check_programs(self, header: m.Publish) -> None:
        """Refused: a program that this party has not approved, or that is not what it says."""
        digests = self._digests()
        for name, program in header.programs.items():
            if digests is not None and program.digest not in digests:
                raise Refused(
                    StatusCode.PERMISSION_DENIED,
                    f"party {self._rank} has not approved program {name} of model {header.name!r} "
                    f"({program.digest[:16]}): who runs it says `flaxmpc approve` on the model's folder, or its "
                    "config.json alone, with the same --lengths, --batches, [limits] and versions",
                )
            with refused_where(ValueError, StatusCode.INVALID_ARGUMENT, f"program {name}"):
                check_program(program, len(header.weights), self._limits.max_request_bytes, self._cluster.config)

    def _digests(self) -> frozenset[str] | None:
        """Digests of the approved programs; None: any program is. Refused: they can't be read."""
        with refused_where(ValueError, StatusCode.FAILED_PRECONDITION, f"party {self._rank} takes no model"):
            return None if self._approved is None else self._approved.digests()

    def inputs(self, program: m.ModelProgram, pieces: Iterable[m.Piece]) -> list[m.Share]:
        """The shares of a program's inputs, from a stream; no more of it is read than they can have.

        Raises:
            Refused: shares of something else, or of less or more.
        """
        config, limit = self._cluster.config, self._limits.max_request_bytes
        sizes = [shares.num_bytes(array, config) for array in program.inputs]
        most = {str(i): size + streams.frame_bytes(size) for i, size in enumerate(sizes)}
        if (size := sum(most.values())) > limit:
            reason = f"a request has {size} bytes, the limit is max_request_bytes {limit}"
            raise Refused(StatusCode.RESOURCE_EXHAUSTED, reason)
        given: dict[str, m.Share] = {}

        def left(name: str) -> int:
            if name not in most or name in given:
                raise Refused(StatusCode.INVALID_ARGUMENT, f"input {name!r} is not one of {len(most)}, or came already")
            return most[name]

        for put in streams.shares(pieces, left):
            given[put.name] = put.share
        if len(given) != len(most):
            raise Refused(StatusCode.INVALID_ARGUMENT, f"{len(given)} inputs, {len(most)} are needed")
        for name, array in zip(most, program.inputs, strict=True):
            with refused_where(ValueError, StatusCode.INVALID_ARGUMENT, f"input {name}"):
                shares.check(given[name], array, config)
        return [given[name] for name in most]
