"""A zoo model on a cluster: the owner puts it there, clients ask it. `flaxmpc.secure` knows nothing of models."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from flaxmpc import secure
from flaxmpc.client import Classifier, Run, buckets, limit
from flaxmpc.errors import brief
from flaxmpc.inference import SecureClassifier, logits_and_size, secure_function
from flaxmpc.models import folder as folders
from flaxmpc.models.bert import BertForSequenceClassification, param_shapes
from flaxmpc.models.config import BertConfig
from flaxmpc.models.tokenizer import FILES as TOKENIZER_FILES
from flaxmpc.models.tokenizer import save_tokenizer
from flaxmpc.models.weights import read_params, write_params
from flaxmpc.secure.deploy import messages as m

if TYPE_CHECKING:
    from flaxmpc.secure.deploy.cluster import Limits

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
    known = buckets(loaded.model.config.longest)
    if lengths is None:
        lengths = [length for length in known if length <= 64] or known
    if not lengths or set(lengths) - set(known):
        of = ", ".join(map(str, known))
        raise ValueError(f"lengths {list(lengths)}: this model has {of}; a text may have {limit(loaded.model.config)}")
    if not batches or min(batches) < 1:
        raise ValueError(f"batches are numbers of texts, not {list(batches)}")
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
    function = secure_function(classifier.model, logits_and_size)
    return parties.program(function, classifier.weights, *inputs, length=length)


def _bundle(classifier: SecureClassifier) -> bytes:
    """What clients need in the clear: config, tokenizer, and the embedding if it is public."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        save_tokenizer(classifier.tokenizer, folder)
        (folder / "config.json").write_text(json.dumps(classifier.model.config.to_dict()), "utf-8")
        if classifier.client_params:
            write_params(folder / _TABLE, classifier.client_params)
        return msgspec.msgpack.encode({name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))})


def _fetched(parties: secure.Cluster, name: str, model: m.Model) -> bytes:
    """The bundle of a model: from the cache folder, where it is kept under its hash, or from a party."""
    if not re.fullmatch(r"[0-9a-f]{64}", model.bundle):
        raise ValueError(f"the parties name the bundle of {name!r} {brief(model.bundle)}, which is no hash")
    cache = secure.cache_dir()
    path = None if cache is None else cache / "bundles" / f"{model.bundle}.bundle"
    if path is not None and path.is_file() and path.stat().st_size == model.bundle_bytes:
        content = path.read_bytes()
        if m.digest(content) == model.bundle:
            return content
    content = parties.bundle(name, model)
    if path is not None:
        with contextlib.suppress(OSError):  # a cache that can't be written to is no reason to fail
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(
                f"{path.name}.{secrets.token_hex(8)}"
            )  # not by tempfile: others may read a cache
            temporary.write_bytes(content)
            os.replace(temporary, path)
    return content


def _unpack(bundle: bytes, folder: Path) -> None:
    """Writes a bundle's files into a folder; ValueError if it is none."""
    try:
        contents = msgspec.msgpack.decode(bundle, type=dict[str, bytes])
    except msgspec.MsgspecError as error:
        raise ValueError(f"it can't be read: {error}") from error
    if strange := sorted(set(contents) - _BUNDLE_FILES):
        raise ValueError(f"it holds a file {brief(strange[0])}; it may have {', '.join(sorted(_BUNDLE_FILES))}")
    for name, content in contents.items():
        (folder / name).write_bytes(content)


class _Bundle(NamedTuple):
    """What a client needs of a model: the model, the embedding's parameters (if it embeds) and the tokenizer."""

    model: BertForSequenceClassification
    params: dict[str, Any]
    tokenizer: Any

    @classmethod
    def read(cls, bundle: bytes) -> _Bundle:
        """From the owner's bytes, which may be anything.

        Raises:
            ValueError: they are no bundle, or ask for more than any model does.
        """
        with tempfile.TemporaryDirectory() as directory:
            folder = Path(directory)
            try:
                _unpack(bundle, folder)
                model = BertForSequenceClassification(BertConfig.from_folder(folder))
                params: dict[str, Any] = {}
                if model.config.embedding.client_embeds:
                    shapes = {"bert": {"embeddings": param_shapes(model)["bert"]["embeddings"]}}
                    params = read_params(folder / _TABLE, shapes)
                return cls(model, params, folders.load_tokenizer(folder))
            except (ValueError, OSError) as error:
                reason = " ".join(str(error).replace(f"{folder}{os.sep}", "").replace(str(folder), "it").split())
                raise ValueError(f"the model's bundle: {reason}") from error


class RemoteClassifier(Classifier):
    """A model on a cluster, as a client asks it: texts, ids and answers stay here."""

    def __init__(self, parties: secure.Cluster, model: str | None = None):
        """Fetches what a client needs of the model, once: it is kept in the cache folder under its hash.

        Args:
            parties: with the role "client".
            model: its name; by default the only one that the parties hold.

        Raises:
            secure.SecureError: no such model, or a party can't be reached.
            ValueError: a damaged bundle, or one that asks for more than any model does or this client's cluster.toml
                allows.
        """
        self.parties = parties
        self.name, self.model = parties.find(model)
        self._sizes: dict[int, list[int]] = {}
        for name, program in self.model.programs.items():
            _check_size(name, program, parties.cluster.limits)
            self._sizes[program.length] = sorted({*self._sizes.get(program.length, ()), program.batch})
        if not self._sizes:
            raise ValueError(f"model {self.name!r} has no program: the owner puts it again with `flaxmpc put`")
        model_, params, tokenizer = _Bundle.read(_fetched(parties, self.name, self.model))
        super().__init__(model_, tokenizer, params, list(self._sizes))
        _check_shares(self.model.programs, self.config, parties.cluster.limits)

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


def _check_size(name: str, program: m.Signature, limits: Limits) -> None:
    """ValueError: a program that this client's cluster.toml does not allow."""
    fits = 1 <= program.batch <= limits.max_batch and 1 <= program.length <= limits.max_length
    if not fits or name != f"{program.batch}x{program.length}":
        raise ValueError(
            f"program {brief(name)} is for {program.batch} x {program.length}; cluster.toml allows "
            f"{limits.max_batch} x {limits.max_length}"
        )


def _check_shares(programs: Mapping[str, m.Signature], config: BertConfig, limits: Limits) -> None:
    """ValueError: a run whose shares are larger than this client's cluster.toml allows: they are made at once."""
    of_token = config.hidden_size if config.embedding.client_embeds else config.vocab_size + config.type_vocab_size
    for name, program in programs.items():
        size = 8 * program.batch * program.length * of_token  # at least: a number of the ring, for each party
        if size > limits.max_request_bytes:
            raise ValueError(
                f"program {name} takes {size} bytes of shares; max_request_bytes in cluster.toml is "
                f"{limits.max_request_bytes}"
            )
