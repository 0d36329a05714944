"""A zoo model on a cluster: the owner puts it there, clients ask it. `flaxmpc.secure` knows nothing of models."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
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
from flaxmpc.models.tokenizer import FILES as TOKENIZER_FILES
from flaxmpc.models.tokenizer import save_tokenizer
from flaxmpc.models.weights import read_params, write_params
from flaxmpc.secure import messages as m

_TABLE = "embeddings.safetensors"
_BUNDLE_FILES = frozenset(("config.json", *TOKENIZER_FILES, _TABLE))


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
    parties.publish(name, classifier.weights, programs, _bundle(classifier))
    return parties.find(name)[1]


def _program(classifier: SecureClassifier, parties: secure.Cluster, batch: int, length: int) -> m.Program:
    ids = np.zeros((batch, length), np.int32)
    inputs = classifier.share(ids, np.ones_like(ids))
    return parties.program(classifier.function, classifier.weights, *inputs, length=length)


def _bundle(classifier: SecureClassifier) -> bytes:
    """What clients need in the clear: config, tokenizer, and the embedding if it is public."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        save_tokenizer(classifier.tokenizer, folder)
        (folder / "config.json").write_text(json.dumps(classifier.model.config.to_dict()), "utf-8")
        if classifier.client_params:
            write_params(folder / _TABLE, classifier.client_params)
        return msgspec.msgpack.encode({name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))})


def _unpack(bundle: bytes, folder: Path) -> None:
    """Writes a bundle's files; ValueError if it is none."""
    try:
        files = msgspec.msgpack.decode(bundle, type=dict[str, bytes])
    except msgspec.MsgspecError as error:
        raise ValueError(f"the model's bundle can't be read: {error}") from error
    if strange := sorted(set(files) - _BUNDLE_FILES):
        raise ValueError(f"the model's bundle holds a file {strange[0]!r}")
    temporary = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}")  # not by tempfile: others may read a cache
    temporary.mkdir(parents=True)
    try:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        os.rename(temporary, folder)
    except OSError:
        shutil.rmtree(temporary)
        if not folder.is_dir():  # else another process was faster
            raise


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
        with tempfile.TemporaryDirectory() as own:
            folder = (secure.cache_dir() or Path(own)) / "bundles" / self.model.bundle
            if not folder.is_dir():
                bundle = parties.bundle(self.name, self.model)
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
        lengths = sorted({program.length for program in self.model.programs.values()})
        self.client = Client(model_, tokenizer, params, lengths)
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
