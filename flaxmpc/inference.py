"""Sentences classified on secret shares: where the models meet the secure runtime."""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxmpc import secure
from flaxmpc.convert.data import encode
from flaxmpc.convert.fold import fold
from flaxmpc.models import folder as folders
from flaxmpc.models.bert import BertForSequenceClassification
from flaxmpc.nn.attention import Keys

# A sentence is padded to the first of these that holds it, see `Client.bucket`.
LENGTHS = (16, 32, 64, 128, 256, 512)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One sentence's answer.

    Attributes:
        text: as it was given.
        label: of the largest secure logit.
        score: its probability, in [0, 1].
        logits: opened from the shares.
        logits_plaintext: of the model as it was trained, in the clear.
        truncated: whether the sentence was longer than the model's positions.
    """

    text: str
    label: str
    score: float
    logits: list[float]
    logits_plaintext: list[float]
    truncated: bool

    @property
    def difference(self) -> float:
        """The largest |secure - plaintext| of the logits."""
        return float(np.abs(np.subtract(self.logits, self.logits_plaintext)).max())


class Inference(NamedTuple):
    """Predictions of one secure run, in the order of the sentences, and what it cost."""

    predictions: list[Prediction]
    cost: secure.Cost


class Logits(NamedTuple):
    """Logits (sentence, label) of one secure run: opened from the shares, and in the clear; and what it cost."""

    secret: np.ndarray
    plain: np.ndarray
    cost: secure.Cost


def split_at_shares(model: Any, params: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """What the client computes, and what runs on shares: (secure function, client's params, secret params).

    The secure function is (secret params, what the client shares, keys) -> the head's output. With a client-side
    embedding the client shares embeddings, and keeps their table; else it shares one-hot tokens, and has nothing.
    """
    if model.config.embedding.client_embeds:
        encoder = {name: dict(tree) if name == "bert" else tree for name, tree in params.items()}
        table = encoder["bert"].pop("embeddings")

        def from_embeddings(params: dict[str, Any], embeddings: jax.Array, keys: Keys) -> Any:
            return model.apply({"params": params}, embeddings, keys, method="from_embeddings")

        return from_embeddings, {"bert": {"embeddings": table}}, encoder

    def from_tokens(params: dict[str, Any], tokens: tuple[jax.Array, ...], keys: Keys) -> Any:
        embeddings = model.apply({"params": params}, *tokens, attention_mask=keys.mask, method="embed")
        return model.apply({"params": params}, embeddings, keys, method="from_embeddings")

    return from_tokens, {}, params


class _Folded(NamedTuple):
    """A classifier as it runs on shares; see `split_at_shares` for what follows the model."""

    model: BertForSequenceClassification
    function: Any
    client_params: dict[str, Any]
    secret_params: dict[str, Any]


def _folded(loaded: folders.LoadedModel, *, grouped_heads: bool = True) -> _Folded:
    """ValueError: the model is no sequence classifier."""
    if not isinstance(loaded.model, BertForSequenceClassification):
        raise ValueError(f"{loaded.folder} holds a {type(loaded.model).__name__}, not a sequence classifier")
    params, config = fold(loaded.params, loaded.model.config)
    model = BertForSequenceClassification(dataclasses.replace(config, grouped_heads=grouped_heads))
    return _Folded(model, *split_at_shares(model, params))


def check(
    loaded: folders.LoadedModel, texts: Sequence[str], *, ring: str = "FM64", fraction_bits: int = 18
) -> secure.Margins:
    """How far a classifier, as it runs on shares, stays from overflow on these sentences; computed in the clear.

    Every sentence is a run of its own, padded to the length bucket of the longest.

    Raises:
        ValueError: see `Client.encode` and `secure.check`; or the model is no sequence classifier.
    """
    model, _, client_params, _ = _folded(loaded)
    ids, mask, _ = Client(model, loaded.tokenizer, client_params).encode(texts)
    rows = ((ids[i : i + 1], mask[i : i + 1], None) for i in range(len(texts)))
    return check_encoded(loaded, rows, ring=ring, fraction_bits=fraction_bits)


def check_encoded(
    loaded: folders.LoadedModel,
    runs: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray | None]],
    *,
    ring: str = "FM64",
    fraction_bits: int = 18,
) -> secure.Margins:
    """The same for runs of encoded sentences or pairs: ids, mask and types as `Client.share` takes them.

    Raises:
        ValueError: see `secure.check`; or the model is no sequence classifier.
    """
    model, function, client_params, secret_params = _folded(loaded)
    client = Client(model, loaded.tokenizer, client_params)
    secret_params = jax.device_put(secret_params)
    inputs = ((secret_params, *client.share(*run)) for run in runs)
    return secure.check(function, inputs, ring=ring, fraction_bits=fraction_bits)


def buckets(most: int) -> list[int]:
    """The lengths that sentences of up to `most` tokens are padded to."""
    return [*(length for length in LENGTHS if length < most), most]


class Client:
    """The client's half of a classifier: sentences to what becomes secret shares. It holds no secret of the model."""

    def __init__(
        self,
        model: BertForSequenceClassification,
        tokenizer: Any,
        params: dict[str, Any],
        lengths: Sequence[int] | None = None,
    ):
        """What a client needs of a model.

        Args:
            model: as it runs on shares (folded).
            tokenizer: see `flaxmpc.models.folder.load_tokenizer`.
            params: the embedding's, if the client embeds; see `split_at_shares`.
            lengths: that sentences are padded to; by default `buckets`.
        """
        self.config = model.config
        self.tokenizer = tokenizer
        self.client_params = params
        self.lengths = sorted(lengths or buckets(self.config.max_position_embeddings))
        self._embed = jax.jit(partial(model.apply, method="embed"))

    def bucket(self, num_tokens: int) -> int:
        """The length that a sentence of `num_tokens` tokens is padded to, which the computing parties see."""
        found = next((length for length in self.lengths if num_tokens <= length), None)
        if found is None:
            raise ValueError(f"a sentence has {num_tokens} tokens; the model is served for at most {self.lengths[-1]}")
        return found

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, list[bool]]:
        """Ids and mask (sentence, token), padded to the length bucket, and which sentences were cut.

        Raises:
            ValueError: no sentence, or an empty one; says which. Or a tokenizer that is not the model's.
        """
        if not texts:
            raise ValueError("there is no sentence to classify")
        for number, text in enumerate(texts, 1):
            if not text.strip():
                raise ValueError(f"sentence {number} of {len(texts)} is empty")
        most = self.config.max_position_embeddings
        rows, _, truncated = encode(self.tokenizer, texts, most)
        largest = max(map(max, rows))
        if largest >= self.config.vocab_size:
            raise ValueError(
                f"the tokenizer gives token {largest}, but the model has {self.config.vocab_size}: "
                "they do not belong together"
            )
        ids = np.full((len(rows), self.bucket(max(map(len, rows)))), self.config.pad_token_id, np.int32)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return ids, mask, truncated.tolist()

    def share(self, ids: np.ndarray, mask: np.ndarray, types: np.ndarray | None = None) -> tuple[Any, Keys]:
        """The client's part: what of its sentences becomes secret shares (embeddings or one-hot tokens, and keys).

        Args:
            ids, mask: (sentence, token).
            types: HF's token_type_ids of pairs; None: all 0.
        """
        tokens: Any = self._tokens(ids, types)
        if self.config.embedding.client_embeds:
            tokens = self._embed({"params": self.client_params}, *tokens, attention_mask=jnp.asarray(mask))
        return jax.device_get((tokens, self.config.keys(jnp.asarray(mask))))

    def _tokens(self, ids: np.ndarray, types: np.ndarray | None = None) -> tuple[jax.Array, ...]:
        """What enters the embedding's lookups: of the words, and of the types where there are any."""
        encode = self.config.embedding.encode
        words = encode(jnp.asarray(ids), self.config.vocab_size)
        return (words,) if types is None else (words, encode(jnp.asarray(types), self.config.type_vocab_size))


class SecureClassifier(Client):
    """A sequence classifier whose folded form runs on secret shares; its weights stay resident between calls.

    Attributes:
        function: what runs on shares: (weights, *what the client shares) -> logits.
        weights: resident.
    """

    def __init__(self, loaded: folders.LoadedModel, parties: secure.Parties):
        """Folds the model and shares its weights.

        Args:
            loaded: see `flaxmpc.models.folder.load`.
            parties: who computes.

        Raises:
            ValueError: the model is no sequence classifier.
        """
        self.model, function, client_params, secret_params = _folded(
            loaded, grouped_heads=parties.config.grouped_products
        )
        self.plain, self.plain_params, tokenizer, _ = loaded
        super().__init__(self.model, tokenizer, client_params)
        self.function = function
        self._secure = secure.jit(function, parties=parties)
        self.weights = parties.put(secret_params)
        self._apply = jax.jit(self.plain.apply)

    @classmethod
    def from_folder(cls, folder: str | Path, parties: secure.Parties) -> "SecureClassifier":
        return cls(folders.load(folder), parties)

    def classify(self, texts: Sequence[str]) -> Inference:
        """All sentences in one secure run.

        Raises:
            ValueError: see `encode`.
            secure.SecureError: the run failed.
        """
        ids, mask, truncated = self.encode(texts)
        logits, plain, cost = self.logits(ids, mask)
        scores = np.asarray(jax.nn.softmax(logits))
        predictions = [
            Prediction(
                text=text,
                label=self.config.id2label[int(row.argmax())],
                score=float(score.max()),
                logits=row.tolist(),
                logits_plaintext=in_clear.tolist(),
                truncated=cut,
            )
            for text, row, score, in_clear, cut in zip(texts, logits, scores, plain, truncated, strict=True)
        ]
        return Inference(predictions, cost)

    def logits(self, ids: np.ndarray, mask: np.ndarray, types: np.ndarray | None = None) -> Logits:
        """The logits of encoded sentences or pairs, see `share`; those in the clear are of the model as trained."""
        secret, cost = self._secure.run(self.weights, *self.share(ids, mask, types))
        words, *kinds = self._tokens(ids, types)
        return Logits(secret, np.asarray(self._apply({"params": self.plain_params}, words, mask, *kinds)), cost)

    def estimate(self, num_tokens: int, batch_size: int) -> secure.Cost:
        """What classifying `batch_size` sentences of up to `num_tokens` tokens costs; measured on zeros.

        Raises:
            ValueError: more tokens than the model has positions, or fewer than one of either.
        """
        most = self.config.max_position_embeddings
        if not 1 <= num_tokens <= most or batch_size < 1:
            raise ValueError(
                f"the model takes 1 to {most} tokens and at least one sentence, not {num_tokens} and {batch_size}"
            )
        ids = np.zeros((batch_size, self.bucket(num_tokens)), np.int32)
        return self._secure.estimate(self.weights, *self.share(ids, np.ones_like(ids)))
