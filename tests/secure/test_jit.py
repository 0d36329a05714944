import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flaxmpc import secure

PROTOCOLS = ["REF2K", "SEMI2K", "ABY3"]
X = np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4)
W = np.linspace(-1, 1, 20, dtype=np.float32).reshape(4, 5)


def close(secret, plain, atol=1e-3):
    secret, plain = jax.tree.flatten(secret), jax.tree.flatten(plain)
    assert secret[1] == plain[1]
    for ours, exact in zip(secret[0], plain[0], strict=True):
        assert isinstance(ours, np.ndarray)
        assert (ours.shape, ours.dtype) == (exact.shape, exact.dtype)
        np.testing.assert_allclose(ours, exact, atol=atol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_matmul_and_comparison(group, protocol):
    def f(x, w):
        h = x @ w
        return jax.nn.relu(h), h > 0, jnp.sort(h, -1), jax.nn.softmax(h)

    close(secure.jit(f, parties=group(protocol))(X, W), f(X, W))


def test_cheetah(group):
    def f(x):
        return jnp.maximum(x * x, 0.5)

    close(secure.jit(f, parties=group("CHEETAH"))(X[:, 0]), f(X[:, 0]))


def test_wide_ring():
    def f(x):
        return x * x

    large = np.float32(2**15)  # its square is beyond what a product can reach in FM64
    secret = secure.jit(f, "ABY3", ring="FM128")(large)
    np.testing.assert_allclose(secret, f(large), rtol=1e-5)


def test_narrow_ring():
    close(secure.jit(lambda x: x * x, "SEMI2K", ring="FM32", fraction_bits=8)(X), X * X, atol=0.05)


def test_any_pytree(group):
    def f(tree, flag, count):
        return {
            "sum": (tree["a"].sum(), [tree["b"][0] * count, ()]),
            "flag": ~flag,
            "count": count + 1,
            "same": tree["b"][1],
            "constant": jnp.arange(3),
            "zero_size": tree["b"][2],
        }

    args = ({"a": X, "b": (2.5, np.array([3, -4], np.int32), np.zeros((0, 2), np.float32)), "none": None}, True, 7)
    exact = jax.jit(f)(*args)
    close(secure.jit(f, parties=group("REF2K"))(*args), exact)
    close(secure.jit(f, parties=group("ABY3"))(*args), exact)


def test_no_arguments(group):
    close(secure.jit(lambda: jnp.ones(3), parties=group("REF2K"))(), np.ones(3, np.float32))


def test_partial_functions(group):
    f = functools.partial(jnp.sum, axis=0)
    close(secure.jit(f, parties=group("REF2K"))(X), X.sum(0))


def test_a_function_without_output_is_refused(group):
    with pytest.raises(ValueError, match="returns no array"):
        secure.jit(lambda x: (), parties=group("REF2K"))(X)


def arithmetic(x, y):
    return {"sum": x + y, "product": x * y, "matmul": x @ y.T, "max": jnp.maximum(x, y), "tanh": jnp.tanh(x)}


secure_arithmetic = secure.jit(arithmetic, "REF2K")


@settings(max_examples=30, deadline=None)
@given(
    x=hnp.arrays(np.float32, (2, 3), elements=st.floats(-8, 8, width=32)),
    y=hnp.arrays(np.float32, (2, 3), elements=st.floats(-8, 8, width=32)),
)
def test_secure_is_plaintext(x, y):
    close(secure_arithmetic(x, y), arithmetic(x, y), atol=0.01)


def test_public_arguments_are_cheaper_and_in_the_program(group):
    def f(x, w):
        return x @ w

    secret = secure.jit(f, parties=group("ABY3"))
    mixed = secure.jit(f, parties=group("ABY3"), visibility=("secret", "public"))
    public = secure.jit(f, parties=group("ABY3"), visibility="public")
    costs = [g.run(X, W).cost.bytes_sent for g in (secret, mixed, public)]
    assert costs[0] > costs[1] > costs[2] == 0
    assert ["pphlo.secret" in g.program(X, W) for g in (secret, mixed, public)] == [True, True, False]
    assert secret.program(X, W) != mixed.program(X, W)
    close(mixed(X, W), X @ W)
    close(public(X, W), X @ W)


def test_visibilities_are_checked(group):
    with pytest.raises(ValueError, match=r"unknown visibility 'hidden'.* Known: public, secret"):
        secure.jit(jnp.add, visibility=("secret", "hidden"))
    with pytest.raises(ValueError, match="unknown visibility 'hidden'"):
        group("REF2K").put(X, "hidden")
    with pytest.raises(ValueError, match="3 visibilities were given for 2 arguments"):
        secure.jit(jnp.add, parties=group("REF2K"), visibility=("secret",) * 3)(X, X)


def test_bad_settings():
    with pytest.raises(ValueError, match=r"Did you mean 'SEMI2K'\?"):
        secure.jit(jnp.add, "SEMI2")
    with pytest.raises(ValueError, match="unknown ring"):
        secure.jit(jnp.add, ring="FM65")
    with pytest.raises(ValueError, match=r"unknown exp_mode 'pad'\. Did you mean 'pade'\?"):
        secure.jit(jnp.add, exp_mode="pad")


def test_settings_that_the_parties_do_not_have(group):
    with pytest.raises(ValueError, match="protocol 'ABY3' was asked for, but the parties have 'SEMI2K'"):
        secure.jit(jnp.add, "ABY3", parties=group("SEMI2K"))
    with pytest.raises(ValueError, match="exp_mode 'taylor' was asked for, but the parties have 'pade'"):
        secure.jit(jnp.exp, exp_mode="taylor", parties=group("SEMI2K"))
    assert secure.jit(jnp.exp, exp_mode="auto", parties=group("SEMI2K")).config.exp_mode == "pade"
    secure.jit(jnp.add, "SEMI2K", fraction_bits=18, parties=group("SEMI2K"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_shared_reciprocal_sends_less_and_is_less_exact(group, protocol):
    """Large sums leave few bits of a reciprocal: the error grows with the numerator."""
    rng = np.random.default_rng(0)
    x, small = rng.uniform(0, 2, (8, 64)).astype(np.float32), rng.uniform(0.5, 4, (8, 1)).astype(np.float32)
    runs = {
        (shared, factor): secure.jit(jnp.divide, parties=group(protocol), shared_reciprocal=shared).run(
            x * factor, small * factor
        )
        for shared in (False, True)
        for factor in (1, 2048)
    }
    errors = {key: float(np.abs(run.output - x / small).max()) for key, run in runs.items()}
    assert max(errors[False, 1], errors[True, 1], errors[False, 2048]) < 2e-4
    assert 2e-3 < errors[True, 2048] < 4096 * 2.0**-18
    if protocol != "REF2K":
        assert runs[True, 1].cost.bytes_sent < 0.2 * runs[False, 1].cost.bytes_sent


def test_a_shared_reciprocal_is_in_the_key(monkeypatch, tmp_path, group):
    monkeypatch.setenv("FLAXMPC_CACHE", str(tmp_path))
    row = np.ones((3, 1), np.float32)
    programs = [
        secure.jit(jnp.divide, parties=group("REF2K"), shared_reciprocal=shared).program(X, row)
        for shared in (False, True, False)
    ]
    assert ["pphlo.reciprocal" in program for program in programs] == [False, True, False]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_exponentials_by_pade_are_right_where_those_by_taylor_are_not(protocol):
    x = np.array([-1000, -600, -10, -1, 0, 1, 5, 10, 16], np.float32)
    taylor, pade = (secure.jit(jnp.exp, protocol, exp_mode=mode).run(x) for mode in ("taylor", None))
    exact = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(pade.output, exact, rtol=2e-4, atol=1e-5)
    assert np.abs(taylor.output / np.maximum(exact, 1e-9) - 1)[3:].max() > 0.3
    assert np.abs(taylor.output[1]) > 1e3
    assert (taylor.cost.exp_mode, pade.cost.exp_mode) == ("taylor", "pade")
    if protocol != "REF2K":
        assert 3 * taylor.cost.bytes_sent < pade.cost.bytes_sent < 6 * taylor.cost.bytes_sent


WIDE = np.array([-17, -10, -5, -2, -1, -0.1, 0, 0.1, 1, 2, 5, 10, 15], np.float32)
POSITIVE = np.array([0.01, 0.05, 0.1, 0.5, 1, 2, 3, 5, 10, 100, 1000, 10000], np.float32)
UNIT = np.array([-0.99, -0.5, -0.1, 0, 0.1, 0.5, 0.9, 0.99], np.float32)
EXACT_GELU = functools.partial(jax.nn.gelu, approximate=False)
SMOOTH = [
    (WIDE, [jnp.exp, jnp.expm1, jnp.exp2, jnp.sinh, jnp.cosh, jnp.sin, jnp.cos, jnp.arctan, jnp.arcsinh]),
    (WIDE, [jax.nn.sigmoid, jax.nn.softplus, jax.nn.silu, EXACT_GELU, jax.scipy.special.erf, jax.scipy.special.erfc]),
    (
        WIDE,
        [lambda x: jax.nn.logsumexp(jnp.stack([x, -x]), 0), lambda x: jnp.hypot(x, 3), lambda x: jnp.arctan2(x, 0.7)],
    ),
    (POSITIVE, [jnp.log, jnp.log1p, jnp.log2, jnp.sqrt, jax.lax.rsqrt, lambda x: 1 / x, lambda x: jnp.power(x, 0.5)]),
    (POSITIVE[:9], [lambda x: jnp.power(x, 1.5), lambda x: jnp.power(x, x / 2), jax.scipy.special.gammaln]),
    (POSITIVE[4:], [jnp.arccosh]),
    (WIDE, [jnp.tanh, jnp.cbrt, jax.nn.gelu, jax.nn.mish, jax.nn.log_sigmoid]),
    (UNIT, [jnp.tan, jnp.arcsin, jnp.arccos, jnp.arctanh, jax.scipy.special.erfinv]),
]


def test_smooth_functions_are_right_over_wide_ranges():
    def every(*operands):
        return [[f(x) for f in functions] for x, (_, functions) in zip(operands, SMOOTH, strict=True)]

    operands = [x for x, _ in SMOOTH]
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-3),
        secure.jit(every)(*operands),
        jax.tree.map(np.asarray, every(*operands)),
    )


def masked(x, mask):
    """What JAX's users write where some values are to count for nothing."""
    hide: Any = functools.partial(jnp.where, mask, x)
    return {
        "-inf": jax.nn.softmax(hide(-jnp.inf)),
        "the least float": jax.nn.softmax(hide(jnp.finfo(x.dtype).min)),
        "-1e9": jax.nn.softmax(x + (1 - mask) * -1e9),
        "where": jax.nn.softmax(x, where=mask),
        "logsumexp": jax.nn.logsumexp(hide(-jnp.inf), -1),
        "attention": jax.nn.dot_product_attention(*[x[None, :, None]] * 3, mask=mask[None, None, :, : x.shape[0]]),
        "largest": jnp.max(hide(-jnp.inf), -1),
        "smallest": jnp.sort(hide(jnp.inf), -1)[:, :2],
        "place of the largest": jnp.argmax(hide(-jnp.inf), -1),
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_masked_values_count_for_nothing(group, protocol):
    x = np.random.default_rng(0).normal(0, 2, (3, 5)).astype(np.float32)
    mask = np.tri(3, 5, 1, dtype=bool)

    close = functools.partial(np.testing.assert_allclose, atol=1e-3)
    jax.tree.map(close, secure.jit(masked, parties=group(protocol))(x, mask), jax.jit(masked)(x, mask))


def test_bad_arguments_are_named_by_path(group):
    f = secure.jit(lambda x, y: x["k"] + y, parties=group("REF2K"))
    with pytest.raises(ValueError, match=r"argument 0\['k'\] holds nan, which is not finite"):
        f({"k": np.array([1, np.nan], np.float32)}, 1.0)
    with pytest.raises(ValueError, match=r"argument 1 holds inf"):
        f({"k": X}, np.inf)


def test_resident_values_are_sent_once_and_shared_by_functions(monkeypatch):
    parties = secure.InProcess("ABY3")
    stored = []
    store = parties.store
    monkeypatch.setattr(parties, "store", lambda name, shares: (stored.append(name), store(name, shares)))
    forward = secure.jit(lambda p, x: x @ p["w"] + p["b"], parties=parties)
    norm = secure.jit(lambda p: (p["w"] ** 2).sum(), parties=parties)
    params = {"w": W, "b": np.ones(5, np.float32)}
    resident = parties.put(params)
    assert len(stored) == 2
    for shift in (0, 1, 2):
        close(forward(resident, X + shift), (X + shift) @ W + 1)
    assert len(stored) == 2 + 3
    close(norm(resident), np.float32((W**2).sum()))
    assert len(stored) == 5
    assert all(len(member.names) == 2 for member in parties.members)
    assert forward.run(resident, X).cost.compile_seconds == 0


def test_a_resident_argument_has_its_own_visibility(group):
    parties = group("ABY3")
    f = secure.jit(lambda w, x: x @ w, parties=parties)
    public = parties.put(W, "public")
    assert f.run(public, X).cost.bytes_sent < f.run(W, X).cost.bytes_sent
    close(f(public, X), X @ W)


def test_resident_values_stay_with_their_parties(group):
    resident = group("REF2K").put(X)
    with pytest.raises(ValueError, match="reside with other parties"):
        secure.jit(jnp.square, parties=group("ABY3"))(resident)
    with pytest.raises(TypeError, match=r"argument 0\['x'\] is resident: .* whole argument"):
        secure.jit(lambda t: t["x"], parties=group("REF2K"))({"x": resident})


def test_compiled_once_per_shapes_and_dtypes(group):
    traced = []

    def f(x):
        traced.append(x.shape)
        return x * 2

    secret = secure.jit(f, parties=group("REF2K"))
    assert secret.run(X).cost.compile_seconds > 0
    assert secret.run(X + 1).cost.compile_seconds == 0
    assert len(traced) == 1
    secret(X.T)
    secret(X.astype(np.int32))
    assert traced == [(3, 4), (4, 3), (3, 4)]


def test_estimate_needs_no_values(group):
    f = secure.jit(lambda p, x: x @ p["w"], parties=group("ABY3"))
    shapes = {"w": jax.ShapeDtypeStruct(W.shape, W.dtype)}, jax.ShapeDtypeStruct(X.shape, X.dtype)
    estimate, run = f.estimate(*shapes), f.run({"w": W}, X).cost
    assert (estimate.bytes_sent, estimate.rounds) == (run.bytes_sent, run.rounds)
    assert f.program(*shapes) == f.program({"w": W}, X)
    assert "pphlo.dot" in f.program(*shapes)
    resident = group("ABY3").put({"w": W})
    assert f.estimate(resident, shapes[1]).bytes_sent == run.bytes_sent


@pytest.mark.parametrize("op", [jnp.linalg.svd, jnp.fft.fft])
def test_an_unsupported_operation_is_one_line(group, op, capfd):
    with pytest.raises(secure.SecureError, match=r"^SPU cannot compute (svd|fft) \(test_jit.py:\d+\): [^\n]+$"):
        secure.jit(op, parties=group("REF2K"))(X)
    assert capfd.readouterr() == ("", "")


def test_nothing_is_printed(capfd):
    f = secure.jit(lambda x: jax.nn.softmax(x), "ABY3")
    f(X)
    f.estimate(X)
    with pytest.raises(secure.SecureError):
        secure.jit(lambda x: x.astype(jnp.int4).astype(jnp.int32), "SEMI2K")(X)
    assert capfd.readouterr() == ("", "")


SCRIPT = """
import numpy as np, sys
from flaxmpc import secure
assert not {"spu", "torch", "transformers", "grpc"} & set(sys.modules), "imported too early"
from spu import libspu
compiled = []
compile = libspu.compile
libspu.compile = lambda *args: compiled.append(1) or compile(*args)
print(secure.jit(lambda x: x * 2 + 1, "REF2K")(np.float32(3)), len(compiled))
"""


def run_script(cache: Path) -> str:
    root = Path(__file__).parents[2]
    env = os.environ | {"FLAXMPC_CACHE": str(cache), "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, cwd=cache.parent, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout


def test_programs_are_kept_between_processes_and_healed(tmp_path):
    cache = tmp_path / "cache"
    assert run_script(cache) == "7.0 1\n"
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    assert run_script(cache) == "7.0 0\n"
    file.write_bytes(whole[:-7])
    assert run_script(cache) == "7.0 1\n"
    assert file.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [cache]


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path, group):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLAXMPC_CACHE", str(tmp_path / "file" / "cache"))
    close(secure.jit(lambda x: x - 41, parties=group("REF2K"))(X), X - 41)


def test_where_the_cache_is(monkeypatch, tmp_path, group):
    monkeypatch.delenv("FLAXMPC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    secure.jit(lambda x: x - 43, parties=group("REF2K"))(X)
    assert len(list((tmp_path / "flaxmpc" / "programs").iterdir())) == 1


def test_a_user_without_a_home_has_no_cache(monkeypatch, group):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("FLAXMPC_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert secure.cache_dir() is None
    close(secure.jit(lambda x: x - 45, parties=group("REF2K"))(X), X - 45)


def test_a_cache_has_the_umasks_mode(monkeypatch, tmp_path, group):
    monkeypatch.setenv("FLAXMPC_CACHE", str(tmp_path / "cache"))
    before = os.umask(0o027)
    try:
        secure.jit(lambda x: x - 47, parties=group("REF2K"))(X)
    finally:
        os.umask(before)
    (file,) = (tmp_path / "cache").iterdir()
    assert (file.parent.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o750, 0o640)


def test_visibility_and_constants_are_in_the_key(monkeypatch, tmp_path, group):
    monkeypatch.setenv("FLAXMPC_CACHE", str(tmp_path))
    weights = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    for visibility in ("secret", "public"):
        for scale in (1, 2):
            constant = weights.copy()
            constant[40, 40] *= scale
            f = secure.jit(lambda x, c=constant: x @ c, parties=group("REF2K"), visibility=visibility)
            close(f(weights), weights @ constant, atol=0.01)
    assert len(list(tmp_path.iterdir())) == 4
