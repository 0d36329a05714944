import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from flaxmpc.nn.activation import ACTIVATIONS, Activation
from flaxmpc.nn.attention import ATTENTION, Constant
from flaxmpc.nn.embedding import EMBEDDINGS
from flaxmpc.nn.normalization import NORMALIZATIONS, Chebyshev, Normalization
from flaxmpc.nn.parts import Registry

REGISTRIES = [ATTENTION, ACTIVATIONS, NORMALIZATIONS, EMBEDDINGS]
by_kind = pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)


def test_every_published_part_is_registered():
    assert set(ATTENTION) >= {
        *("softmax", "softmax_puma", "2relu", "2quad", "softmax_freediv", "2quad_freediv", "relu_freediv", "scaling"),
        *("softmax_nimbus", "softmax_shaft", "power5_batch", "square_freediv"),
    }
    assert set(ACTIVATIONS) >= {
        *("gelu", "gelu_tanh", "relu", "silu", "quad", "gelu_puma", "gelu_bumblebee", "gelu_bolt"),
        *("gelu_secformer", "gelu_shaft", "gelu_nimbus"),
    }
    assert set(NORMALIZATIONS) >= {"layer_norm", "layer_norm_chebyshev"}
    assert set(EMBEDDINGS) >= {"public", "secret"}


@by_kind
def test_a_part_is_found_under_its_own_name(registry):
    assert len(registry) > 1
    for name, part in registry.items():
        assert part.name == name
        assert isinstance(part, registry.part_type)
        assert registry.resolve(name) is part


@by_kind
def test_an_object_of_the_kind_is_taken_as_it_is(registry):
    for part in registry.values():
        own = dataclasses.replace(part, name="own")
        assert registry.resolve(own) is own


def test_an_own_object_needs_no_base_class():
    class Mine:
        name = "mine"

        def __call__(self, x, epsilon):
            return x / 2.0

    mine = Mine()
    assert NORMALIZATIONS.resolve(mine) is mine


@by_kind
def test_an_unknown_name_gets_the_known_ones_and_the_closest(registry):
    for name in registry:
        with pytest.raises(ValueError, match="unknown") as error:
            registry.resolve(name + "x")
        message = str(error.value)
        assert registry.kind in message
        assert f"Did you mean {name!r}?" in message
        assert all(known in message for known in registry)


@by_kind
def test_a_name_like_no_other_gets_no_guess(registry):
    with pytest.raises(ValueError, match="Known: ") as error:
        registry.resolve("@@@@")
    assert "Did you mean" not in str(error.value)


@by_kind
@pytest.mark.parametrize("spec", [None, 3, object(), ["softmax"], {}, {"name": 3}])
def test_what_is_no_part_is_refused(registry, spec):
    with pytest.raises(TypeError, match=registry.kind):
        registry.resolve(spec)


@by_kind
def test_every_part_survives_spec_and_resolve(registry):
    for name, part in registry.items():
        assert registry.spec(part) == name
        assert registry.resolve(registry.spec(part)) is part


def test_fields_of_a_registered_part_are_changed_by_a_mapping():
    part = NORMALIZATIONS.resolve({"name": "layer_norm_chebyshev", "low": 0.5, "depth": 3})
    assert part == Chebyshev(low=0.5, depth=3)
    assert NORMALIZATIONS.spec(part) == {"name": "layer_norm_chebyshev", "low": 0.5, "depth": 3}
    assert NORMALIZATIONS["layer_norm_chebyshev"] == Chebyshev()

    part = ATTENTION.resolve({"name": "2quad", "shift": 3.0, "score_range": [-1.0, 1.0]})
    assert part == dataclasses.replace(ATTENTION["2quad"], shift=3.0, score_range=(-1.0, 1.0))
    assert ATTENTION.resolve(ATTENTION.spec(part)) == part


def test_an_unknown_field_gets_the_known_ones_and_the_closest():
    with pytest.raises(ValueError, match="field of layer_norm 'layer_norm_chebyshev' 'dept'") as error:
        NORMALIZATIONS.resolve({"name": "layer_norm_chebyshev", "dept": 3})
    assert "Did you mean 'depth'?" in str(error.value)


def test_what_no_config_can_hold_has_no_spec():
    with pytest.raises(ValueError, match="'mine' is not registered"):
        ACTIVATIONS.spec(dataclasses.replace(ACTIVATIONS["quad"], name="mine"))
    with pytest.raises(ValueError, match="another normaliser"):
        ATTENTION.spec(dataclasses.replace(ATTENTION["2quad_freediv"], normaliser=Constant(per_length=False)))


def test_a_taken_name_is_refused_and_the_part_kept():
    registry = Registry("norm", Chebyshev)
    first = registry.register(Chebyshev("a"))
    assert registry.register(first) is first
    with pytest.raises(ValueError, match="norm 'a' is registered already, as another part: give this one its own name"):
        registry.register(Chebyshev("a", depth=2))
    assert dict(registry) == {"a": first}


def test_a_part_may_be_registered_again_by_the_same_definition():
    registry = Registry("activation", Activation)

    def cell(power: int = 3) -> Activation:
        return registry.register(Activation("mine", lambda x: (x + 1) ** power, "mine"))

    first = cell()
    again = cell()
    assert first != again  # as their functions are two objects
    assert registry["mine"] is again
    assert registry.spec(first) == registry.spec(again) == "mine"  # a model built before can still be saved
    with pytest.raises(ValueError, match="'mine' is registered already, as another part"):
        cell(power=2)
    assert registry["mine"] is again


def test_an_object_of_an_own_class_may_be_registered_again():
    registry = Registry("norm", Normalization)
    module: dict = {"__name__": "__main__", "registry": registry}
    cell = (
        "class Mine:\n    name = 'mine'\n    def __call__(self, x):\n        return {} * x\nregistry.register(Mine())"
    )
    exec(cell.format(2), module)
    exec(cell.format(2), module)
    with pytest.raises(ValueError, match="'mine' is registered already, as another part"):
        exec(cell.format(3), module)
    mine: Any = registry["mine"]
    assert mine(jnp.ones(())) == 2


@pytest.mark.parametrize(
    ("name", "ours", "formula"),
    [
        *(
            (name, "gelu_tanh", lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
            for name in ("gelu_new", "gelu_pytorch_tanh", "gelu_accurate", "gelu_python_tanh")
        ),
        ("gelu_fast", "gelu_tanh", lambda x: 0.5 * x * (1 + np.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)))),
        ("gelu_python", "gelu", lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))),
        ("swish", "silu", lambda x: x / (1 + np.exp(-x))),
    ],
)
def test_hf_has_other_names_for_some_activations(name, ours, formula):
    part = ACTIVATIONS.resolve(name)
    assert part is ACTIVATIONS[ours]
    assert name in ACTIVATIONS
    assert name not in set(ACTIVATIONS)
    assert ACTIVATIONS.spec(part) == ours
    x = np.linspace(-8, 8, 101)
    np.testing.assert_allclose(np.asarray(part(jnp.asarray(x, jnp.float32))), formula(x), atol=2e-6)
    with pytest.raises(ValueError, match=f"{name!r} is registered already"):
        ACTIVATIONS.register(dataclasses.replace(part, name=name))


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("quick_gelu", "gelu"),
        ("gelu_10", "gelu"),
        ("relu2", "relu"),
        ("relu6", "relu"),
        ("leaky_relu", "relu"),
        ("prelu", "relu"),
        ("selu", "silu"),
        ("sigmoid", None),
        ("linear", None),
        ("mish", None),
        ("laplace", None),
    ],
)
def test_an_activation_of_hf_that_is_no_part_gets_the_closest(name, closest):
    assert name not in ACTIVATIONS
    with pytest.raises(ValueError, match=f"unknown activation {name!r}") as error:
        ACTIVATIONS.resolve(name)
    assert ("Did you mean" in str(error.value)) == (closest is not None)
    assert closest is None or f"Did you mean {closest!r}?" in str(error.value)
    assert "gelu_tanh" in str(error.value)
