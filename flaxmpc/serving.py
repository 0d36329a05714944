"""A zoo model on a cluster: the owner puts it there, clients ask it. `flaxmpc.secure` knows nothing of models."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np

from flaxmpc import secure
from flaxmpc.inference import Client, SecureClassifier, buckets
from flaxmpc.models import folder as folders
from flaxmpc.models.bert import BertForSequenceClassification, param_shapes
from flaxmpc.models.config import BertConfig
from flaxmpc.models.weights import read_params, write_params
from flaxmpc.secure import messages as m

_TABLE = "embeddings.safetensors"
_BUNDLE_FILES = frozenset(("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", _TABLE))


def put(
    loaded: folders.LoadedModel,
    parties: secure.Cluster,
    *,
    name: str | None = None,
    lengths: Sequence[int] = (16, 32, 64),
    batches: Sequence[int] = (1,),
) -> m.Model:
    """Shares a model's weights among the parties, with programs for each length and batch.

    Each is compiled for one request and for 2, 4, 8, ... up to max_batch_sentences, see `Cluster.program`. Compiled
    programs are kept in the cache folder.

    Args:
        loaded: see `flaxmpc.models.folder.load`.
        parties: with the role "owner".
        name: for the clients; by default the folder's.
        lengths: length buckets, of those in `flaxmpc.inference.LENGTHS`; a sentence is padded to the next.
        batches: numbers of sentences that a request may have.

    Returns:
        What the parties say of it.

    Raises:
        ValueError: no sequence classifier, or a length that it has no positions for.
        secure.SecureError: a party refuses, or can't be reached.
    """
    known = buckets(loaded.model.config.max_position_embeddings)
    if not lengths or set(lengths) - set(known):
        raise ValueError(f"lengths {list(lengths)}: this model has {', '.join(map(str, known))}")
    if not batches or min(batches) < 1:
        raise ValueError(f"batches are numbers of sentences, not {list(batches)}")
    name = name or loaded.folder.resolve().name
    classifier = SecureClassifier(loaded, parties)
    programs = {
        f"{batch}x{length}": _program(classifier, parties, batch, length)
        for batch in sorted(set(batches))
        for length in sorted(set(lengths))
    }
    parties.publish(name, classifier.weights, programs, _bundle(classifier, loaded.folder))
    return parties.find(name)[1]


def _program(classifier: SecureClassifier, parties: secure.Cluster, batch: int, length: int) -> m.Program:
    ids = np.zeros((batch, length), np.int32)
    inputs = classifier.share(ids, np.ones_like(ids))
    return parties.program(classifier.function, classifier.weights, *inputs, length=length)


def _bundle(classifier: SecureClassifier, folder: Path) -> bytes:
    """What clients need in the clear: config, tokenizer, and the embedding if it is public."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name in _BUNDLE_FILES - {_TABLE}}
    files["config.json"] = json.dumps(classifier.model.config.to_dict()).encode()
    if classifier.client_params:
        with tempfile.TemporaryDirectory() as directory:
            write_params(Path(directory) / _TABLE, classifier.client_params)
            files[_TABLE] = (Path(directory) / _TABLE).read_bytes()
    return msgspec.msgpack.encode(files)


def _unpack(bundle: bytes, folder: Path) -> None:
    """Writes a bundle's files; ValueError if it is none."""
    try:
        files = msgspec.msgpack.decode(bundle, type=dict[str, bytes])
    except msgspec.MsgspecError as error:
        raise ValueError(f"the model's bundle can't be read: {error}") from error
    if strange := sorted(set(files) - _BUNDLE_FILES):
        raise ValueError(f"the model's bundle holds a file {strange[0]!r}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as directory:
        for name, content in files.items():
            (Path(directory) / name).write_bytes(content)
        try:
            os.rename(directory, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
        else:
            os.mkdir(directory)  # for the context to remove


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One sentence's answer: what the client opened.

    Attributes:
        text: as it was given.
        label: of the largest logit.
        score: its probability, in [0, 1].
        logits: opened from the shares.
        truncated: whether the sentence was longer than the model's longest program.
        cost: of the run that the sentence was in.
    """

    text: str
    label: str
    score: float
    logits: list[float]
    truncated: bool
    cost: secure.Cost


class RemoteClassifier:
    """A model on a cluster, as a client asks it: sentences, ids and answers stay here."""

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
        folder = secure.cache_dir() / "bundles" / self.model.bundle
        if not folder.is_dir():
            _unpack(parties.bundle(self.name, self.model), folder)
        config = BertConfig.from_folder(folder)
        model_ = BertForSequenceClassification(config)
        params: dict[str, Any] = {}
        if config.embedding.client_embeds:
            shapes = {"bert": {"embeddings": param_shapes(model_)["bert"]["embeddings"]}}
            params = read_params(folder / _TABLE, shapes)
        lengths = sorted({program.length for program in self.model.programs.values()})
        self.client = Client(model_, folders.load_tokenizer(folder), params, lengths)
        self._batches = sorted({program.batch for program in self.model.programs.values()}, reverse=True)

    def classify(self, texts: Sequence[str]) -> list[Prediction]:
        """Sentences of a kind of length share a run as far as the model was put for it; answers in their order.

        Raises:
            ValueError: no sentence, or an empty one.
            secure.SecureError: the parties refuse or fail.
        """
        predictions: list[Prediction] = []
        while len(predictions) < len(texts) or not texts:
            left = len(texts) - len(predictions)
            batch = next((batch for batch in self._batches if batch <= left), self._batches[-1])
            some = texts[len(predictions) : len(predictions) + batch]
            # A batch that only larger programs take is filled with copies.
            predictions += self._run([*some, *[some[-1]] * (batch - len(some))] if some else [])[: len(some)]
        return predictions

    def _run(self, texts: Sequence[str]) -> list[Prediction]:
        ids, mask, truncated = self.client.encode(texts)
        inputs = self.client.share(ids, mask)
        (logits,), cost = self.parties.infer(self.name, self.model, f"{len(ids)}x{ids.shape[1]}", inputs)
        scores = np.asarray(jax.nn.softmax(logits))
        labels = self.client.config.id2label
        return [
            Prediction(text, labels[int(row.argmax())], float(score.max()), row.tolist(), cut, cost)
            for text, row, score, cut in zip(texts, logits, scores, truncated, strict=True)
        ]
