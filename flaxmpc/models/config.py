"""BertConfig: HF's field names, plus the parts."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jax import Array

from flaxmpc import files
from flaxmpc.errors import brief, unknown
from flaxmpc.nn.activation import ACTIVATIONS, ActivationPart
from flaxmpc.nn.attention import ATTENTION, AttentionPart, PerHead, common_degree
from flaxmpc.nn.embedding import EMBEDDINGS
from flaxmpc.nn.mask import Mask
from flaxmpc.nn.normalization import NORMALIZATIONS, Normalization

# HF's names for activations that have another name here.
_HF_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}

# Fields of HF's config.json that say something this model cannot do when they have another value.
_HF_REQUIRED = {"model_type": "bert", "position_embedding_type": "absolute", "is_decoder": False}

MOST_TOKENS, MOST_POSITIONS = 1_000_000, 65_536
"""Of a vocabulary, and of a text. The limits here are beyond any published BERT; they bound what a file may ask for."""

_MOST_PARAMETERS = 1_000_000_000  # of a model without its head
_MOST_LABELS = 1_000_000

# What the fields that are no part may be: whole numbers in a range, numbers from 0 to below one, true or false.
_WHOLE = {
    "vocab_size": (1, MOST_TOKENS),
    "hidden_size": (1, 16_384),
    "num_hidden_layers": (0, 128),
    "num_attention_heads": (1, 256),
    "intermediate_size": (1, 65_536),
    **dict.fromkeys(("max_position_embeddings", "model_max_length"), (1, MOST_POSITIONS)),
    "type_vocab_size": (1, 1_024),
    "pad_token_id": (0, MOST_TOKENS - 1),
}
_BELOW = {
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"), 1.0),
    **dict.fromkeys(("initializer_range", "layer_norm_eps"), math.inf),
}
_MAY_BE_NONE = ("classifier_dropout", "model_max_length")

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def no_model_folder(path: Path) -> FileNotFoundError:
    """The error for what should be a model's folder and is none. What looks like a hub's name is told how to get it."""
    message = f"{path} is {'a file, not the folder of a model' if path.is_file() else 'no folder'}"
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path)) and not path.exists():
        get = f"from huggingface_hub import snapshot_download as get; get({str(path)!r}, local_dir='FOLDER')"
        message += f'. If it is a name on the hub, download it first: python -c "{get}"'
    return FileNotFoundError(message)


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


def _check(field: str, value: Any) -> None:
    """ValueError with the field, its value and what it may be."""
    if value is None and field in _MAY_BE_NONE:
        return
    number: Any = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    right, allowed = True, ""
    if field in _WHOLE:
        low, high = _WHOLE[field]
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


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT and its parts. Fields up to `problem_type` are HF's, `model_max_length` its tokenizers'.

    A part is a name, an object, or `{"name": ..., field: value}`; `attention`, `hidden_act` and `layer_norm` also
    take a list with one entry for every layer. An entry of `attention` may be a list with one for every head, and
    an entry of `layer_norm` a pair: after attention, after the feed-forward. The LayerNorm of the embeddings is
    always exact.

    Attributes:
        id2label: the names of the labels, in order of their ids.
        problem_type: what a classifier's logits mean: "regression", "single_label_classification",
            "multi_label_classification"; None: a regression for one label, else one label of several.
        model_max_length: tokens of the longest text that the model was trained and measured for, [CLS] and [SEP]
            included; None: all positions. Beyond it an approximation may diverge.
        num_texts: that the model was trained on at a time: 1, or 2 for pairs; None: not known, either is answered.
        attention: see `flaxmpc.nn.attention.ATTENTION`.
        hidden_act: see `flaxmpc.nn.activation.ACTIVATIONS`.
        layer_norm: see `flaxmpc.nn.normalization.NORMALIZATIONS`.
        embedding: see `flaxmpc.nn.embedding.EMBEDDINGS`.

    Raises:
        ValueError: an unknown field or part (the message lists the known ones), a value that the field cannot have, a
            list of the wrong length, or a hidden_size that the heads do not divide.
    """

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
    embedding: Any = "public"

    def __new__(cls, *values: Any, **fields: Any) -> "BertConfig":
        known = cls.__dataclass_fields__
        if "num_labels" in fields:
            raise ValueError("num_labels is how many id2label has: name the labels, id2label=('no', 'yes') say")
        for field, value in (dict(zip(known, values, strict=False)) | fields).items():
            if field not in known:
                raise unknown("field of BertConfig", field, known)
            _check(field, value)
        return super().__new__(cls)

    def __post_init__(self):
        object.__setattr__(self, "id2label", tuple(self.id2label))
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
        if self.longest > self.max_position_embeddings:
            raise ValueError(
                f"model_max_length {self.model_max_length} is not in 1..{self.max_position_embeddings}, the positions"
            )
        if self.num_texts not in (None, 1, 2):
            raise ValueError(f"num_texts is 1, or 2 for pairs, not {brief(self.num_texts)}")
        self._resolve("attention", _attention)
        if isinstance(self.attention, PerHead):  # on its own it would be written as a list, and read as one per layer
            object.__setattr__(self, "attention", (self.attention,) * self.num_hidden_layers)
        self._resolve("hidden_act", ACTIVATIONS.resolve)
        self._resolve("layer_norm", _layer_norms)
        object.__setattr__(self, "embedding", EMBEDDINGS.resolve(self.embedding))
        for layer in range(self.num_hidden_layers):
            part = self.attention_of(layer)
            if isinstance(part, PerHead) and len(part.parts) != self.num_attention_heads:
                raise ValueError(
                    f"attention of layer {layer} names {len(part.parts)} heads, "
                    f"num_attention_heads is {self.num_attention_heads}"
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
        """Those of the matrices, without the head."""
        tables = self.vocab_size + self.max_position_embeddings + self.type_vocab_size
        layer = 4 * self.hidden_size + 2 * self.intermediate_size
        return self.hidden_size * (tables + self.num_hidden_layers * layer)

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @property
    def longest(self) -> int:
        """Tokens of the longest text that the model answers: `model_max_length`, or all positions."""
        return self.model_max_length or self.max_position_embeddings

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def attention_of(self, layer: int) -> AttentionPart:
        return self.attention[layer] if isinstance(self.attention, tuple) else self.attention

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
    def from_dict(cls, fields: Mapping[str, Any]) -> "BertConfig":
        """From the content of a config.json, HF's or ours. Fields of HF's that do not matter here are passed over.

        Raises:
            ValueError: a field that asks for what this model cannot do, or a bad value.
        """
        if not isinstance(fields, Mapping):
            raise ValueError(f"a config is a JSON object, not {type(fields).__name__}")
        for name, allowed in _HF_REQUIRED.items():
            if fields.get(name, allowed) != allowed:
                raise ValueError(f"config.json has {name}={brief(fields[name])}; only {allowed!r} is supported")
        own = {field.name for field in dataclasses.fields(cls)}
        values = {name: value for name, value in fields.items() if name in own}
        if isinstance(values.get("hidden_act"), str):
            values["hidden_act"] = _HF_ACTIVATIONS.get(values["hidden_act"], values["hidden_act"])
        if values.get("pad_token_id", 0) is None:  # it names no id; what stands on padding is masked
            values["pad_token_id"] = 0
        values["id2label"] = _labels(fields.get("id2label"), fields.get("num_labels"))
        return cls(**values)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "BertConfig":
        """Reads `folder`/config.json.

        Raises:
            FileNotFoundError: there is none, or no such folder.
            ValueError: it is not JSON, or see `from_dict`; the message names the file.
        """
        path = Path(folder) / "config.json"
        if not path.parent.is_dir():
            raise no_model_folder(path.parent)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: a model folder holds config.json and model.safetensors")
        fields = files.read_object(path)
        try:
            return cls.from_dict(fields)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: `from_dict` gives the config back, and HF reads its own fields.

        Raises:
            ValueError: a part that is not registered.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

        def spec(value: Any, of: Callable[[Any], Any]) -> Any:
            return [of(part) for part in value] if isinstance(value, tuple) else of(value)

        hidden_act = spec(self.hidden_act, ACTIVATIONS.spec)

        return {
            "model_type": "bert",
            **fields,
            "id2label": {str(i): label for i, label in enumerate(self.id2label)},
            "label2id": {label: i for i, label in enumerate(self.id2label)},
            "attention": spec(self.attention, _attention_spec),
            "hidden_act": "gelu_new" if hidden_act == "gelu_tanh" else hidden_act,
            "layer_norm": spec(self.layer_norm, _layer_norms_spec),
            "embedding": EMBEDDINGS.spec(self.embedding),
        }


# Turc et al., arXiv 1908.08962 (tiny to medium); Devlin et al., arXiv 1810.04805 (base, large); Wang et al.,
# arXiv 2002.10957 (MiniLM, whose six-layer version is every second layer of MiniLM-L12-H384).
PRESETS: dict[str, BertConfig] = {
    "tiny": BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512),
    "mini": BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024),
    "small": BertConfig(hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048),
    "medium": BertConfig(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=2048),
    "base": BertConfig(),
    "large": BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    "minilm-l6": BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
}


def preset(name: str, **changes: Any) -> BertConfig:
    """A preset by name, with fields changed: `preset("base", attention="2quad_freediv", hidden_act="quad")`.

    Raises:
        ValueError: an unknown preset; the message lists the known ones and the closest.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return dataclasses.replace(PRESETS[name], **changes)
