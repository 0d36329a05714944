"""The models that are compared: published ones, and ours. Weights are random: the cost does not depend on them."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze

from flaxmpc import secure
from flaxmpc.models import zoo
from flaxmpc.models.base import WithHead, family_of, param_shapes, without_embeddings
from flaxmpc.models.bert import BertConfig, preset
from flaxmpc.models.config import EncoderConfig
from flaxmpc.models.folder import read_config
from flaxmpc.nn.normalization import Linear
from flaxmpc.serve.private import private


def _deepest(place: int) -> Any:
    """Of the LayerNorms after attention (0) or feed-forward (1) of the zoo's default student, the widest range's."""
    config = read_config(zoo.find(zoo.DEFAULT))
    parts: list[Any] = [config.layer_norms_of(layer)[place] for layer in range(config.num_hidden_layers)]
    return max(parts, key=lambda part: (part.depth, part.high / part.low))


# A level is 2.7 rounds in ABY3, so a comparison takes the depths that a trained student needs.
AFTER_ATTENTION, AFTER_FEED_FORWARD = _deepest(0), _deepest(1)
CHEBYSHEV_PARTS = (AFTER_ATTENTION, AFTER_FEED_FORWARD)


@dataclasses.dataclass(frozen=True)
class Variant:
    """Parts of a BERT, and how it is run.

    Attributes:
        attention, hidden_act: see `BertConfig`.
        folded: run as `private` returns it, with `CHEBYSHEV_PARTS` for its LayerNorms. Else exact LayerNorms, and a
            batched matmul for the heads' products, as a user writes it.
        planned: as a plan of bits says, too. The LayerNorms' ranges are then where random weights need them.
    """

    attention: str
    hidden_act: str
    folded: bool = False
    planned: bool = False

    def config(self, shape: str, num_hidden_layers: int, **fields: Any) -> BertConfig:
        """Of a preset's shape."""
        layer_norm = [CHEBYSHEV_PARTS] * num_hidden_layers if self.folded else "layer_norm"
        return preset(
            shape,
            attention=self.attention,
            hidden_act=self.hidden_act,
            layer_norm=layer_norm,
            num_hidden_layers=num_hidden_layers,
            **fields,
        )


VARIANTS: Mapping[str, Variant] = {
    # PUMA, arXiv 2307.12533: no retraining. Its own functions, as its public script has them, send 593 MB in 439 rounds
    # a layer of this encoder; these are the same functions with comparisons and products taken together.
    "puma": Variant("softmax_puma", "gelu_puma"),
    # MPCFormer, arXiv 2211.01452.
    "mpcformer": Variant("2quad", "quad"),
    # SecFormer, ACL Findings 2024, its functions alone, on this protocol. Its own code runs on another one, of two
    # parties and a dealer that have a cheap sine, and sends 526 MB a layer there; SPU's sine alone sends more.
    "secformer": Variant("2quad", "gelu_secformer"),
    "2quad_freediv": Variant("2quad_freediv", "quad", folded=True),
    "2quad_freediv_planned": Variant("2quad_freediv", "quad", folded=True, planned=True),
    "softmax_freediv": Variant("softmax_freediv", "quad", folded=True),
}
BASELINE = "flax_bert"
EMBEDDED = "flax_bert_embedded"

# How all of them are compiled, as PUMA's and SPU's public scripts are: it takes less wherever something divides by a
# row's sum, which here only the unmodified softmax and 2relu do, and their sums are not large.
SHARED_RECIPROCAL = True


class Workload(NamedTuple):
    """What runs on shares: a function of (weights, *inputs), those, and the fraction bits of the parties."""

    function: Callable[..., Any]
    weights: Any
    inputs: tuple[Any, ...]
    fraction_bits: int = 18

    def plain(self) -> Any:
        """The output in the clear."""
        return jax.jit(self.function)(self.weights, *self.inputs)

    def run(self, parties: secure.Parties) -> secure.Run:
        """Output and cost, the weights being resident."""
        weights = parties.put(self.weights)
        return secure.jit(self.function, parties=parties, shared_reciprocal=SHARED_RECIPROCAL).run(
            weights, *self.inputs
        )

    def plan(self) -> secure.BitPlan:
        """The plan of its bits, from these very weights and inputs."""
        return secure.plan(self.function, [(self.weights, *self.inputs)])

    def planned(self, plan: secure.BitPlan) -> "Workload":
        """The same as a plan of bits says."""
        fixed = secure.Fixed(self.function, plan)
        weights, *inputs = fixed.encode((self.weights, *self.inputs))
        return Workload(fixed, weights, tuple(inputs), secure.FRACTION_BITS)


def random_params(shapes: Any) -> Any:
    """Parameters of these shapes (a pytree of ShapeDtypeStructs): vectors of ones, matrices of small numbers.

    Faster than a model's own initialisation, which is compiled first.
    """
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if len(leaf.shape) < 2:
            return np.ones(leaf.shape, np.float32)
        return 0.02 * rng.standard_normal(leaf.shape, np.float32)

    return jax.tree.map(fill, shapes)


def as_written(model: WithHead) -> Callable[..., jax.Array]:
    """What a user writes: (params, embeddings or tokens, mask) -> logits, with nothing folded."""

    def from_embeddings(params: Any, embeddings: jax.Array, mask: Any) -> Any:
        return model.apply({"params": params}, embeddings, mask, method="from_embeddings")

    def from_tokens(params: Any, tokens: tuple[jax.Array, ...], mask: Any) -> Any:
        embeddings: Any = model.apply({"params": params}, *tokens, attention_mask=mask.tokens, method="embed")
        return from_embeddings(params, embeddings, mask)

    return from_embeddings if model.config.embedding.client_embeds else from_tokens


def ours(config: EncoderConfig, *, folded: bool, batch: int, tokens: int, planned: bool = False) -> Workload:
    """A classifier of this package as it is served: the client's part is done, the head is included.

    `planned`: as it is for a plan of bits, which is still to be made.
    """
    config = dataclasses.replace(config, num_texts=1)  # else the types of pairs are shared too
    model = family_of(config.model_type).models[0](config)
    params = random_params(param_shapes(model))
    if folded:
        bits = secure.FRACTION_BITS if planned else secure.Config().fraction_bits
        _, client, function, weights, _ = private(model, params, secure.Config(fraction_bits=bits))
    else:
        client, weights = without_embeddings(model, params) if config.embedding.client_embeds else ({}, params)
        function = as_written(model)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, tokens), np.int32)
    shared: Any = (config.embedding.encode(jnp.asarray(ids), config.vocab_size),)
    if client:
        shared = jax.jit(model.apply, static_argnames="method")({"params": client}, *shared, method="embed")
    return Workload(function, weights, jax.device_get((shared, config.mask(jnp.ones((batch, tokens))))))


def fitted(config: BertConfig, batch: int, tokens: int) -> BertConfig:
    """The config with its LayerNorms for the variances that random weights make: ranges are moved, in their width."""
    exact = dataclasses.replace(config, layer_norm="layer_norm")
    model = family_of(config.model_type).models[0](exact)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, tokens), np.int32)
    params = random_params(param_shapes(model))

    def met(params: Any, ids: jax.Array) -> Any:
        found: Any = model.apply({"params": params}, ids, method="outputs")
        return found.intermediates.variances

    def moved(part: Any, variances: Any) -> Any:
        if isinstance(part, Linear):
            return part.calibrated(variances)
        return part.scaled(math.sqrt(float(variances.min() * variances.max()) / (part.low * part.high)))

    layers = [config.layer_norms_of(layer) for layer in range(config.num_hidden_layers)]
    found = jax.jit(met)(params, ids)
    return dataclasses.replace(
        config, layer_norm=[tuple(map(moved, parts, own)) for parts, own in zip(layers, found, strict=True)]
    )


def flax_bert(config: BertConfig, *, client_embeds: bool, batch: int, tokens: int) -> Workload:
    """transformers' FlaxBertForSequenceClassification, unmodified.

    Its ids are secret, as in SPU's flax_gpt2 and PUMA's bench_bert, and are looked up in the secret table; or
    (`client_embeds`) the client embeds, as in SPU's flax_llama7b_split. No public script is exactly either: the first
    is GPT-2, the second has PUMA's functions and a public mask, the third is LLaMA. The mask is secret here.

    Raises:
        ImportError: transformers 5 has no Flax models.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    theirs = transformers.BertConfig(**{name: getattr(config, name) for name in names})
    model = transformers.FlaxBertForSequenceClassification(theirs, _do_init=False)
    params = random_params(unfreeze(model.params_shape_tree))

    def logits(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return model(ids, mask, params=params).logits  # pyright: ignore[reportAttributeAccessIssue]

    def embedded(module: Any, ids: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens), ids.shape)
        return module.bert.embeddings(ids, jnp.zeros_like(ids), positions, None, deterministic=True)

    def after_embedding(module: Any, hidden: jax.Array, mask: jax.Array) -> jax.Array:
        encoded = module.bert.encoder(hidden, mask, head_mask=None, deterministic=True, return_dict=True)
        return module.classifier(module.bert.pooler(encoded.last_hidden_state))

    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, tokens), np.int32)
    mask = np.ones_like(ids)
    if not client_embeds:
        return Workload(logits, params, (ids, mask))
    hidden = jax.device_get(model.module.apply({"params": params}, ids, method=embedded))
    del params["bert"]["embeddings"]
    return Workload(
        lambda params, *inputs: model.module.apply({"params": params}, *inputs, method=after_embedding),
        params,
        (hidden, mask),
    )


def workload(name: str, shape: str, layers: int, *, batch: int = 1, tokens: int = 128, **fields: Any) -> Workload:
    """A variant by name, at a preset's shape; `fields` change its config."""
    if name in (BASELINE, EMBEDDED):
        config = preset(shape, num_hidden_layers=layers, **fields)
        return flax_bert(config, client_embeds=name == EMBEDDED, batch=batch, tokens=tokens)
    variant = VARIANTS[name]
    config = variant.config(shape, layers, **fields)
    config = fitted(config, batch, tokens) if variant.planned else config
    return ours(config, folded=variant.folded, batch=batch, tokens=tokens, planned=variant.planned)
