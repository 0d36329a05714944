"""A zoo model on a cluster: the owner puts it there, clients ask it. `flaxmpc.secure` knows nothing of models."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from flaxmpc import secure
from flaxmpc.answers import Inference
from flaxmpc.client import Classifier, Client, Run, buckets, limit
from flaxmpc.convert.data import Text
from flaxmpc.inference import SecureClassifier, logits_and_size, plan, secure_function, sequence_classifier
from flaxmpc.models import folder as folders
from flaxmpc.models.bert import BertForSequenceClassification, param_shapes
from flaxmpc.models.config import BertConfig
from flaxmpc.models.tokenizer import FILES as TOKENIZER_FILES
from flaxmpc.models.tokenizer import save_tokenizer
from flaxmpc.models.weights import read_params, write_params
from flaxmpc.secure import cache
from flaxmpc.secure.deploy import messages as m
from flaxmpc.secure.deploy.cluster import ClusterFile
from flaxmpc.secure.deploy.programs import Approved, compile_program

# Of `logits_and_size`; a calibrated LayerNorm leaves 1 within some hundredths.
_SIZE_TOLERANCE = 0.5

_TABLE = "embeddings.safetensors"
_BUNDLE_FILES = frozenset(("config.json", *TOKENIZER_FILES, _TABLE))


def put(
    loaded: folders.LoadedModel,
    parties: secure.Cluster,
    *,
    name: str | None = None,
    lengths: Sequence[int] | None = None,
    batches: Sequence[int] = (1,),
) -> m.Model:
    """Shares a model's weights among the parties, with programs for each length and batch.

    Each is compiled for one request and for 2, 4, 8, ... up to max_batch_sentences, see `Cluster.program`. Compiled
    programs are kept in the cache folder.

    Args:
        loaded: see `flaxmpc.models.folder.load`.
        parties: with the role "owner".
        name: for the clients; by default the folder's.
        lengths: length buckets, see `flaxmpc.client.buckets`; a text is padded to the next. By default those up to 64.
        batches: numbers of texts that a request may have.

    Returns:
        What the parties say of it.

    Raises:
        ValueError: no sequence classifier, or a length that is none of its buckets.
        secure.SecureError: a party refuses, or can't be reached.
    """
    sizes = _sizes(loaded.model.config, lengths, batches)
    name = name or loaded.folder.resolve().name
    classifier = SecureClassifier(loaded, parties)
    programs = _programs(classifier, classifier.model, classifier.weights, parties.cluster, sizes)
    parties.publish(name, classifier.weights, programs, _bundle(classifier))
    return parties.find(name)[1]


def approve(
    folder: str | Path,
    cluster: ClusterFile,
    *,
    name: str | None = None,
    lengths: Sequence[int] | None = None,
    batches: Sequence[int] = (1,),
) -> dict[str, m.Program]:
    """Compiles the programs that `put` would, and adds their digests to those that a party takes.

    Args:
        folder: with a model's config.json; who runs a party need not have its weights.
        cluster: the party's.
        name: of the model, a remark; by default the folder's.
        lengths, batches: see `put`.

    Returns:
        The programs by name.

    Raises:
        ValueError: no sequence classifier, a length that is none of its buckets, or no file for the digests.
        OSError: a file can't be read or written.
    """
    approved = Approved.of(cluster)
    if approved is None:
        raise ValueError(
            f"{cluster.path} does not say where approved programs are to stand: add the line "
            'programs = "programs.txt" above its first [table]; the party then takes no others'
        )
    folder = Path(folder)
    trained = sequence_classifier(folders.read_model(folder), folder)
    sizes = _sizes(trained.config, lengths, batches)
    model, client_params, weights = plan(trained, grouped_heads=cluster.config.grouped_products)
    programs = _programs(Client(model, None, client_params), model, weights, cluster, sizes)
    approved.add(name or folder.resolve().name, programs)
    return programs


def _sizes(config: BertConfig, lengths: Sequence[int] | None, batches: Sequence[int]) -> list[tuple[int, int]]:
    """Batches and lengths of the programs. ValueError: a length that is none of the model's buckets, or no number."""
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
    model: BertForSequenceClassification,
    weights: secure.Planned,
    cluster: ClusterFile,
    sizes: Sequence[tuple[int, int]],
) -> dict[str, m.Program]:
    """The programs of a folded model, by the sizes of what the client shares."""
    function = secure_function(model, logits_and_size)
    programs = {}
    for batch, length in sizes:
        ids = np.zeros((batch, length), np.int32)
        inputs = client.share(ids, np.ones_like(ids))
        programs[f"{batch}x{length}"] = compile_program(cluster, function, weights, *inputs, length=length)
    return programs


def _bundle(classifier: SecureClassifier) -> bytes:
    """What clients need in the clear: config, tokenizer, and the embedding if it is public."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        save_tokenizer(classifier.tokenizer, folder)
        (folder / "config.json").write_text(json.dumps(classifier.model.config.to_dict()), "utf-8")
        if classifier.client_params:
            write_params(folder / _TABLE, classifier.client_params)
        return msgspec.msgpack.encode({name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))})


def _holds(folder: Path, digest: str) -> bool:
    """Whether a folder of the cache holds the files of the bundle with this digest, and no others."""
    try:
        files = {name: cache.content_of(folder / name) for name in sorted(os.listdir(folder))}
    except OSError:
        return False
    return m.digest(msgspec.msgpack.encode(files)) == digest


def _unpack(bundle: bytes, folder: Path) -> None:
    """Writes a bundle's files; ValueError if it is none."""
    try:
        files = msgspec.msgpack.decode(bundle, type=dict[str, bytes])
    except msgspec.MsgspecError as error:
        raise ValueError(f"the model's bundle can't be read: {error}") from error
    if strange := sorted(set(files) - _BUNDLE_FILES):
        raise ValueError(f"the model's bundle holds a file {strange[0]!r}")
    temporary = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}")  # not by tempfile: others may read a cache
    cache.make_folder(folder.parent)
    cache.make_folder(temporary)
    try:
        for name, content in files.items():
            cache.write_new(temporary / name, content)
        os.rename(temporary, folder)
    except OSError:
        shutil.rmtree(temporary)
        if not folder.is_dir():  # else another process was faster
            raise


T = TypeVar("T")


class RemoteClassifier(Classifier):
    """A model on a cluster, as a client asks it: texts, ids and answers stay here."""

    def __init__(self, parties: secure.Cluster, model: str | None = None):
        """Fetches what a client needs of the model, once: it is kept in the cache folder under its hash.

        Args:
            parties: with the role "client".
            model: its name; by default the only one that the parties hold.

        Raises:
            secure.SecureError: no such model, or a party can't be reached.
            ValueError: a damaged bundle.
        """
        self.parties = parties
        self.name, self.model = parties.find(model)
        self._loaded = ""
        self._follow(lambda: None)

    def _follow(self, action: Callable[[], T]) -> T:
        """What `action` gives with the model that the parties hold; again, where another was put meanwhile."""
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
        """What a client needs of the model."""
        with tempfile.TemporaryDirectory() as own:
            folder = (secure.cache_dir() or Path(own)) / "bundles" / self.model.bundle
            if not _holds(folder, self.model.bundle):
                shutil.rmtree(folder, ignore_errors=True)
                bundle = self.parties.bundle(self.name, self.model)
                try:
                    _unpack(bundle, folder)
                except OSError:  # a cache that can't be written to is no reason to fail
                    folder = Path(own) / "bundle"
                    _unpack(bundle, folder)
            config = BertConfig.from_folder(folder)
            model_ = BertForSequenceClassification(config)
            params: dict[str, Any] = {}
            if config.embedding.client_embeds:
                shapes = {"bert": {"embeddings": param_shapes(model_)["bert"]["embeddings"]}}
                params = read_params(folder / _TABLE, shapes)
            tokenizer = folders.load_tokenizer(folder)
        self._sizes: dict[int, list[int]] = {}
        for program in self.model.programs.values():
            self._sizes[program.length] = sorted({*self._sizes.get(program.length, ()), program.batch})
        super().__init__(model_, tokenizer, params, list(self._sizes))
        self._loaded = self.model.hash

    def classify(self, texts: Sequence[Text], progress: Callable[[list[Run]], Iterable[Run]] = list) -> Inference:
        """See `Classifier.classify`. All texts are answered by one put of the model."""
        ask = super().classify
        return self._follow(lambda: ask(texts, progress))

    def sizes(self, length: int) -> Sequence[int]:
        """Those that the model was put for."""
        return self._sizes[length]

    def answer(self, run: Run) -> tuple[np.ndarray, None, secure.Cost]:
        inputs = self.share(run.ids, run.mask, run.types)
        name = "x".join(map(str, run.ids.shape))
        outputs, cost = self.parties.infer(self.name, self.model, name, inputs)
        shapes = [output.shape for output in outputs]
        if shapes != [(len(run.ids), self.config.num_labels), (len(run.ids),)]:
            raise ValueError(
                f"program {name} gives {shapes}, not logits of {self.config.num_labels} labels and the size: "
                "the owner puts the model again with `flaxmpc put`"
            )
        logits, size = outputs
        diverged = np.abs(size - 1) > _SIZE_TOLERANCE
        return np.where(diverged[:, None], np.nan, logits), None, cost
