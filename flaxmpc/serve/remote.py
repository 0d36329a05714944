"""Serves a model on a cluster: its owner puts it there, and clients ask it."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from flaxmpc import files, secure
from flaxmpc.data.batches import Text
from flaxmpc.errors import brief
from flaxmpc.models import folder as folders
from flaxmpc.models import zoo
from flaxmpc.models.base import WithHead, param_shapes, without_embeddings
from flaxmpc.models.config import EncoderConfig
from flaxmpc.models.tokenizer import FILES as TOKENIZER_FILES
from flaxmpc.models.tokenizer import save_tokenizer
from flaxmpc.models.weights import read_params, write_params
from flaxmpc.secure import cache
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.cluster import ClusterFile
from flaxmpc.secure.deploy.programs import Approved, compile_program
from flaxmpc.serve.answers import Inference
from flaxmpc.serve.classify import Classifier, Client, TextRun, buckets, limit
from flaxmpc.serve.private import answered, private_classifier, visibility, without_weights

if TYPE_CHECKING:
    from flaxmpc.secure.deploy.cluster import Limits

_TABLE = "embeddings.safetensors"
_ENCODING = "encoding.json"
_BUNDLE_FILES = frozenset(("config.json", *TOKENIZER_FILES, _TABLE, _ENCODING))


def put(
    loaded: folders.LoadedModel,
    parties: secure.Cluster,
    *,
    name: str | None = None,
    lengths: Sequence[int] | None = None,
    batches: Sequence[int] = (1,),
    public_weights: bool = False,
) -> m.PublicModel:
    """Shares a model's weights among the parties, with programs for each length and batch.

    Each is compiled for one request and for 2, 4, 8, ... up to max_batch_rows, see `Cluster.program`. Compiled
    programs are kept in the cache folder.

    Args:
        loaded: the model, see `flaxmpc.models.folder.load`.
        parties: the cluster, with the role "owner".
        name: the model's name for clients; by default the folder's.
        lengths: the lengths that texts are padded to, of `classify.buckets`; by default those up to 64.
        batches: the numbers of texts that a request may have.
        public_weights: whether every party may know the weights: then only texts and answers are secret.

    Returns:
        What the parties say of it.

    Raises:
        ValueError: a broken plan of bits, a length that is none of its buckets, or a name that
            a model can't have.
        secure.SecureError: a party refuses, or can't be reached.
    """
    sizes = _sizes(loaded.model.config, lengths, batches)
    name = name or zoo.name_of(loaded.folder)
    m.check_name(name)  # before minutes of compiling and sending
    found = private_classifier(loaded, parties.config, checked=True)
    client = found.client(loaded.tokenizer)
    resident = parties.put(found.weights, visibility(public_weights))
    programs = _programs(client, found.function, resident, parties.cluster, sizes)
    parties.publish(name, resident, programs, _bundle(client, found.model))
    return parties.find(name)[1]


def approve(
    folder: str | Path,
    cluster: ClusterFile,
    *,
    name: str | None = None,
    lengths: Sequence[int] | None = None,
    batches: Sequence[int] = (1,),
    public_weights: bool = False,
) -> dict[str, m.ModelProgram]:
    """Compiles the programs that `put` would, and adds their digests to those that a party takes.

    Args:
        folder: a folder with a model's config.json; who runs a party need not have its weights.
        cluster: the cluster.toml of the party.
        name: the model's name, a remark in the file; by default the folder's.
        lengths, batches, public_weights: the same as the owner gives to `put`.

    Returns:
        The programs by name.

    Raises:
        ValueError: a length that is none of its buckets, or no file for the digests.
        OSError: a file can't be read or written.
    """
    approved = Approved.of(cluster)
    if approved is None:
        raise ValueError(
            f"{cluster.path} does not say where approved programs are to stand: add the line "
            'programs = "programs.txt" above its first [table]; the party then takes no others'
        )
    folder = Path(folder)
    sizes = _sizes(folders.read_model(folder).config, lengths, batches)
    found = without_weights(folder, cluster.config)
    weights = secure.Planned(found.weights, visibility(public_weights))
    programs = _programs(found.client(None), found.function, weights, cluster, sizes)
    approved.add(name or zoo.name_of(folder), programs)
    return programs


def _sizes(config: EncoderConfig, lengths: Sequence[int] | None, batches: Sequence[int]) -> list[tuple[int, int]]:
    """Batch and length of each program. ValueError: a length that is none of the model's buckets, or no number."""
    known = buckets(config.longest)
    if lengths is None:
        lengths = [length for length in known if length <= 64] or known
    if not lengths or set(lengths) - set(known):
        of = ", ".join(map(str, known))
        raise ValueError(f"lengths {list(lengths)}: this model has {of}; a text may have {limit(config)}")
    if not batches or min(batches) < 1:
        raise ValueError(f"batches are numbers of texts, not {list(batches)}")
    return [(batch, length) for batch in sorted(set(batches)) for length in sorted(set(lengths))]


def _programs(
    client: Client,
    function: Callable[..., Any],
    weights: secure.Planned,
    cluster: ClusterFile,
    sizes: Sequence[tuple[int, int]],
) -> dict[str, m.ModelProgram]:
    """A model's programs, by the sizes of what the client shares."""
    programs = {}
    for batch, length in sizes:
        ids = np.zeros((batch, length), np.int32)
        inputs = client.share(ids, np.ones_like(ids))
        programs[f"{batch}x{length}"] = compile_program(cluster, function, weights, *inputs, length=length)
    return programs


def _bundle(client: Client, model: WithHead) -> bytes:
    """Packs what clients need in the clear: config, tokenizer, and the embedding if it is public."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        save_tokenizer(client.tokenizer, folder)
        (folder / "config.json").write_text(json.dumps(folders.described(model)), "utf-8")
        if client.encoding is not None:  # not the plan itself, which says how large the model's numbers are
            (folder / _ENCODING).write_text(json.dumps(client.encoding.as_dict()), "utf-8")
        if client.client_params:
            write_params(folder / _TABLE, client.client_params)
        return msgspec.msgpack.encode({name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))})


def _fetched(parties: secure.Cluster, name: str, model: m.PublicModel) -> bytes:
    """Fetches the bundle of a model: from the cache folder, where it is kept under its hash, or from a party."""
    folder = secure.cache_dir()
    path = None if folder is None else folder / "bundles" / f"{model.bundle}.bundle"
    if path is not None and (content := cache.read(path)) is not None and m.digest(content) == model.bundle:
        return content
    content = parties.bundle(name, model)
    if path is not None:
        cache.write(path, content)
    return content


def _unpack(bundle: bytes, folder: Path) -> None:
    """Writes a bundle's files into a folder; ValueError if it is none."""
    try:
        contents = msgspec.msgpack.decode(bundle, type=dict[str, bytes])
    except ValueError as error:  # msgspec's, or a name that is no text
        raise ValueError(f"it can't be read: {error}") from error
    if strange := sorted(set(contents) - _BUNDLE_FILES):
        raise ValueError(f"it holds a file {brief(strange[0])}; it may have {', '.join(sorted(_BUNDLE_FILES))}")
    for name, content in contents.items():
        (folder / name).write_bytes(content)


class _Bundle(NamedTuple):
    """What a client needs of a model.

    Attributes:
        model: the model.
        params: the embedding's, if the client embeds.
        tokenizer: the model's.
        encoding: how what it shares and opens is encoded, where the model's bits are planned.
    """

    model: WithHead
    params: dict[str, Any]
    tokenizer: Any
    encoding: secure.Encoding | None

    @classmethod
    def read(cls, bundle: bytes) -> _Bundle:
        """Unpacks a bundle from the owner's bytes, which may be anything.

        Raises:
            ValueError: they are no bundle, or ask for more than any model does.
        """
        with tempfile.TemporaryDirectory() as directory:
            folder = Path(directory)
            try:
                _unpack(bundle, folder)
                model = folders.read_model(folder)
                params: dict[str, Any] = {}
                if model.config.embedding.client_embeds:
                    table, _ = without_embeddings(model, param_shapes(model))
                    params = read_params(folder / _TABLE, table)
                return cls(model, params, folders.load_tokenizer(folder), _read_encoding(folder / _ENCODING))
            except (ValueError, OSError) as error:
                reason = " ".join(str(error).replace(f"{folder}{os.sep}", "").replace(str(folder), "it").split())
                raise ValueError(f"the model's bundle: {reason}") from error


def _read_encoding(path: Path) -> secure.Encoding | None:
    """Reads how numbers are encoded, if the bundle says it. ValueError: it does, but not as it should."""
    return secure.Encoding.from_dict(files.read_object(path)) if path.is_file() else None


T = TypeVar("T")


class RemoteClassifier(Classifier):
    """A model on a cluster, as a client asks it: texts, ids and answers stay here."""

    def __init__(self, parties: secure.Cluster, model: str | None = None):
        """Fetches what a client needs of the model, once: it is kept in the cache folder under its hash.

        Args:
            parties: the cluster, with the role "client".
            model: the model's name; by default the only one that the parties hold.

        Raises:
            secure.SecureError: no such model, or a party can't be reached.
            ValueError: a damaged bundle, or one that asks for more than any model does or this client's cluster.toml
                allows.
        """
        self.parties = parties
        self.name, self.model = parties.find(model)
        self._loaded = ""
        self._follow(lambda: None)

    def _follow(self, action: Callable[[], T]) -> T:
        """Does something with the model that the parties hold; again, where another was put meanwhile."""
        while True:
            put = self.model.hash
            try:
                if self._loaded != put:
                    self._load()
                return action()
            except secure.SecureError:
                with contextlib.suppress(secure.SecureError):
                    self.name, self.model = self.parties.find(self.name)
                if self.model.hash == put:
                    raise

    def _load(self) -> None:
        """Takes what a client needs of the model that the parties hold."""
        self._sizes: dict[int, list[int]] = {}
        for name, program in self.model.programs.items():
            _check_size(name, program, self.parties.cluster.limits)
            self._sizes[program.length] = sorted({*self._sizes.get(program.length, ()), program.batch})
        if not self._sizes:
            raise ValueError(f"model {self.name!r} has no program: the owner puts it again with `flaxmpc put`")
        bundle = _Bundle.read(_fetched(self.parties, self.name, self.model))
        super().__init__(bundle.model, bundle.tokenizer, bundle.params, list(self._sizes), bundle.encoding)
        _check_shares(self.model.programs, self.config, self.parties.cluster.limits)
        self._loaded = self.model.hash

    def classify(
        self, texts: Sequence[Text], progress: Callable[[list[TextRun]], Iterable[TextRun]] = list
    ) -> Inference:
        """Answers texts, see `Classifier.classify`; all of them by one put of the model."""
        ask = super().classify
        return self._follow(lambda: ask(texts, progress))

    def sizes(self, length: int) -> Sequence[int]:
        """The numbers of rows that the model was put for, at a length."""
        return self._sizes[length]

    def answer(self, run: TextRun) -> tuple[np.ndarray, None, secure.Cost]:
        inputs = self.share(run.ids, run.mask, run.types)
        name = "x".join(map(str, run.ids.shape))
        outputs, cost = self.parties.infer(self.name, self.model, name, inputs)
        shapes = [output.shape for output in outputs]
        wanted = [self._model.logits_shape(*run.ids.shape), (len(run.ids),)]
        if shapes != wanted:
            raise ValueError(
                f"program {name} gives {shapes}, not {wanted}, the logits and the strain: "
                "the owner puts the model again with `flaxmpc put`"
            )
        return answered(*self.opened(outputs)), None, cost


def _check_size(name: str, program: m.ModelProgram, limits: Limits) -> None:
    """Refuses (ValueError) a program that this client's cluster.toml does not allow."""
    fits = 1 <= program.batch <= limits.max_batch and 1 <= program.length <= limits.max_length
    if not fits or name != f"{program.batch}x{program.length}":
        raise ValueError(
            f"program {brief(name)} is for {program.batch} x {program.length}; cluster.toml allows "
            f"{limits.max_batch} x {limits.max_length}"
        )


def _check_shares(programs: Mapping[str, m.ModelProgram], config: EncoderConfig, limits: Limits) -> None:
    """Refuses (ValueError) runs with larger shares than this client's cluster.toml allows: they are made at once."""
    of_token = config.hidden_size if config.embedding.client_embeds else config.vocab_size + config.type_vocab_size
    for name, program in programs.items():
        size = 8 * program.batch * program.length * of_token  # at least: a number of the ring, for each party
        if size > limits.max_request_bytes:
            raise ValueError(
                f"program {name} takes {size} bytes of shares; max_request_bytes in cluster.toml is "
                f"{limits.max_request_bytes}"
            )
