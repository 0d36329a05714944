"""Texts answered on secret shares: where the models meet the secure runtime."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxmpc import secure
from flaxmpc.data.batches import Text
from flaxmpc.models import folder as folders
from flaxmpc.models.base import defer, param_shapes, without_embeddings
from flaxmpc.models.config import EncoderConfig
from flaxmpc.nn.layers import STRAINS
from flaxmpc.nn.mask import Mask
from flaxmpc.nn.normalization import CHEBYSHEV, Linear, Ranged
from flaxmpc.nn.product import Product, grouped_conv, grouped_conv_of_less_work, matmul
from flaxmpc.serve import plans
from flaxmpc.serve.classify import Classifier, Client, TextRun, limit

# From this `_strain` on an answer is none. Where all variances are in range it is 0.2 to 0.6.
_MOST_STRAIN = 1.0

# Tokens of a run, padding included: memory grows with them.
_RUN_TOKENS = 1024


class Logits(NamedTuple):
    """Logits of one secure run, see `WithHead.logits_shape`: opened from the shares, and in the clear; and its cost."""

    secret: np.ndarray
    plain: np.ndarray
    cost: secure.Cost


class Private(NamedTuple):
    """A model in two: what its client computes, and what runs on shares.

    Attributes:
        model: the model as it was trained; its `embed` is the client's where the embedding is public.
        client_params: the embedding's, where the client embeds; else nothing.
        function: (weights, what the client shares, mask) -> what was asked for, the logits.
        weights: secret numpy arrays by name; jax.ShapeDtypeStruct where the parameters are.
        encoding: how what is shared and opened is encoded, where the function follows a plan of bits.
    """

    model: Any
    client_params: dict[str, Any]
    function: Callable[..., Any]
    weights: dict[str, Any]
    encoding: secure.Encoding | None = None

    def client(self, tokenizer: Any) -> Client:
        """Who makes and shares what the function takes."""
        return Client(self.model, tokenizer, self.client_params, encoding=self.encoding)

    def planned(self, plan: secure.BitPlan) -> "Private":
        """The same by a plan of bits."""
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in self.weights.values()):
            weights = {name: jax.ShapeDtypeStruct(leaf.shape, np.int64) for name, leaf in self.weights.items()}
        else:
            weights = plan.encoding().encode(self.weights)
        encoding = plan.encoding(len(self.weights))
        return self._replace(function=secure.Fixed(self.function, plan), weights=weights, encoding=encoding)


def private(model: Any, params: dict[str, Any], config: secure.Config, *, checked: bool = False) -> Private:
    """Folds a model: it runs on a lazy state, and what depends on weights alone is computed here, in float64.

    With a public embedding the client shares embeddings (batch, token, hidden), else one-hot tokens.

    Args:
        model, params: a trained model; with jax.ShapeDtypeStruct leaves, what its programs are compiled from.
        config: the parties' settings: they say whether many small products are computed one by one or grouped.
        checked: whether it also gives how far its normalisations are out of range, see `_strain`.

    Raises:
        ValueError: it is to be checked, and may diverge where no normalisation that has a range would tell.
    """
    own: EncoderConfig = model.config
    if checked:
        _require_ranges(own)
    embeds = own.embedding.client_embeds
    product = product_for(config)
    client_params, secret_params = without_embeddings(model, params) if embeds else ({}, params)
    if model.reads_embeddings:
        secret_params = params

    def on_shares(params: dict[str, Any], shared: Any, mask: Mask) -> Any:
        if not embeds:
            # A state with a unit is 0 at padding.
            needed = mask.tokens if own.score_degree is None else None
            shared = model.apply({"params": params}, *shared, attention_mask=needed, method="embed")
        state = defer(own, shared, mask, product)
        if not checked:
            return model.apply({"params": params}, state, mask, method="from_embeddings")
        logits, made = model.apply({"params": params}, state, mask, method="from_embeddings", mutable=[STRAINS])
        return logits, _strain(jax.tree.leaves(made), mask)

    function, weights = secure.hoist(on_shares, secret_params, *_example(own), dtype="float64")
    return Private(model, client_params, function, weights)


def product_for(config: secure.Config) -> Product:
    """How parties compute many small products: those with the fraction bits of plans truncate few of them."""
    if not config.grouped_products:
        return matmul
    return grouped_conv_of_less_work if config.fraction_bits == secure.FRACTION_BITS else grouped_conv


def _example(config: EncoderConfig) -> tuple[Any, Mask]:
    """What a client shares of a text, as shapes."""
    shape = (1, min(2, config.longest))
    mask = jax.eval_shape(config.mask, jax.ShapeDtypeStruct(shape, np.int32))
    if config.embedding.client_embeds:
        return jax.ShapeDtypeStruct((*shape, config.hidden_size), np.float32), mask
    sizes = [config.vocab_size, config.type_vocab_size] if config.shares_types else [config.vocab_size]
    ids = jax.ShapeDtypeStruct(shape, np.int32)
    return tuple(jax.eval_shape(lambda ids, n=n: config.embedding.encode(ids, n), ids) for n in sizes), mask


def _strain(strains: list[jax.Array], mask: Mask) -> jax.Array:
    """How far a model's normalisations are out of their ranges, (text,): the mean fourth power of their strains.

    Fixed point has no NaN: where a model diverges, or a number leaves the ring, what is opened looks like any other
    logits. But whatever goes wrong changes the variance of a normalisation that follows. The result of that one shows
    nothing, as a polynomial that is out of range may pass through the wrong root, or its negative; the strain does, as
    it grows faster than the error does. One number a text is opened, to its client.

    Args:
        strains: (text, token, 1) each; where the last layer computes the first token alone, that token's.
    """
    if not strains:
        return jnp.zeros(mask.tokens.shape[0])
    # Side by side, as one product takes as many rounds as many. Padding goes first: 0 times a number is rounded, and a
    # power of that number would multiply the rounding.
    weight = jnp.concatenate([mask.fourth_root[:, : each.shape[1]] for each in strains], 1)
    square = jnp.square(jnp.concatenate(strains, 1)[..., 0] * weight)
    return jnp.square(square).sum(-1) / len(strains)


def _require_ranges(config: EncoderConfig) -> None:
    """ValueError: a state that no normalisation bounds goes to no normalisation that has a range."""
    after = False
    for layer in reversed(range(config.num_hidden_layers)):
        norm = config.layer_norms_of(layer)[1]
        if isinstance(norm, Linear) and not after:
            raise ValueError(
                f"{norm.name!r} after the feed-forward of layer {layer} needs a later normalisation that has a range, "
                f"such as {CHEBYSHEV.name!r}: else nobody would see that the model diverges"
            )
        after = after or any(isinstance(part, Ranged) for part in config.layer_norms_of(layer))


def answered(logits: np.ndarray, strain: np.ndarray) -> np.ndarray:
    """The opened logits (text, ...), NaN where the model diverged, see `_strain`."""
    bounded = (np.abs(strain) < _MOST_STRAIN).reshape(-1, *[1] * (logits.ndim - 1))
    return np.where(bounded, logits, np.nan)


def private_classifier(loaded: folders.LoadedModel, config: secure.Config, *, checked: bool = False) -> Private:
    """`private` of a loaded model. Where the parties follow a plan of bits it is by that, and checked.

    Raises:
        ValueError: its plan is broken, or the fraction bits are for plans alone, see
            `plans.follows`; it cannot be checked, see `private`.
    """
    planned = plans.follows(loaded.folder, config)
    found = private(loaded.model, loaded.params, config, checked=checked or planned)
    return found.planned(plans.read(loaded.folder, found.weights)) if planned else found


def without_weights(folder: Path, config: secure.Config) -> Private:
    """A folder's model in two where its weights are not at hand: what runs on shares is checked.

    Its `client_params` are zeros, and its weights jax.ShapeDtypeStruct. ValueError: as of `private_classifier`.
    """
    model, planned = folders.read_model(folder), plans.follows(folder, config)
    found = private(model, param_shapes(model), config, checked=True)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), found.client_params)
    found = found._replace(client_params=zeros)
    return found.planned(plans.read(folder, None)) if planned else found


def check(
    loaded: folders.LoadedModel, texts: Sequence[Text], *, ring: str = "FM64", fraction_bits: int = 18
) -> secure.Margins:
    """How far a classifier, as it runs on shares, stays from overflow on these texts; computed in the clear.

    Every text is a run of its own.

    Raises:
        ValueError: see `Client.encode` and `secure.check`.
    """
    client = Client(loaded.model, loaded.tokenizer, {})
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
        ValueError: see `secure.check`.
    """
    found = private_classifier(loaded, secure.Config())
    client = found.client(loaded.tokenizer)
    weights = jax.device_put(found.weights)
    inputs = ((weights, *client.share(*run)) for run in runs)
    settings = {"ring": ring, "fraction_bits": fraction_bits, "exp_mode": secure.MODEL_EXP_MODE}
    return secure.check(found.function, inputs, **settings)


class Trial(NamedTuple):
    """A plan, and what it does to logits on the texts that it was made from, in the clear.

    Attributes:
        plan: the plan.
        difference: the largest, of a logit beside the model's own.
        same_labels: how many of the texts have the same label.
        texts: how many there are.
    """

    plan: secure.BitPlan
    difference: float
    same_labels: int
    texts: int


def plan_bits(
    loaded: folders.LoadedModel,
    texts: Sequence[Text],
    *,
    error: float = 0.02,
    progress: Callable[[str], object] = lambda _: None,
) -> Trial:
    """Plans a classifier's bits from texts, keeps the plan in its folder, and tries it in the clear.

    Args:
        loaded: the model, see `flaxmpc.models.folder.load`.
        texts: texts such as the model is for: the plan is for numbers as large as theirs.
        error: the largest standard deviation of a logit that roundings may make, see `secure.plan`.
        progress: is told what is done next, for minutes; such as `print`.

    Raises:
        ValueError: no text, or one that the model does not take; no plan has the error, see `secure.plan`.
        SecureError: a part of the model has more than sums and products, such as a division; names it.
    """
    found = private(loaded.model, loaded.params, secure.Config(fraction_bits=secure.FRACTION_BITS), checked=True)
    client = found.client(loaded.tokenizer)
    encoded = client.encode(texts)
    runs = [client.run(encoded, [place], 1) for place in range(len(texts))]
    shared = [client.share(run.ids, run.mask, run.types) for run in runs]

    def batches(doing: str) -> Iterator[tuple[Any, ...]]:
        for number, each in enumerate(shared, 1):
            progress(f"{doing} text {number} of {len(shared)}, in the clear")
            yield found.weights, *each

    plan = secure.plan(found.function, batches("looking at"), error=error, progress=progress)
    fixed, plain = secure.Fixed(found.function, plan), jax.jit(found.function)
    logits = [(fixed.clear(*each)[0], np.asarray(plain(*each)[0])) for each in batches("trying the plan on")]
    plans.write(loaded.folder, found.weights, plan)
    return Trial(
        plan,
        max(float(np.abs(ours - theirs).max()) for ours, theirs in logits),
        sum(bool((ours.argmax(-1) == theirs.argmax(-1)).all()) for ours, theirs in logits),
        len(texts),
    )


def visibility(public_weights: bool) -> str:
    """How parties hold the weights, see `secure.Parties.put`."""
    return "public" if public_weights else "secret"


class SecureClassifier(Classifier):
    """A model that runs on secret shares; its weights stay resident between calls.

    Where its folder has a plan of bits, and the parties have `secure.FRACTION_BITS` and one of `plans.FOLLOWED_BY`, it
    runs as the plan says.

    Attributes:
        model: the model as it was trained.
        function: what runs on shares: (weights, *what the client shares) -> logits, and with a plan the strain, see
            `answered`.
        weights: resident.
    """

    def __init__(self, loaded: folders.LoadedModel, parties: secure.Parties, *, public_weights: bool = False):
        """Folds the model and shares its weights, see `private`.

        Args:
            loaded: the model and its tokenizer, see `flaxmpc.models.folder.load`.
            parties: who computes.
            public_weights: whether every party may know the weights: then only texts and answers are secret.

        Raises:
            ValueError: the model's logits have no meaning, or its plan is broken; or the parties' fraction bits are for
                plans alone, see `plans.follows`.
        """
        found = private_classifier(loaded, parties.config)
        super().__init__(found.model, loaded.tokenizer, found.client_params, encoding=found.encoding)
        self.model, self.function, self._params = found.model, found.function, loaded.params
        self._secure = secure.jit(self.function, parties=parties)
        self.weights = parties.put(found.weights, visibility(public_weights))
        self._apply = jax.jit(self.model.apply)

    @classmethod
    def from_folder(
        cls, folder: str | Path, parties: secure.Parties, *, public_weights: bool = False
    ) -> "SecureClassifier":
        return cls(folders.load(folder), parties, public_weights=public_weights)

    def sizes(self, length: int) -> Sequence[int]:
        """Any number, as far as memory goes."""
        return range(1, max(1, _RUN_TOKENS // length) + 1)

    def answer(self, run: TextRun) -> Logits:
        return self.logits(run.ids, run.mask, run.types)

    def logits(self, ids: np.ndarray, mask: np.ndarray, types: np.ndarray | None = None) -> Logits:
        """The logits of encoded texts or pairs, see `share`; those in the clear are of the model as trained."""
        outputs, cost = self._secure.run(self.weights, *self.share(ids, mask, types))
        secret, *strain = self.opened(jax.tree.leaves(outputs))
        secret = answered(secret, *strain) if strain else secret
        words, *kinds = self._tokens(ids, types)
        return Logits(secret, np.asarray(self._apply({"params": self._params}, words, mask, *kinds)), cost)

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
