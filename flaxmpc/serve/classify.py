"""Does the client's half of a model: makes of texts what becomes secret shares, and of opened logits answers."""

import abc
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxmpc import secure
from flaxmpc.data.batches import Encoded, Split, Text, encode, padded
from flaxmpc.models.base import TEXTS, WithHead
from flaxmpc.models.config import EncoderConfig
from flaxmpc.nn.mask import Mask
from flaxmpc.serve.answers import Inference, Prediction, Read, head, predict

# The lengths, in tokens, of which a text is padded to the first that holds it, see `Client.bucket`.
_LENGTHS = (16, 32, 64, 128, 256, 512)


def buckets(longest: int) -> list[int]:
    """The lengths that a model's texts are padded to; `longest` is the most tokens of a text."""
    return [*(length for length in _LENGTHS if length < longest), longest]


def limit(config: EncoderConfig) -> str:
    """Says for a message how many tokens a model's texts may have, and why."""
    why = "has positions for" if config.model_max_length is None else "was trained and measured for"
    return f"{config.longest} tokens, all that the model {why}"


class TextError(ValueError):
    """A text that no model can answer.

    Attributes:
        place: the place of the text among those given, from 0.
        reason: what is wrong with the text.
    """

    def __init__(self, place: int, total: int, reason: str):
        super().__init__(f"text {place + 1} of {total} {reason}")
        self.place = place
        self.reason = reason


class TextRun(NamedTuple):
    """Texts of one length that are computed together.

    Attributes:
        places: the places of the texts among those given.
        ids, mask: token ids and mask, (batch, token); rows beyond the texts only fill up.
        types: HF's token_type_ids of pairs, (batch, token); None: all are 0.
    """

    places: Sequence[int]
    ids: np.ndarray
    mask: np.ndarray
    types: np.ndarray | None


class Client:
    """The client's half of a classifier: texts to what becomes secret shares. It holds no secret of the model."""

    def __init__(
        self,
        model: WithHead,
        tokenizer: Any,
        params: dict[str, Any],
        lengths: Sequence[int] | None = None,
        encoding: secure.Encoding | None = None,
    ):
        """Takes what a client needs of a model.

        Args:
            model: the model whose texts they are.
            tokenizer: a fast tokenizer, see `flaxmpc.models.folder.load_tokenizer`.
            params: the parameters of the embedding, if the client embeds; see `flaxmpc.serve.private.private`.
            lengths: the lengths that texts are padded to; by default `buckets`.
            encoding: how what is shared and opened is encoded, where the model's bits are planned.

        Raises:
            ValueError: the model's logits have no meaning, see `flaxmpc.serve.answers.head`.
        """
        self.config = model.config
        self.kind = head(model)
        self._model = model
        self.tokenizer = tokenizer
        self.client_params = params
        self.lengths = sorted(lengths or buckets(self.config.longest))
        self.encoding = encoding
        self._embed = jax.jit(functools.partial(model.apply, method="embed"))

    def bucket(self, num_tokens: int) -> int:
        """The length that a text of `num_tokens` tokens is padded to, which the computing parties see."""
        found = next((length for length in self.lengths if num_tokens <= length), None)
        if found is None:
            raise ValueError(f"a text has {num_tokens} tokens; the model is served for at most {self.lengths[-1]}")
        return found

    def encode(self, texts: Sequence[Text]) -> Encoded:
        """Makes token ids and types of texts or pairs, cut at `EncoderConfig.longest`.

        Raises:
            TextError: a text that is empty, or of the wrong form: a pair where the model takes single texts, one
                where it takes pairs, or where the first was the other.
            ValueError: no text. Or a tokenizer that is not the model's.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts are a list of them, not one string: [{texts!r:.60}]")
        if not texts:
            raise ValueError("there is no text to classify")
        pairs = self._pairs
        if pairs is None:
            pairs = _is_pair(texts[0])
        for place, text in enumerate(texts):
            if reason := _malformed(text) or (self._wrong_form(pairs) if _is_pair(text) != pairs else None):
                raise TextError(place, len(texts), reason)
        if self.kind.masks and self.tokenizer.mask_token is None:
            raise ValueError("the model gives the words at masked tokens, but its tokenizer has no such token")
        encoded = encode(self.tokenizer, texts, self.config.longest)
        special = self.tokenizer.num_special_tokens_to_add(pairs)
        # By itself, as not every family tells the texts of a pair apart.
        sides = [side for pair in texts for side in pair] if pairs else []
        empty = [not ids for ids in self.tokenizer(sides, add_special_tokens=False)["input_ids"]] if pairs else []
        for place, row in enumerate(encoded.input_ids):
            if row.max() >= self.config.vocab_size:
                raise ValueError(
                    f"the tokenizer gives token {row.max()}, but the model has {self.config.vocab_size}: "
                    "they do not belong together"
                )
            if any(empty[2 * place : 2 * place + 2]) or len(row) <= special:
                raise TextError(place, len(texts), "has no token: the tokenizer drops all that it holds")
            if self.config.counts_from_padding and self.config.pad_token_id in row:
                raise TextError(place, len(texts), f"holds {self.tokenizer.pad_token}, the padding token")
            if self.kind.masks and self.tokenizer.mask_token_id not in row:
                where = f" among its first {len(row)} tokens" if encoded.truncated[place] else ""
                raise TextError(place, len(texts), f"has no {self.tokenizer.mask_token}{where}")
        return encoded

    @property
    def _pairs(self) -> bool | None:
        """Whether texts are pairs; None: the first of them says it."""
        if self.config.num_texts is None or self.kind.pairs is not None:
            return self.kind.pairs
        return self.config.num_texts == 2

    def _read(self, text: Text) -> Any:
        """A `tokenizers.Encoding`: the tokens that `encode` makes of the text, and where they stand in it."""
        sides = (text,) if isinstance(text, str) else text
        return self.tokenizer(*sides, truncation=True, max_length=self.config.longest).encodings[0]

    def _wrong_form(self, pairs: bool) -> str:
        """Why a text is refused that is no pair where pairs are wanted, or the reverse."""
        one, other = ("a single text", "a pair of texts") if pairs else ("a pair of texts", "a single text")
        why = "the first is {}" if self._pairs is None else "the model takes {}"
        if self.kind.pairs is None and self.config.num_texts is not None:
            why = "the model was trained on {} at a time"
        return f"is {one}, but {why.format(other)}"

    def runs(
        self, encoded: Encoded | Split, places: Iterable[int], sizes: Callable[[int], Sequence[int]]
    ) -> Iterator[TextRun]:
        """Puts texts together in runs that answer them, the shortest texts first.

        Args:
            encoded: all texts, see `encode`.
            places: the places of those to answer; none is longer than the last of `lengths`.
            sizes: (length) -> the numbers of rows that a run of that length may have, ascending.
        """
        by_length: dict[int, list[int]] = {length: [] for length in self.lengths}
        for place in places:
            by_length[self.bucket(len(encoded.input_ids[place]))].append(place)
        for length, left in by_length.items():
            while left:
                size = next((size for size in reversed(sizes(length)) if size <= len(left)), sizes(length)[0])
                yield self.run(encoded, left[:size], size)
                left = left[size:]

    def run(self, encoded: Encoded | Split, places: Sequence[int], size: int) -> TextRun:
        """Makes a run of `size` rows: texts of one length, then copies of the first of them."""
        length = max(self.bucket(len(encoded.input_ids[place])) for place in places)
        ids, mask, types = padded(encoded, places, (size, length), self.config.pad_token_id)
        return TextRun(places, ids, mask, None if encoded.token_type_ids is None else types)

    def share(self, ids: np.ndarray, mask: np.ndarray, types: np.ndarray | None = None) -> tuple[Any, Mask]:
        """Makes of encoded texts what becomes secret shares: embeddings or one-hot tokens, and the mask.

        Args:
            ids, mask: token ids and mask, (batch, token).
            types: HF's token_type_ids of pairs, (batch, token); None: all are 0.

        Raises:
            ValueError: more tokens than `EncoderConfig.longest`, or an id that the model does not have; or numbers
                beyond what the plan of bits has room for.
        """
        if ids.shape[1] > self.config.longest:
            raise ValueError(f"a text has {ids.shape[1]} tokens; it may have {limit(self.config)}")
        if types is None and self.config.shares_types:
            types = np.zeros_like(ids)
        tokens: Any = self._tokens(ids, types)
        if self.config.embedding.client_embeds:
            tokens = self._embed({"params": self.client_params}, *tokens, attention_mask=jnp.asarray(mask))
        shared = jax.device_get((tokens, self.config.mask(jnp.asarray(mask))))
        return shared if self.encoding is None else self.encoding.encode(shared)

    def opened(self, outputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What was opened of a run, as the model has it. ValueError: it is something else."""
        return list(outputs if self.encoding is None else self.encoding.decode(list(outputs)))

    def _tokens(self, ids: np.ndarray, types: np.ndarray | None = None) -> tuple[jax.Array, ...]:
        """What the embedding looks up: one array for the words, and one for the types where there are any."""

        def encoded(name: str, ids: np.ndarray, size: int) -> jax.Array:
            if ids.min() < 0 or ids.max() >= size:  # JAX would take another row without a word
                raise ValueError(f"{name} {ids.min()} to {ids.max()}: the model has 0 to {size - 1}")
            return self.config.embedding.encode(jnp.asarray(ids), size)

        words = encoded("input_ids", ids, self.config.vocab_size)
        known = self.config.type_vocab_size
        return (words,) if types is None or not known else (words, encoded("token_type_ids", types, known))


def _is_pair(text: Any) -> bool:
    return not isinstance(text, str)


def _malformed(text: Any) -> str | None:
    """Why a text, or a pair, can't be read; None: it can."""
    sides = [text] if isinstance(text, str) else text
    form = isinstance(text, str) or (isinstance(text, (list, tuple)) and len(text) == 2)
    if not form or not all(isinstance(side, str) for side in sides):
        return f"is {text!r:.60}, neither a string nor a pair of strings"
    for side in sides:
        if not side.strip():
            return "is empty"
        try:
            side.encode()
        except UnicodeEncodeError as error:
            return f"holds half a surrogate pair, {side[error.start]!r}, at character {error.start + 1}"
    return None


class Classifier(Client, abc.ABC):
    """A client that asks a model: it makes predictions of texts. A subclass says who computes."""

    @abc.abstractmethod
    def sizes(self, length: int) -> Sequence[int]:
        """The numbers of rows that a run of that length may have, ascending."""

    @abc.abstractmethod
    def answer(self, run: TextRun) -> tuple[np.ndarray, np.ndarray | None, secure.Cost]:
        """Asks for one run: its logits on shares, those in the clear or None, and its cost.

        They are (batch, label), or (batch, token, output), see `WithHead.logits_shape`.

        The logits of a row are NaN where the model is known to have diverged.
        """

    def classify(
        self, texts: Sequence[Text], progress: Callable[[list[TextRun]], Iterable[TextRun]] = list
    ) -> Inference:
        """Answers texts, or pairs of them, in runs of texts of about one length.

        A text that has no answer has an error in its place: a model may diverge on it, or not be served for its length
        (if it is for none of the texts, that is raised).

        Args:
            texts: strings, or pairs of strings.
            progress: is given all runs, and asked for one after the other; such as `rich.progress.track`.

        Returns:
            The answers in the order of the texts, and their cost.

        Raises:
            ValueError: see `encode`.
            secure.SecureError: a run failed.
        """
        encoded = self.encode(texts)
        predictions: dict[int, Prediction] = {}
        for place, row in enumerate(encoded.input_ids):
            try:
                self.bucket(len(row))
            except ValueError as error:
                predictions[place] = Prediction(texts[place], bool(encoded.truncated[place]), error=str(error))
        if len(predictions) == len(texts):
            raise TextError(0, len(texts), f"has no answer: {predictions[0].error}")
        costs: list[secure.Cost] = []
        runs = list(self.runs(encoded, sorted(set(range(len(texts))) - set(predictions)), self.sizes))
        for run in progress(runs):
            logits, plain, cost = self.answer(run)
            costs.append(cost)
            for row, place in enumerate(run.places):
                read = Read(texts[place], self.tokenizer, self._read(texts[place]))
                own = ... if self._model.task == TEXTS else slice(len(read.encoding.ids))
                in_clear = None if plain is None else plain[row][own]
                cut = bool(encoded.truncated[place])
                predictions[place] = predict(read, logits[row][own], in_clear, self._model, cut, cost)
        return Inference([predictions[place] for place in range(len(texts))], functools.reduce(operator.add, costs))
