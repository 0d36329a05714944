"""A family and parts of somebody else's, made here, go through all: saved, trained, converted, costed, on shares."""

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from flaxmpc import secure
from flaxmpc.convert.configs import Conversion, FineTuning
from flaxmpc.convert.conversion import convert, finetune_encoder
from flaxmpc.convert.distill import Stage
from flaxmpc.convert.evaluate import evaluate
from flaxmpc.models import base
from flaxmpc.models import folder as folders
from flaxmpc.models.base import Family, WithHead
from flaxmpc.models.config import EncoderConfig
from flaxmpc.models.encoder import through
from flaxmpc.models.heads import PooledHead
from flaxmpc.models.public import with_public_layers
from flaxmpc.nn import ACTIVATIONS, ATTENTION, NORMALIZATIONS
from flaxmpc.nn.layers import Dense, PostNormBlock
from flaxmpc.serve.private import SecureClassifier, check
from flaxmpc.training.fit import Schedule

STAGE = Stage(epochs=3, learning_rate=3e-3, batch_size=16, hidden_weight=1.0)
TEXTS = ["a gripping film", "the movie is a bad, very bad mess"]


# ------------------------------------------------------------------------------------------------------------- a family


@dataclasses.dataclass(frozen=True)
class ToyConfig(EncoderConfig):
    model_type: ClassVar[str] = "toy"
    has_token_types: ClassVar[bool] = False
    type_vocab_size: int = 0


class Words(nn.Module):
    """A table of words, and how far from the start of the text each stands."""

    config: ToyConfig

    @nn.compact
    def __call__(self, tokens):
        config = self.config
        table = self.param("words", nn.initializers.normal(0.2), (config.vocab_size, config.hidden_size))
        ramp = self.param("ramp", nn.initializers.normal(0.01), (config.hidden_size,))
        places = jnp.arange(tokens.shape[1], dtype=jnp.float32)[:, None]
        return config.embedding.lookup(table, tokens) + places * ramp


class ToyEncoder(nn.Module):
    config: ToyConfig
    add_pooling_layer: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self):
        c = self.config
        self.embeddings = Words(c)
        self.layers = [
            PostNormBlock(c.attention_of(i), c.hidden_act_of(i), c.layer_norms_of(i), c.num_attention_heads,
                          c.intermediate_size, name=f"layer_{i}")
            for i in range(c.num_hidden_layers)
        ]  # fmt: skip
        self.pooler = Dense(c.hidden_size)

    def embed(self, input_ids, token_type_ids=None, attention_mask=None, *, deterministic=True):
        return self.embeddings(input_ids)

    def encode(self, x, mask, *, deterministic=True, first=False):
        return through(self.layers, x, mask, deterministic=deterministic, first=first)


class _Toy(WithHead):
    base_model_prefix: ClassVar[str] = "toy"
    encoder_class: ClassVar[Any] = ToyEncoder


class ToyForSequenceClassification(PooledHead, _Toy):
    pass


NAMES = (
    (r"toy/embeddings/(words|ramp)", r"toy.\1"),
    (r"toy/layer_(\d+)/attention/(query|key|value|output)/", r"toy.\1.\2."),
    (r"toy/layer_(\d+)/attention/(\w+)$", r"toy.\1.\2"),
    (r"toy/layer_(\d+)/(\w+)/", r"toy.\1.ffn.\2."),
    (r"toy/pooler/", r"toy.pooler."),
    (r"classifier/", r"classifier."),
)


@pytest.fixture
def toy():
    family = base.register(Family(ToyConfig, (ToyForSequenceClassification,), NAMES, {}, ("classifier.",)))
    yield family
    del base._FAMILIES["toy"]


# -------------------------------------------------------------------------------------------------------------- parts


class _Own:
    """A part that is no dataclass, and has a name and one call."""

    def __init__(self, name, call):
        self.name = name
        self.call = call

    def __call__(self, *args, **options):
        return self.call(*args, **options)


def _clipped(query, key, value, mask, scalars, *, bias=None, product=jnp.matmul, dropout=None):
    weights = jnp.clip(product(query, key.swapaxes(-1, -2)), -1.0, 1.0) * mask.weight[:, None, None, :]
    return product(weights if dropout is None else dropout(weights), value)


@pytest.fixture
def parts():
    own = [
        (ATTENTION, _Own("clipped", _clipped)),
        (ACTIVATIONS, _Own("leaky", lambda x: jnp.maximum(x, 0.1 * x))),
        (NORMALIZATIONS, _Own("half", lambda x, epsilon: 0.5 * x)),
    ]
    for registry, part in own:
        registry.register(part)
    yield
    for registry, part in own:
        del registry._parts[part.name]


# -------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Sentences whose label is that of their last word."""
    rng = np.random.default_rng(0)
    words = ["a", "the", "film", "movie", "acted", "very", "beautifully"]
    rows = {(" ".join([*rng.choice(words, rng.integers(1, 8)), mood]), label)
            for label, moods in enumerate((["tedious", "bad"], ["gripping", "good"])) for mood in moods
            for _ in range(60)}  # fmt: skip
    path = tmp_path_factory.mktemp("data") / "data.csv"
    lines = [f"{text},{('negative', 'positive')[label]}" for text, label in sorted(rows)]
    path.write_text("\n".join(["sentence,label", *lines]) + "\n")
    return path


def through_all(encoder: Path, data: Path, runs: Path, group, **parts) -> folders.LoadedModel:
    """A teacher and its student, measured in the fixed point and on three parties' shares."""
    schedule = Schedule(epochs=4, learning_rate=1e-2, batch_size=16)
    figures = finetune_encoder(FineTuning(encoder, str(data), runs / "teacher", schedule, max_length=16))
    assert figures["accuracy"] > 0.8
    conversion = Conversion(
        *(runs / "teacher", str(data), runs / "student"), stage1=STAGE, stage2=STAGE, max_length=16,
        layer_norm="layer_norm", matrix_bits=32, word_embedding_bits=32, **parts
    )  # fmt: skip
    convert(conversion)
    results = evaluate(runs / "student", ref2k_sentences=8, aby3_sentences=4)
    assert results["ref2k_agreement"] == results["aby3_agreement"] == 1.0
    assert results["ref2k_max_logit_difference"] < 0.02
    student = folders.load(runs / "student")
    assert check(student, TEXTS).margin_bits > 2
    for protocol in ("REF2K", "ABY3"):
        classifier = SecureClassifier(student, group(protocol))
        assert max(prediction.difference or 1.0 for prediction in classifier.classify(TEXTS).predictions) < 0.02
        assert classifier.estimate(16, 1).rounds > (10 if protocol == "ABY3" else -1)
    return student


def test_a_family_of_ones_own(toy, write_classifier, data, tmp_path, group):
    plain = folders.load(write_classifier(tmp_path / "source"))
    of_shape = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    fields: Any = {field: getattr(plain.model.config, field) for field in of_shape}
    fields |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    model = ToyForSequenceClassification(ToyConfig(**fields, num_hidden_layers=2))
    encoder = folders.save(tmp_path / "encoder", model, base.init_params(model), plain.folder)
    assert json.loads((encoder / "config.json").read_text())["model_type"] == "toy"
    with pytest.raises(ValueError, match="the embeddings of ToyForSequenceClassification take no layers"):
        with_public_layers(model, base.init_params(model), 1)
    student = through_all(encoder, data, tmp_path, group)
    assert type(student.model) is ToyForSequenceClassification
    assert student.model.config.attention.name == "2quad_freediv"
    assert json.loads((tmp_path / "student" / "config.json").read_text())["model_type"] == "flaxmpc-toy"


@pytest.mark.slow
def test_parts_of_ones_own(parts, write_classifier, data, tmp_path, group):
    encoder = write_classifier(tmp_path / "made", attention="softmax", hidden_act="gelu", hidden_dropout_prob=0.0,
                               attention_probs_dropout_prob=0.0)  # fmt: skip
    student = through_all(encoder, data, tmp_path, group, attention=("clipped", "2quad_freediv"), activation="leaky")
    assert [student.model.config.attention_of(i).name for i in range(2)] == ["clipped", "2quad_freediv"]
    assert student.model.config.hidden_act.name == "leaky"


def test_parts_of_ones_own_per_head_and_as_normalisation(parts, write_classifier, tmp_path, group):
    heads = ["clipped", "2quad_freediv"]
    folder = write_classifier(tmp_path, attention=[heads, heads[::-1]], layer_norm=[("half", "layer_norm"), "half"])
    loaded = folders.load(folder)
    assert loaded.model.config.attention_of(0).name == "clipped+2quad_freediv"
    paths = traverse_util.flatten_dict(loaded.params["bert"]["layer_0"]["attention"], sep="/")
    assert {"shift", "scale"} < set(paths)
    for protocol in ("REF2K", "ABY3"):
        found = SecureClassifier(loaded, group(protocol)).classify(TEXTS).predictions
        assert max(prediction.difference or 1.0 for prediction in found) < 0.02
    assert secure.Config().grouped_products
