"""What peers.py compares: parts of ours and of others on the same inputs, which are what a real model's layers met."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from layer_cost import as_written, block, lazily
from variants import CHEBYSHEV_PARTS, Workload

from flaxmpc import secure
from flaxmpc.data.batches import movie_sentences
from flaxmpc.models import folder as folders
from flaxmpc.models import zoo
from flaxmpc.models.bert import preset
from flaxmpc.nn.activation import ACTIVATIONS
from flaxmpc.nn.attention import ATTENTION, Attention
from flaxmpc.nn.mask import Mask
from flaxmpc.nn.product import matmul

OURS, THEIRS = "SEMI2K", "CrypTen"  # protocols
REPETITIONS = 4  # of a layer; of ours the first is cold


class Real(NamedTuple):
    """What the layers of a model met, an array a layer.

    Attributes:
        scores: (layer, 1, head, token, token).
        folded: the same times sqrt(r/n), plus c sqrt(r/n): what a division-free model squares.
        values: (layer, 1, head, token, 64): those of two texts side by side, as a head of BERT-Base has 64 features.
        wide: (layer, 2, token, feature), before the activation, of both texts: as many numbers as 128 x 3072.
    """

    scores: np.ndarray
    folded: np.ndarray
    values: np.ndarray
    wide: np.ndarray

    @property
    def mask(self) -> Mask:
        return jax.device_get(Mask.from_tokens(jnp.ones((1, self.scores.shape[-1]))))


@functools.cache
def real(quick: bool) -> Real:
    """The zoo's default model on two texts; a corner of it for a quick run.

    Its LayerNorms are exact ones: the texts are longer than those that its own are for.
    """
    loaded, tokens = folders.load(zoo.find(zoo.DEFAULT)), 128
    tokenizer, config = loaded.tokenizer, loaded.model.config
    sentences = tokenizer(movie_sentences()["test"]["sentence"][:100], add_special_tokens=False)["input_ids"]
    words = [word for sentence in sentences for word in sentence]
    size = tokens - 2
    texts = [[tokenizer.cls_token_id, *words[i : i + size], tokenizer.sep_token_id] for i in (0, size)]
    model = loaded.model.clone(config=dataclasses.replace(config, layer_norm="layer_norm"))
    outputs, met = model.apply(
        {"params": loaded.params}, jnp.array(texts), method="outputs", mutable=["intermediates"],
        capture_intermediates=lambda module, _: module.name in ("value", "intermediate"),
    )  # fmt: skip
    layers = [met["intermediates"]["bert"][f"layer_{i}"] for i in range(config.num_hidden_layers)]
    values = np.stack([layer["attention"]["value"]["__call__"][0] for layer in layers])
    values = values.reshape(*values.shape[:-1], config.num_attention_heads, -1).transpose(0, 3, 2, 1, 4)
    wide = np.stack([layer["intermediate"]["__call__"][0] for layer in layers])
    scores = np.stack(outputs.intermediates.scores)[:, :1]
    held_scalars = [loaded.params["bert"][f"layer_{i}"]["attention"] for i in range(len(layers))]
    shift, scale = (np.stack([scalars[name] for scalars in held_scalars])[:, None, :, None, None]
                    for name in ("shift", "scale"))  # fmt: skip
    found = Real(
        scores, (scores + shift) * np.sqrt(scale / tokens), values.reshape(*values.shape[:3], -1)[:, None], wide
    )
    if not quick:
        return found
    few = np.s_[:1, :, :2, :8, :8]
    return Real(scores[few], found.folded[few], found.values[few], wide[:1, :, :8, :16])


def mixed(part: Attention) -> Callable[..., jax.Array]:
    """From (None, scores, values, mask) to the context. Of a part's scalars c is as it starts, and r is 1."""

    def context(_: None, scores: jax.Array, values: jax.Array, mask: Mask) -> jax.Array:
        shift = part.scalars(scores.shape[1]).get("shift")
        numerator = part.f(scores, mask, shift)
        return part.normaliser(lambda columns, dropout=None: matmul(numerator, columns), values, mask, None, None)

    return context


def squared(_: None, folded: jax.Array, values: jax.Array) -> jax.Array:
    """2quad_freediv as a folded model has it."""
    return jnp.square(folded) @ values


def folded_quad(_: None, x: jax.Array) -> jax.Array:
    """quad as a folded model has it: of sqrt(0.125) (x + 1)."""
    return jnp.square(x) + 0.375


class Case(NamedTuple):
    """A part on inputs.

    Attributes:
        unit: attention, activation or layer.
        system: whose part it is.
        variant: what it is called in the table.
        part: ours, of (weights, *inputs); or the name of a peer's in crypten_party.py.
        exact: the function in the clear that it stands for, on the same inputs, an array a run.
        inputs: of each run.
        mask: of ours, the same in all runs; none where a part takes none.
        weights: that the parties hold before.
    """

    unit: str
    system: str
    variant: str
    part: Callable[..., Any] | str
    exact: np.ndarray
    inputs: tuple[np.ndarray, ...]
    mask: tuple[Mask, ...] = ()
    weights: Any = None


def each(function: Callable[..., Any], inputs: Sequence[np.ndarray], *more: Any) -> np.ndarray:
    """The function of (None, *inputs, *more) in the clear, for each run."""
    return np.stack([Workload(function, None, (*run, *more)).plain() for run in zip(*inputs, strict=True)])


def attentions(quick: bool) -> Iterator[Case]:
    found = real(quick)
    inputs, folded, mask = (found.scores, found.values), (found.folded, found.values), found.mask
    exact = {name: each(mixed(ATTENTION[name]), inputs, mask) for name in ("softmax", "2quad", "softmax_freediv")}
    exact["2quad_freediv"] = each(squared, folded)
    for name in ("softmax", "2quad", "softmax_freediv"):
        yield Case("attention", "flaxmpc", name, mixed(ATTENTION[name]), exact[name], inputs, (mask,))
    yield Case("attention", "flaxmpc", "2quad_freediv", squared, exact["2quad_freediv"], folded)
    for system, variant, part, stands_for in (
        ("CrypTen", "softmax", "softmax", "softmax"),
        ("SHAFT", "softmax", "softmax_shaft", "softmax"),
        ("SHAFT", "softmax, 64 steps", "softmax_shaft_wide", "softmax"),
        ("MPCFormer", "2quad, as published", "2quad_published", "2quad"),
        ("MPCFormer", "2quad, mended", "2quad", "2quad"),
    ):
        yield Case("attention", system, variant, part, exact[stands_for], inputs)
    yield Case("attention", "flaxmpc", "2quad_freediv", "2quad_freediv", exact["2quad_freediv"], folded)


def activations(quick: bool) -> Iterator[Case]:
    inputs = (real(quick).wide,)
    exact = {name: each(lambda _, x, name=name: ACTIVATIONS[name](x), inputs) for name in ("gelu", "quad")}
    for name in ("gelu", "gelu_bumblebee", "gelu_shaft"):
        yield Case("activation", "flaxmpc", name, lambda _, x, name=name: ACTIVATIONS[name](x), exact["gelu"], inputs)
    squares = (np.sqrt(0.125) * (inputs[0] + 1),)
    yield Case("activation", "flaxmpc", "quad", folded_quad, exact["quad"], squares)
    for system, variant, part, stands_for in (
        ("CrypTen", "gelu by its erf", "gelu_erf", "gelu"),
        ("CrypTen", "gelu by its tanh", "gelu_tanh", "gelu"),
        ("SHAFT", "gelu", "gelu_shaft", "gelu"),
        ("SecFormer", "gelu", "gelu_secformer", "gelu"),
        ("MPCFormer", "quad, as published", "quad_published", "quad"),
        ("MPCFormer", "quad, mended", "quad", "quad"),
    ):
        yield Case("activation", system, variant, part, exact[stands_for], inputs)


def layers(quick: bool) -> Iterator[Case]:
    """With random weights, of which r is the inverse of what 2quad's numerators are about."""
    size, tokens = ("tiny", 8) if quick else ("base", 128)
    for attention, activation, peers in (
        ("softmax", "gelu", {"CrypTen": "layer_softmax", "SHAFT": "layer_shaft"}),
        ("2quad", "quad", {"MPCFormer": "layer_2quad"}),
        ("2quad_freediv", "quad", {"flaxmpc": "layer_2quad_freediv"}),
    ):
        config = preset(size, num_hidden_layers=1, vocab_size=100, attention=attention, hidden_act=activation)
        mask = jax.device_get(config.mask(jnp.ones((1, tokens))))
        hidden = np.random.default_rng(0).normal(size=(1, tokens, config.hidden_size)).astype(np.float32)
        params: Any = jax.jit(block(config).init)(jax.random.key(0), hidden, mask)["params"]  # pyright: ignore[reportIndexIssue]
        if "scale" in params["attention"]:
            params["attention"]["scale"] = jnp.full_like(params["attention"]["scale"], 1 / 25)
        ours = Workload(as_written(config), params, (hidden, mask))
        goal = exact = np.asarray(ours.plain())
        if config.score_degree is not None:
            chebyshev = dataclasses.replace(config, layer_norm=[CHEBYSHEV_PARTS])
            inputs = (hidden * mask.scale[..., None], mask)
            ours = Workload(
                *secure.hoist(lazily(chebyshev, secure.Config(OURS)), params, *inputs, dtype="float64"), inputs
            )
            goal = exact * (ours.plain().std() / exact.std())  # a folded layer leaves its last scale to the next one

        def repeated(array: np.ndarray) -> np.ndarray:
            return np.stack([array] * REPETITIONS)

        name = f"{attention} + {activation}"
        yield Case("layer", "flaxmpc", name, ours.function, repeated(goal), (repeated(ours.inputs[0]),), (mask,),
                   ours.weights)  # fmt: skip
        for system, part in peers.items():
            yield Case("layer", system, name, part, repeated(exact[0]), (repeated(hidden[0]),),
                       weights=for_crypten(params, config.num_attention_heads, tokens))  # fmt: skip


def for_crypten(params: Mapping[str, Any], heads: int, tokens: int) -> dict[str, np.ndarray]:
    """A layer's weights by name: queries, keys and values as one, with 1/sqrt(d) and, where nothing divides, r/n."""
    attention = params["attention"]
    depth = attention["query"]["kernel"].shape[-1] // heads
    scale, shift = np.ones(heads), np.zeros(heads)
    if "scale" in attention:
        scale = np.sqrt(attention["scale"] / tokens)
        shift = attention["shift"] * scale
    factors = [np.repeat(scale / np.sqrt(depth), depth), 1, 1]
    found = {"shift": shift[:, None, None]}
    for field in ("kernel", "bias"):
        parts = [attention[name][field] * by for name, by in zip(("query", "key", "value"), factors, strict=True)]
        found[f"qkv/{field}"] = np.concatenate(parts, -1)
        found |= {f"{name}/{field}": params[name][field] for name in ("intermediate", "output")}
        found[f"attention/output/{field}"] = attention["output"][field]
    for name in ("attention_layer_norm", "output_layer_norm"):
        found |= {f"{name}/{field}": params[name][field] for field in ("scale", "bias")}
    return {name: np.asarray(array, np.float32) for name, array in found.items()}
