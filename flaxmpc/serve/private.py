"""Texts classified on secret shares: where the models meet the secure runtime."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxmpc import secure
from flaxmpc.convert.fold import fold, fold_config
from flaxmpc.data.batches import Text
from flaxmpc.models import folder as folders
from flaxmpc.models.bert import BertForSequenceClassification, param_shapes
from flaxmpc.nn.attention import Keys
from flaxmpc.nn.normalization import square_mean_by_product
from flaxmpc.serve.classify import Classifier, Client, TextRun, limit

# Tokens of a run, padding included: memory grows with them.
_RUN_TOKENS = 1024


class Logits(NamedTuple):
    """Logits (row, label) of one secure run: opened from the shares, and in the clear; and what it cost."""

    secret: np.ndarray
    plain: np.ndarray
    cost: secure.Cost


def split_at_shares(model: Any, params: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """What the client computes, and what runs on shares: (`secure_function`, client's params, secret params).

    With a client-side embedding the client keeps its table; else it has nothing.
    """
    if not model.config.embedding.client_embeds:
        return secure_function(model), {}, params
    encoder = {name: dict(tree) if name == "bert" else tree for name, tree in params.items()}
    table = encoder["bert"].pop("embeddings")
    return secure_function(model), {"bert": {"embeddings": table}}, encoder


def secure_function(model: Any, method: Any = "from_embeddings") -> Callable[..., Any]:
    """What runs on shares: (secret params, what the client shares, keys) -> what `method` gives, the head's output.

    With a client-side embedding the client shares embeddings, else one-hot tokens.
    """

    def from_embeddings(params: dict[str, Any], embeddings: jax.Array, keys: Keys) -> Any:
        return model.apply({"params": params}, embeddings, keys, method=method)

    def from_tokens(params: dict[str, Any], tokens: tuple[jax.Array, ...], keys: Keys) -> Any:
        embeddings = model.apply({"params": params}, *tokens, attention_mask=keys.mask, method="embed")
        return from_embeddings(params, embeddings, keys)

    return from_embeddings if model.config.embedding.client_embeds else from_tokens


def logits_and_size(model: Any, embeddings: jax.Array, keys: Keys) -> tuple[jax.Array, jax.Array]:
    """A method of a folded sequence classifier for `secure_function`: its logits, and the size of what they read.

    Fixed point has no NaN: where a model diverges, what is opened looks like any other logits. But its last LayerNorm
    then leaves a state whose size (text,) is not 1 but thousands. It is one number a text, opened to its client.
    """
    hidden, _ = model.bert.from_embeddings(embeddings, keys)
    return model.head(hidden, deterministic=True), square_mean_by_product(hidden[:, 0])[:, 0]


class _Folded(NamedTuple):
    """A classifier as it runs on shares; see `split_at_shares` for what follows the model."""

    model: BertForSequenceClassification
    function: Any
    client_params: dict[str, Any]
    secret_params: dict[str, Any]


def sequence_classifier(model: Any, folder: Path) -> BertForSequenceClassification:
    """The model that a folder holds. ValueError: it is another."""
    if not isinstance(model, BertForSequenceClassification):
        raise ValueError(f"{folder} holds a {type(model).__name__}, not a sequence classifier")
    return model


def _folded(loaded: folders.LoadedModel, *, grouped_heads: bool = True) -> _Folded:
    """ValueError: the model is no sequence classifier."""
    params, config = fold(loaded.params, sequence_classifier(loaded.model, loaded.folder).config)
    model = BertForSequenceClassification(dataclasses.replace(config, grouped_heads=grouped_heads))
    return _Folded(model, *split_at_shares(model, params))


def plan(
    trained: BertForSequenceClassification, *, grouped_heads: bool
) -> tuple[BertForSequenceClassification, dict[str, Any], secure.Planned]:
    """What programs are compiled for where a model's weights are not at hand.

    Returns:
        The model as it runs on shares, zeros in place of the client's params, and what its weights will be.
    """
    model = BertForSequenceClassification(dataclasses.replace(fold_config(trained.config), grouped_heads=grouped_heads))
    _, client_params, secret_params = split_at_shares(model, param_shapes(model))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), client_params)
    return model, zeros, secure.Planned(secret_params)


def check(
    loaded: folders.LoadedModel, texts: Sequence[Text], *, ring: str = "FM64", fraction_bits: int = 18
) -> secure.Margins:
    """How far a classifier, as it runs on shares, stays from overflow on these texts; computed in the clear.

    Every text is a run of its own.

    Raises:
        ValueError: see `Client.encode` and `secure.check`; or the model is no sequence classifier.
    """
    model, _, client_params, _ = _folded(loaded)
    client = Client(model, loaded.tokenizer, client_params)
    encoded = client.encode(texts)
    runs = (client.run(encoded, [place], 1) for place in range(len(texts)))
    return check_encoded(
        loaded, ((run.ids, run.mask, run.types) for run in runs), ring=ring, fraction_bits=fraction_bits
    )


def check_encoded(
    loaded: folders.LoadedModel,
    runs: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray | None]],
    *,
    ring: str = "FM64",
    fraction_bits: int = 18,
) -> secure.Margins:
    """The same for runs of encoded texts or pairs: ids, mask and types as `Client.share` takes them.

    Raises:
        ValueError: see `secure.check`; or the model is no sequence classifier.
    """
    model, function, client_params, secret_params = _folded(loaded)
    client = Client(model, loaded.tokenizer, client_params)
    secret_params = jax.device_put(secret_params)
    inputs = ((secret_params, *client.share(*run)) for run in runs)
    return secure.check(function, inputs, ring=ring, fraction_bits=fraction_bits)


class SecureClassifier(Classifier):
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
            ValueError: the model is no sequence classifier, or its logits have no meaning.
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

    def sizes(self, length: int) -> Sequence[int]:
        """Any number, as far as memory goes."""
        return range(1, max(1, _RUN_TOKENS // length) + 1)

    def answer(self, run: TextRun) -> Logits:
        return self.logits(run.ids, run.mask, run.types)

    def logits(self, ids: np.ndarray, mask: np.ndarray, types: np.ndarray | None = None) -> Logits:
        """The logits of encoded texts or pairs, see `share`; those in the clear are of the model as trained."""
        secret, cost = self._secure.run(self.weights, *self.share(ids, mask, types))
        words, *kinds = self._tokens(ids, types)
        return Logits(secret, np.asarray(self._apply({"params": self.plain_params}, words, mask, *kinds)), cost)

    def estimate(self, num_tokens: int, batch_size: int) -> secure.Cost:
        """What classifying `batch_size` texts of up to `num_tokens` tokens in one run costs; measured on zeros.

        Raises:
            ValueError: more tokens than the model takes, or fewer than one of either.
        """
        if not 1 <= num_tokens <= self.config.longest:
            raise ValueError(f"a text has 1 to {limit(self.config)}; {num_tokens} were asked for")
        if batch_size < 1:
            raise ValueError(f"a run has at least one text, not {batch_size}")
        ids = np.zeros((batch_size, self.bucket(num_tokens)), np.int32)
        return self._secure.estimate(self.weights, *self.share(ids, np.ones_like(ids)))
