"""What all models have in common: an encoder in two halves, a head, the outputs, and the families that there are."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from flaxmpc.errors import brief, unknown
from flaxmpc.models.config import OWN, EncoderConfig
from flaxmpc.models.encoder import Encoder, Hidden
from flaxmpc.models.outputs import EncoderOutput, Outputs
from flaxmpc.nn.layers import Dense, Norm
from flaxmpc.nn.lazy import Lazy, State
from flaxmpc.nn.mask import Mask
from flaxmpc.nn.product import Product

TEXTS, TOKENS, ANSWERS, WORDS = "text-classification", "token-classification", "question-answering", "fill-mask"
"""The tasks of heads: a label, or a number, for a text; a label for every token; the answer to a question in a text;
the words that stood at masked tokens."""


def first_token(hidden: State) -> State:
    """(batch, hidden) of (batch, token, hidden)."""
    return hidden.first() if isinstance(hidden, Lazy) else hidden[:, 0]


class WithHead(nn.Module):
    """An encoder and a head. The model is in two halves: `embed` is the client's where the embedding is public, and
    `from_embeddings` is what runs on shares; `__call__` is one after the other.

    A family's encoder is a submodule of the name `base_model_prefix`, as in HF. It has `embed`, and `encode`, which
    gives `EncoderOutput`. Its own submodules are `embeddings` and `layer_0`, `layer_1`, ..., each with an `attention`.

    Attributes:
        base_model_prefix: the name of the encoder among the parameters.
        encoder_class: the encoder's.
        task: what the head is for, by the name of HF's pipeline. The logits are (batch, label) for TEXTS, and else
            (batch, token, number of outputs).
        reads_first: whether the head reads the first token alone.
        reads_embeddings: whether the head reads the table of words.
        pools: whether the encoder has a pooler.
    """

    base_model_prefix: ClassVar[str]
    encoder_class: ClassVar[type[Encoder]] = Encoder
    task: ClassVar[str]
    reads_first: ClassVar[bool] = False
    reads_embeddings: ClassVar[bool] = False
    pools: ClassVar[bool] = False

    config: Any
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self):
        encoder = self.encoder_class(self.config, self.pools, self.dtype, self.param_dtype)
        setattr(self, self.base_model_prefix, encoder)
        self.setup_head()

    def setup_head(self) -> None:
        """Makes the head's modules."""
        raise NotImplementedError

    @property
    def encoder(self) -> Any:
        return getattr(self, self.base_model_prefix)

    @property
    def num_outputs(self) -> int:
        """How many numbers the head gives for a text, or for a token."""
        return self.config.num_labels

    def logits_shape(self, batch: int, tokens: int) -> tuple[int, ...]:
        """The shape of the logits of so many texts, of so many tokens."""
        return (batch, self.num_outputs) if self.task == TEXTS else (batch, tokens, self.num_outputs)

    @property
    def head_matrices(self) -> tuple[str, str] | None:
        """The names, among the parameters, of the two dense layers of a sequence classifier's head, which
        `config.classifier_activation` stands between; None: the head has another form.
        """
        return None

    def head(self, hidden: State, deterministic: bool) -> Array:
        """The logits from the last hidden state."""
        raise NotImplementedError

    def embed(
        self,
        input_ids: Array,
        token_type_ids: Array | None = None,
        attention_mask: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Hidden:
        """Ids (batch, token) -> embeddings. A mode of embedding whose lookup takes one-hot rows is given those.

        Args:
            attention_mask: HF's, (batch, token); needed where a part is right on some inputs only, so that padding may
                not be left as it is.
        """
        return self.encoder.embed(input_ids, token_type_ids, attention_mask, deterministic=deterministic)

    def encode(self, embeddings: State, mask: Mask, *, deterministic: bool = True) -> EncoderOutput:
        """What the head reads, and what led there."""
        return self.encoder.encode(embeddings, mask, deterministic=deterministic, first=self.reads_first)

    def outputs_from_embeddings(self, embeddings: State, mask: Mask, *, deterministic: bool = True) -> Outputs:
        """The logits, and what led there."""
        encoded = self.encode(embeddings, mask, deterministic=deterministic)
        return Outputs(self.head(encoded.hidden, deterministic), encoded.intermediates)

    def from_embeddings(self, embeddings: State, mask: Mask, *, deterministic: bool = True) -> Array:
        """The logits for embeddings (batch, token, hidden), or for a lazy state of them."""
        return self.outputs_from_embeddings(embeddings, mask, deterministic=deterministic).logits

    def outputs(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Outputs:
        """The logits for ids (batch, token), and what led there."""
        mask = self.config.mask(jnp.ones(input_ids.shape[:2]) if attention_mask is None else attention_mask)
        embeddings = self.embed(input_ids, token_type_ids, attention_mask, deterministic=deterministic)
        return self.outputs_from_embeddings(embeddings, mask, deterministic=deterministic)

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array:
        """The logits for ids (batch, token)."""
        return self.outputs(input_ids, attention_mask, token_type_ids, deterministic=deterministic).logits

    def _dense(self, features: int) -> Dense:
        initial = nn.initializers.normal(self.config.initializer_range)
        return Dense(features, kernel_init=initial, dtype=self.dtype, param_dtype=self.param_dtype)

    def _dropped(self, hidden: State, deterministic: bool) -> State:
        """The head's dropout. Nothing is dropped of a lazy state, which is for evaluation."""
        return hidden if isinstance(hidden, Lazy) else self.dropout(hidden, deterministic=deterministic)

    def _norm(self) -> Norm:
        return Norm(epsilon=self.config.layer_norm_eps, dtype=self.dtype, param_dtype=self.param_dtype)

    def _classifier_dropout(self) -> nn.Dropout:
        rate = self.config.classifier_dropout
        return nn.Dropout(self.config.hidden_dropout_prob if rate is None else rate)


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture that HF has too, and how its folders are read and written.

    Attributes:
        config: the class of its configs; `model_type` is HF's name of the family.
        models: its encoder with a head, under HF's names of the classes; the first classifies sequences.
        names: what HF calls the parameters: pairs of a pattern of our path and HF's name, of which the first that
            matches from the start counts. A last "kernel" or "scale" of a path is "weight" there, and is left out here.
        tied: tensors of HF's that repeat another one, and that one's name.
        heads: what HF's names of a head's tensors start with. All others may lack the encoder's prefix in a file.
    """

    config: type[EncoderConfig]
    models: tuple[type[WithHead], ...]
    names: tuple[tuple[str, str], ...]
    tied: Mapping[str, str]
    heads: tuple[str, ...]

    @property
    def prefix(self) -> str:
        return self.models[0].base_model_prefix

    def model_for(self, task: str) -> type[WithHead]:
        """The model with a head for a task, see `WithHead.task`. ValueError: the family has none."""
        for model in self.models:
            if model.task == task:
                return model
        raise unknown("task", task, [model.task for model in self.models])

    def kin(self, model_type: str, name: str, **defaults: Any) -> "Family":
        """A family of the same encoder, heads and names of weights, which HF has under another name.

        Args:
            model_type: HF's name of the family.
            name: what HF's classes are called, where this family's have its own name.
            **defaults: the config's fields that differ.
        """
        own = self.config.__name__.removesuffix("Config")

        def derived(cls: type, **members: Any) -> Any:
            members |= {"__doc__": cls.__doc__, "__module__": cls.__module__}
            return type(cls)(cls.__name__.replace(own, name), (cls,), members)

        types = {field: type(value) for field, value in defaults.items()}
        config = derived(self.config, model_type=model_type, __annotations__=types, **defaults)
        models = tuple(derived(model) for model in self.models)
        return dataclasses.replace(self, config=dataclasses.dataclass(frozen=True)(config), models=models)


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Adds a family, so that its folders are read and written.

    Raises:
        ValueError: its name or its models are taken; or its prefix, by a family with other names of weights.
    """
    for other in _FAMILIES.values():
        same_names = {model.__name__ for model in family.models} & {model.__name__ for model in other.models}
        same_weights = (family.names, family.tied, family.heads) == (other.names, other.tied, other.heads)
        prefix_taken = other.prefix == family.prefix and not same_weights
        if other.config.model_type == family.config.model_type or prefix_taken or same_names:
            raise ValueError(f"a family like {family.config.model_type!r} is registered: {other.config.model_type!r}")
    _FAMILIES[family.config.model_type] = family
    return family


def families() -> Iterator[Family]:
    """All that are registered."""
    return iter(_FAMILIES.values())


def family_of(model_type: Any) -> Family:
    """The family of a config.json's model_type. ValueError: an unknown one; the message lists those known."""
    name = model_type.removeprefix(OWN) if isinstance(model_type, str) else model_type
    if not isinstance(name, str) or name not in _FAMILIES:
        raise unknown("model_type", model_type, _FAMILIES)
    return _FAMILIES[name]


def family_of_params(params: Mapping[str, Any]) -> Family:
    """A family whose encoder is among parameters: they may be its kin's, whose weights have the same names.

    Raises:
        ValueError: there is none.
    """
    for family in families():
        if family.prefix in params:
            return family
    known = ", ".join(dict.fromkeys(family.prefix for family in families()))
    raise ValueError(f"parameters of {brief(sorted(params))} are none of a known encoder's: {known}")


def embeddings_path(model: WithHead) -> str:
    """What the paths of a model's embeddings start with."""
    return f"{model.base_model_prefix}/embeddings/"


def architectures() -> dict[str, type[WithHead]]:
    """All models, by HF's name of the class."""
    return {model.__name__: model for family in families() for model in family.models}


def encoder_names(prefix: str) -> tuple[tuple[str, str], ...]:
    """HF's names of the encoder's parameters in BERT, and in those families that took them over."""
    layer = rf"{prefix}/layer_(\d+)/"
    theirs = rf"{prefix}.encoder.layer.\1."
    return (
        (f"{prefix}/embeddings/(word|position|token_type)_embeddings", rf"{prefix}.embeddings.\1_embeddings.weight"),
        (f"{prefix}/embeddings/layer_norm/", f"{prefix}.embeddings.LayerNorm."),
        (f"{layer}attention/(query|key|value)/", rf"{theirs}attention.self.\2."),
        (f"{layer}attention/output/", f"{theirs}attention.output.dense."),
        (rf"{layer}attention/(\w+)$", rf"{theirs}attention.self.\2"),  # an attention part's scalars
        (f"{layer}attention_layer_norm/", f"{theirs}attention.output.LayerNorm."),
        (f"{layer}(intermediate|output)/", rf"{theirs}\2.dense."),
        (f"{layer}output_layer_norm/", f"{theirs}output.LayerNorm."),
        (f"{prefix}/pooler/", f"{prefix}.pooler.dense."),
    )


def defer(config: Any, embeddings: Hidden, mask: Mask, product: Product) -> Lazy:
    """Embeddings as the lazy state with which a model of this config folds; see `flaxmpc.nn.lazy`."""
    unit = None if config.score_degree is None else mask.unit
    return Lazy.held(embeddings if unit is None else embeddings * unit.scale, unit, product)


def init_params(model: WithHead, seed: int = 0) -> dict[str, Any]:
    """Fresh parameters, a nested dict of float32 arrays."""
    # The values alone, array by array: one program of them all takes seconds to compile, and each model has its own.
    variables: Any = model.lazy_init(jax.random.key(seed), jax.eval_shape(lambda: _example(model)))
    return variables["params"]


def param_shapes(model: WithHead) -> dict[str, Any]:
    """The parameters as shapes and types, without computing any."""
    variables: Any = jax.eval_shape(lambda: model.init(jax.random.key(0), _example(model)))
    return variables["params"]


def _example(model: WithHead) -> Any:
    """What the smallest text gives a model to compute with."""
    return model.config.embedding.encode(jnp.zeros((1, 2), jnp.int32), model.config.vocab_size)


def num_params(model: WithHead) -> int:
    """How many numbers the parameters are."""
    return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(model)))


def without_embeddings(model: WithHead, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model's parameters in two: the embeddings', and all others."""
    prefix = model.base_model_prefix
    encoder = dict(params[prefix])
    embeddings = encoder.pop("embeddings")
    return {prefix: {"embeddings": embeddings}}, {**params, prefix: encoder}
