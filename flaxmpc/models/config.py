"""What the configs of all families have in common: HF's field names, plus the parts."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from jax import Array

from flaxmpc import files
from flaxmpc.errors import brief, unknown
from flaxmpc.nn.activation import ACTIVATIONS, ActivationPart
from flaxmpc.nn.attention import ATTENTION, AttentionPart, PerHead, Shareable, common_degree
from flaxmpc.nn.embedding import EMBEDDINGS
from flaxmpc.nn.mask import Mask
from flaxmpc.nn.normalization import EXACT, NORMALIZATIONS, Normalization

# HF's names for activations that have another name here.
_HF_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_HF_HAS = ("gelu", "gelu_tanh", "relu", "silu")

# Fields of HF's config.json that say something these models cannot do when they have another value.
_HF_REQUIRED = {"position_embedding_type": "absolute", "is_decoder": False}

# Before HF's model_type, in a config.json whose parts HF does not have: it would load another function without a word.
OWN = "flaxmpc-"

MOST_TOKENS, MOST_POSITIONS = 1_000_000, 65_536
"""Of a vocabulary, and of a text. The limits here are beyond any published BERT; they bound what a file may ask for."""

MOST_WIDE = 16_384
"""Numbers in a state, or in a row of a table of embeddings."""

_MOST_PARAMETERS = 1_000_000_000  # of a model without its head
_MOST_LABELS = 1_000_000

# What the fields that are no part may be: whole numbers in a range, numbers from 0 to below one, true or false.
_WHOLE = {
    "vocab_size": (1, MOST_TOKENS),
    "hidden_size": (1, MOST_WIDE),
    "num_hidden_layers": (0, 128),
    "num_attention_heads": (1, 256),
    "intermediate_size": (1, 65_536),
    "layers_sharing_scores": (1, 128),
    **dict.fromkeys(("max_position_embeddings", "model_max_length"), (1, MOST_POSITIONS)),
    "type_vocab_size": (0, 1_024),
    "pad_token_id": (0, MOST_TOKENS - 1),
}
_BELOW = {
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"), 1.0),
    **dict.fromkeys(("initializer_range", "layer_norm_eps"), math.inf),
}
_MAY_BE_NONE = ("classifier_dropout", "model_max_length")

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def no_model_folder(path: Path) -> FileNotFoundError:
    """The error for what should be a model's folder and is none."""
    return FileNotFoundError(f"{path} is {'a file, not the folder of a model' if path.is_file() else 'no folder'}")


def _attention(spec: Any) -> AttentionPart:
    """A name, an object, or a list with one for every head."""
    if isinstance(spec, (list, tuple)):
        return PerHead(tuple(ATTENTION.resolve(head) for head in spec))
    return ATTENTION.resolve(spec)


def _attention_spec(part: AttentionPart) -> Any:
    return [ATTENTION.spec(head) for head in part.parts] if isinstance(part, PerHead) else ATTENTION.spec(part)


def _layer_norms(spec: Any) -> Any:
    """One for both LayerNorms of a layer, or a pair: after attention, after the feed-forward."""
    if isinstance(spec, (list, tuple)):
        if len(spec) != 2:
            raise ValueError(f"a layer has two LayerNorms, not {len(spec)}: {brief(spec)}")
        return tuple(NORMALIZATIONS.resolve(part) for part in spec)
    return NORMALIZATIONS.resolve(spec)


def _layer_norms_spec(part: Any) -> Any:
    return [NORMALIZATIONS.spec(p) for p in part] if isinstance(part, tuple) else NORMALIZATIONS.spec(part)


def _check(field: str, value: Any, whole: Mapping[str, tuple[int, int]]) -> None:
    """ValueError with the field, its value and what it may be."""
    if value is None and field in _MAY_BE_NONE:
        return
    number: Any = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    right, allowed = True, ""
    if field in whole:
        low, high = whole[field]
        right, allowed = isinstance(number, int) and low <= number <= high, f"a whole number in {low}..{high}"
    elif field in _BELOW:
        right, allowed = 0 <= number < _BELOW[field], f"a number from 0 to below {_BELOW[field]:g}"
    elif field == "id2label":
        names = isinstance(value, (tuple, list)) and value and all(isinstance(name, str) for name in value)
        right, allowed = bool(names), "a tuple of names, one for each label"
    if not right:
        raise ValueError(f"{field} {brief(value)} is not {allowed}")


def _labels(id2label: Any, count: Any) -> tuple[str, ...]:
    """The names of the labels, as HF reads id2label and num_labels: without both there are two; label2id says nothing.

    Raises:
        ValueError: ids with a gap, which HF meets when it answers; what contradicts itself, or has another type.
    """
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST_LABELS):
        raise ValueError(f"num_labels {brief(count)} is not a whole number in 1..{_MOST_LABELS}")
    if id2label is None:
        return tuple(f"LABEL_{i}" for i in range(2 if count is None else count))
    if isinstance(id2label, (list, tuple)):
        id2label = dict(enumerate(id2label))
    if not isinstance(id2label, Mapping):
        raise ValueError(f"id2label {brief(id2label)} is not an object of names by id")
    try:
        by_id = {int(key): name for key, name in id2label.items()}
    except (ValueError, TypeError) as error:
        raise ValueError(f"id2label {brief(id2label)} has a key that is no id") from error
    if sorted(by_id) != list(range(len(id2label))) or not by_id:
        ids = brief(list(id2label))
        raise ValueError(f"id2label has the ids {ids}: they are 0, 1, 2, ... without gaps, at least one")
    for name in by_id.values():
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise ValueError(f"id2label names a label {brief(name)}, which is neither text nor a whole number")
    if count is not None and count != len(by_id):
        raise ValueError(f"num_labels is {count}, but id2label names {len(by_id)}: {brief(list(by_id.values()))}")
    return tuple(str(by_id[i]) for i in range(len(by_id)))


def read_fields(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """The path and the content of `folder`/config.json.

    Raises:
        FileNotFoundError: there is none, or no such folder.
        ValueError: it is no JSON object; the message names the file.
    """
    path = Path(folder) / "config.json"
    if not path.parent.is_dir():
        raise no_model_folder(path.parent)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: a model folder holds config.json and model.safetensors")
    return path, files.read_object(path)


@dataclasses.dataclass(frozen=True)
class PublicLayers:
    """The first layers of an encoder, where they stay those of a published one, as its embeddings do: the client
    computes them in the clear, and shares the state after them. Their attention and LayerNorms are exact.

    Attributes:
        num_hidden_layers: how many there are, beside the config's own.
        num_attention_heads, intermediate_size, hidden_act: the published encoder's.
    """

    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: Any

    def __new__(cls, *values: Any, **fields: Any) -> Any:
        names = [field.name for field in dataclasses.fields(cls)]
        for field, value in (dict(zip(names, values, strict=False)) | fields).items():
            if field in _WHOLE:
                _check(f"public_layers.{field}", value, {f"public_layers.{field}": (1, _WHOLE[field][1])})
        return super().__new__(cls)

    def __post_init__(self):
        object.__setattr__(self, "hidden_act", ACTIVATIONS.resolve(self.hidden_act))

    @classmethod
    def of(cls, spec: Any) -> "PublicLayers | None":
        """From an object, or what config.json has. ValueError: it is something else."""
        if spec is None or isinstance(spec, cls):
            return spec
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(spec, Mapping) or sorted(spec) != sorted(names):
            raise ValueError(f"public_layers is an object of {', '.join(names)}, not {brief(spec)}")
        return cls(**spec)

    def as_dict(self) -> dict[str, Any]:
        """What config.json has."""
        return {**dataclasses.asdict(self), "hidden_act": ACTIVATIONS.spec(self.hidden_act)}


C = TypeVar("C", bound="EncoderConfig")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder and its parts; the defaults are BERT-Base's. Fields up to `problem_type` are HF's names.

    A family's config is a subclass: its defaults, what it has beside, and `model_type` and `hf_fields`.

    A part is a name, an object, or `{"name": ..., field: value}`; `attention`, `hidden_act` and `layer_norm` also
    take a list with one entry for every layer. An entry of `attention` may be a list with one for every head, and
    an entry of `layer_norm` a pair: after attention, after the feed-forward. The LayerNorm of the embeddings is
    always exact.

    Attributes:
        model_type: HF's name of the family.
        hf_fields: the fields whose names are others than HF's, by HF's names.
        whole_numbers: the least and the most of each whole number that the family has beside these fields.
        has_token_types: whether the family tells the two texts of a pair apart; else type_vocab_size is 0.
        id2label: the names of the labels, in order of their ids.
        problem_type: what a classifier's logits mean: "regression", "single_label_classification",
            "multi_label_classification"; None: a regression for one label, else one label of several.
        model_max_length: tokens of the longest text that the model was trained and measured for, [CLS] and [SEP]
            included; None: all positions. Beyond it an approximation may diverge.
        num_texts: how many texts the model was trained on at a time: 1, or 2 for pairs; None: not known, either is
            answered.
        attention: the attention part, see `flaxmpc.nn.attention.ATTENTION`.
        hidden_act: the activation of the feed-forward, see `flaxmpc.nn.activation.ACTIVATIONS`.
        layer_norm: the normalisation, see `flaxmpc.nn.normalization.NORMALIZATIONS`.
        classifier_activation: the activation between the two matrices of a sequence classifier's head.
        layers_sharing_scores: how many neighbouring layers have the attention scores of the first of them, and so one
            attention part (Xiao et al., IJCAI 2019); 1: every layer has its own.
        embedding: who looks the tokens up, see `flaxmpc.nn.embedding.EMBEDDINGS`.
        public_layers: the layers that the client computes, before those of this config: a `PublicLayers`, or None.
        shares_bias: whether the family's layers have a bias in common, so that none of them can be public.

    Raises:
        ValueError: an unknown field or part (the message lists the known ones), a value that the field cannot have, a
            list of the wrong length, or a hidden_size that the heads do not divide.
    """

    model_type: ClassVar[str]
    hf_fields: ClassVar[Mapping[str, str]] = {}
    whole_numbers: ClassVar[Mapping[str, tuple[int, int]]] = {}
    has_token_types: ClassVar[bool] = True
    shares_bias: ClassVar[bool] = False

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: Any = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    classifier_dropout: float | None = None
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    problem_type: str | None = None
    model_max_length: int | None = None
    num_texts: int | None = None
    attention: Any = "softmax"
    layer_norm: Any = "layer_norm"
    classifier_activation: Any = "tanh"
    layers_sharing_scores: int = 1
    embedding: Any = "public"
    public_layers: Any = None

    def __new__(cls, *values: Any, **fields: Any) -> Any:
        known = {field.name: None for field in dataclasses.fields(cls)}
        if "num_labels" in fields:
            raise ValueError("num_labels is how many id2label has: name the labels, id2label=('no', 'yes') say")
        for field, value in (dict(zip(known, values, strict=False)) | fields).items():
            if field not in known:
                raise unknown(f"field of {cls.__name__}", field, known)
            _check(field, value, {**_WHOLE, **cls.whole_numbers})
        return super().__new__(cls)

    def __post_init__(self):
        object.__setattr__(self, "id2label", tuple(self.id2label))
        object.__setattr__(self, "public_layers", PublicLayers.of(self.public_layers))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self._num_parameters > _MOST_PARAMETERS:
            raise ValueError(f"a model of {self._num_parameters} parameters; at most {_MOST_PARAMETERS} are supported")
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise unknown("problem_type", self.problem_type, PROBLEM_TYPES)
        if self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} is not in 0..{self.vocab_size - 1}, the vocabulary")
        if (self.type_vocab_size > 0) != self.has_token_types:
            allowed = "a whole number in 1..1024" if self.has_token_types else f"0, as {self.model_type} has no types"
            raise ValueError(f"type_vocab_size {self.type_vocab_size} is not {allowed}")
        if self.num_positions < 1:
            raise ValueError(
                f"max_position_embeddings {self.max_position_embeddings} leaves none for a text, whose first token has "
                f"position {self.first_position}"
            )
        if self.longest > self.num_positions:
            raise ValueError(
                f"model_max_length {self.model_max_length} is not in 1..{self.num_positions}, the positions"
            )
        if self.num_texts not in (None, 1, 2):
            raise ValueError(f"num_texts is 1, or 2 for pairs, not {brief(self.num_texts)}")
        self._resolve("attention", _attention)
        if isinstance(self.attention, PerHead):  # on its own it would be written as a list, and read as one per layer
            object.__setattr__(self, "attention", (self.attention,) * self.num_hidden_layers)
        self._resolve("hidden_act", ACTIVATIONS.resolve)
        self._resolve("layer_norm", _layer_norms)
        object.__setattr__(self, "classifier_activation", ACTIVATIONS.resolve(self.classifier_activation))
        object.__setattr__(self, "embedding", EMBEDDINGS.resolve(self.embedding))
        if self.public_layers is not None:
            self._check_public(self.public_layers)
        for layer in range(self.num_hidden_layers):
            part = self.attention_of(layer)
            if isinstance(part, PerHead) and len(part.parts) != self.num_attention_heads:
                raise ValueError(
                    f"attention of layer {layer} names {len(part.parts)} heads, "
                    f"num_attention_heads is {self.num_attention_heads}"
                )
            if self.layers_sharing_scores > 1:
                self._check_shared(layer, part)

    def _check_shared(self, layer: int, part: AttentionPart) -> None:
        if not isinstance(part, Shareable):
            raise ValueError(
                f"layers_sharing_scores is {self.layers_sharing_scores}, but attention {part.name!r} has no "
                "`numerators` to share"
            )
        source = self.source_of_scores(layer)
        if part != (theirs := self.attention_of(source)):
            raise ValueError(
                f"layer {layer} shares the scores of layer {source}: its attention is {theirs.name!r} too, "
                f"not {part.name!r}"
            )

    def _check_public(self, public: PublicLayers) -> None:
        if not self.embedding.client_embeds:
            raise ValueError(f"public_layers read a public embedding, and this one is {self.embedding.name!r}")
        if self.shares_bias:
            raise ValueError(f"the layers of {self.model_type} share a bias of positions, so none can be public")
        if self.hidden_size % public.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of public_layers.num_attention_heads "
                f"{public.num_attention_heads}"
            )

    def _resolve(self, field: str, resolve: Callable[[Any], Any]) -> None:
        spec = getattr(self, field)
        if isinstance(spec, (list, tuple)):
            if len(spec) != self.num_hidden_layers:
                raise ValueError(f"{field} lists {len(spec)} parts, num_hidden_layers is {self.num_hidden_layers}")
            object.__setattr__(self, field, tuple(resolve(part) for part in spec))
        else:
            object.__setattr__(self, field, resolve(spec))

    @property
    def _num_parameters(self) -> int:
        """Those of the tables, and of the matrices of all layers."""
        tables = self.embedding_width * (self.vocab_size + self.max_position_embeddings + self.type_vocab_size)

        def of(layers: Any) -> int:
            each = self.hidden_size * (4 * self.hidden_size + 2 * layers.intermediate_size)
            return layers.num_hidden_layers * each

        return tables + of(self) + (0 if self.public_layers is None else of(self.public_layers))

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @property
    def longest(self) -> int:
        """Tokens of the longest text that the model answers: `model_max_length`, or all positions."""
        return self.model_max_length or self.num_positions

    @property
    def embedding_width(self) -> int:
        """Numbers in a row of the tables of embeddings. Where it is not `hidden_size`, a matrix follows."""
        return self.hidden_size

    @property
    def first_position(self) -> int:
        """The row of the positions' table that a text's first token has."""
        return 0

    @property
    def counts_from_padding(self) -> bool:
        """Whether HF's model counts positions past padding tokens, so that one in a text would move the others."""
        return self.first_position > 0

    @property
    def num_positions(self) -> int:
        """Tokens of the longest text that there are positions for."""
        return self.max_position_embeddings - self.first_position

    @property
    def shares_types(self) -> bool:
        """Whether a client shares token types: one-hot, for all texts alike, or a program could not take both."""
        return not self.embedding.client_embeds and self.num_texts != 1 and self.type_vocab_size > 0

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def attention_of(self, layer: int) -> AttentionPart:
        return self.attention[layer] if isinstance(self.attention, tuple) else self.attention

    def source_of_scores(self, layer: int) -> int:
        """The layer that computes the scores of this one: itself, or one before that it shares them with."""
        return layer - layer % self.layers_sharing_scores

    def hidden_act_of(self, layer: int) -> ActivationPart:
        return self.hidden_act[layer] if isinstance(self.hidden_act, tuple) else self.hidden_act

    def layer_norms_of(self, layer: int) -> tuple[Normalization, Normalization]:
        """After attention, after the feed-forward."""
        part = self.layer_norm[layer] if isinstance(self.layer_norm, tuple) else self.layer_norm
        return part if isinstance(part, tuple) else (part, part)

    @property
    def score_degree(self) -> int | None:
        """The degree that the numerators of all layers have, so that mask and 1/n fold into the state; or None."""
        return common_degree([self.attention_of(layer) for layer in range(self.num_hidden_layers)])

    def mask(self, attention_mask: Array) -> Mask:
        """What the client makes of HF's attention_mask (batch, token) for a model of this config."""
        return Mask.from_tokens(attention_mask, degree=self.score_degree)

    @classmethod
    def from_dict(cls: type[C], fields: Mapping[str, Any]) -> C:
        """From the content of a config.json, HF's or ours. Fields of HF's that do not matter here are passed over.

        Raises:
            ValueError: a field that asks for what this model cannot do, or a bad value.
        """
        if not isinstance(fields, Mapping):
            raise ValueError(f"a config is a JSON object, not {type(fields).__name__}")
        required = {"model_type": cls.model_type, **_HF_REQUIRED}
        for name, allowed in required.items():
            given = fields.get(name, allowed)
            if given != allowed and (name, given) != ("model_type", OWN + cls.model_type):
                raise ValueError(f"config.json has {name}={brief(given)}; only {allowed!r} is supported")
        own = {field.name for field in dataclasses.fields(cls)}
        values = {cls.hf_fields.get(name, name): value for name, value in fields.items()}
        values = {name: value for name, value in values.items() if name in own}
        if not cls.has_token_types:
            values.pop("type_vocab_size", None)
        if isinstance(values.get("hidden_act"), str):
            values["hidden_act"] = _HF_ACTIVATIONS.get(values["hidden_act"], values["hidden_act"])
        if values.get("pad_token_id", 0) is None:  # it names no id; what stands on padding is masked
            values["pad_token_id"] = 0
        values["id2label"] = _labels(fields.get("id2label"), fields.get("num_labels"))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: `from_dict` gives the config back, and HF reads its own fields.

        Raises:
            ValueError: a part that is not registered.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

        def spec(value: Any, of: Callable[[Any], Any]) -> Any:
            return [of(part) for part in value] if isinstance(value, tuple) else of(value)

        hidden_act = spec(self.hidden_act, ACTIVATIONS.spec)

        theirs = {ours: name for name, ours in self.hf_fields.items()}
        fields |= {
            "id2label": {str(i): label for i, label in enumerate(self.id2label)},
            "label2id": {label: i for i, label in enumerate(self.id2label)},
            "attention": spec(self.attention, _attention_spec),
            "hidden_act": "gelu_new" if hidden_act == "gelu_tanh" else hidden_act,
            "layer_norm": spec(self.layer_norm, _layer_norms_spec),
            "classifier_activation": ACTIVATIONS.spec(self.classifier_activation),
            "embedding": EMBEDDINGS.spec(self.embedding),
            "public_layers": self.public_layers and self.public_layers.as_dict(),
        }
        for field in ("public_layers", "layers_sharing_scores"):
            if fields[field] == getattr(type(self), field):  # so what has none is read by what knows none
                del fields[field]
        model_type = self.model_type if self._has_hf_parts else OWN + self.model_type
        return {"model_type": model_type, **{theirs.get(name, name): value for name, value in fields.items()}}

    @property
    def _has_hf_parts(self) -> bool:
        """Whether all parts are such as HF's models have."""
        layers = range(self.num_hidden_layers)
        if self.public_layers is not None or self.layers_sharing_scores > 1:
            return False
        return self.classifier_activation == ACTIVATIONS[type(self).classifier_activation] and all(
            self.attention_of(i) == ATTENTION["softmax"]
            and self.hidden_act_of(i) == self.hidden_act_of(0)
            and self.hidden_act_of(i) in [ACTIVATIONS[name] for name in _HF_HAS]
            and all(part == EXACT for part in self.layer_norms_of(i))
            for i in layers
        )
