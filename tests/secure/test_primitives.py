"""Every primitive of JAX on shares: it gives JAX's value, or it is refused by name. Nothing ends the process.

As a program, `python test_primitives.py PROTOCOL [--without-table] < names` tries examples, one name a line. It prints
two lines for each, before and after: "> name", and "= " with a JSON list of name, outcome and text. The outcome is
"right", "refused", "wrong" or "error"; if the process ends after the first line, the example ended it.
"""

# What JAX exports is not all said to type checkers.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false

import concurrent.futures
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback
from jax.extend.core import primitives

from flaxmpc import secure
from flaxmpc.secure import lowering
from flaxmpc.secure.refused import REFUSED

F = np.array([-2.5, -1.0, -0.5, 0.0, 0.25, 0.75, 1.0, 3.0], np.float32)
F2 = np.array([1.5, -2.0, -0.5, 0.25, 3.0, 0.75, -1.0, 2.0], np.float32)
POSITIVE = np.array([0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 7.0], np.float32)
UNIT = np.array([-0.9, -0.5, -0.25, 0.0, 0.125, 0.3, 0.5, 0.9], np.float32)
ANGLE = np.array([-1.4, -1.0, -0.5, 0.0, 0.25, 0.75, 1.0, 1.4], np.float32)
ABOVE_ONE = np.array([1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.5, 8.0], np.float32)
I = np.array([-7, -3, -1, 0, 1, 2, 6, 100], np.int32)  # noqa: E741
I2 = np.array([3, -3, 2, 5, -1, 2, 7, -9], np.int32)
B = np.array([True, False, True, True, False, False, True, False])
B2 = np.array([True, True, False, True, False, True, False, False])
PAIRS = {"float32": (F, F2), "int32": (I, I2), "bool": (B, B2)}
MATRIX = np.array([[2.0, 0.5, -1.0], [0.5, 1.5, 0.25], [-1.0, 0.25, 3.0]], np.float32)  # symmetric, positive definite
WIDE = np.arange(12, dtype=np.float32).reshape(3, 4) / 4 - 1


class Example(NamedTuple):
    """`tolerance`: of 1 + |value|. `refused`: what the error says, where it depends on the operands."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    tolerance: float = 2e-3
    refused: str = ""


EXAMPLES: dict[str, dict[str, Example]] = {}


def add(primitive: str, kind: str, fn: Callable[..., Any], *args: Any, **more: Any) -> None:
    EXAMPLES.setdefault(primitive, {})[kind] = Example(fn, args, **more)


def every(primitive: str, fn: Callable[..., Any], operands: int, kinds: tuple[str, ...] = tuple(PAIRS)) -> None:
    for kind in kinds:
        add(primitive, kind, fn, *PAIRS[kind][:operands])


NUMBERS = ("float32", "int32")
WHOLE = ("int32", "bool")
FLOAT = ("float32",)

# ------------------------------------------------------------------------------------------------ element by element
for name, fn in {"abs": lax.abs, "neg": lax.neg, "sign": lax.sign}.items():
    every(name, fn, 1, NUMBERS)
every("not", lax.bitwise_not, 1, WHOLE)
every("clz", lax.clz, 1, ("int32",))
for kind in ("int8", "uint8", "int16", "uint16", "int32", "uint32"):
    limits = [np.iinfo(kind).min, np.iinfo(kind).max, 0, 1, 77]
    add("population_count", kind, lambda x: lax.population_count(x).astype(np.int32), np.array(limits, kind))
for name in ("logistic", "sin", "cos", "erf", "erfc", "floor", "ceil", "round", "is_finite", "atan", "asinh", "cbrt"):
    add(name, "float32", getattr(lax, name), F)
for name in ("exp", "expm1", "exp2", "tanh", "sinh", "cosh", "bessel_i0e", "bessel_i1e"):
    add(name, "float32", getattr(lax, name), F, tolerance=2e-2)
add("round", "to even", lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN), F)
for name in ("log", "sqrt", "rsqrt", "lgamma", "digamma"):
    add(name, "float32", getattr(lax, name), POSITIVE)
add("log1p", "float32", lax.log1p, UNIT)
for name in ("asin", "acos", "atanh", "erf_inv"):
    add(name, "float32", getattr(lax, name), UNIT, tolerance=1e-2)
add("tan", "float32", lax.tan, ANGLE, tolerance=1e-2)
add("acosh", "float32", lax.acosh, ABOVE_ONE, tolerance=1e-2)
add("integer_pow", "float32", lambda x: [lax.integer_pow(x, k) for k in (0, 2, 3)], F)
add("integer_pow", "negative", lambda x: lax.integer_pow(x, -2), POSITIVE)
add("integer_pow", "int32", lambda x: [lax.integer_pow(x, k) for k in (2, 3)], I)
add("pow", "float32", lax.pow, POSITIVE, F2, tolerance=2e-2)
add("pow", "negative base, whole exponent", lambda x: lax.pow(x, np.full(8, 3, np.int32)), F, tolerance=2e-2)
add("pow", "secret whole exponent", lax.pow, F2, np.array([0, 1, 2, 3, 2, 1, 3, 0], np.int32), tolerance=2e-2)
for name in ("add", "sub", "mul", "rem"):
    every(name, getattr(lax, name), 2, NUMBERS)
add("rem", "float32", lax.rem, F, F2)
add("div", "float32", lax.div, F, F2)
add("div", "int32", lax.div, I, I2)
for name in ("max", "min"):
    every(name, getattr(lax, name), 2)
for name in ("eq", "ne", "lt", "le", "gt", "ge"):
    every(name, getattr(lax, name), 2)
for name, fn in {"and": lax.bitwise_and, "or": lax.bitwise_or, "xor": lax.bitwise_xor}.items():
    every(name, fn, 2, WHOLE)
for name in ("shift_left", "shift_right_logical", "shift_right_arithmetic"):
    add(name, "int32", lambda x, name=name: getattr(lax, name)(x, np.full(8, 2, np.int32)), I)
    few = np.array([0, 1, 2, 3, 4, 5, 1, 2], np.int32)
    add(name, "secret places", getattr(lax, name), I, few, refused="the number of places must be known")
add("atan2", "float32", lax.atan2, F, F2, tolerance=1e-2)
add("nextafter", "float32", lax.nextafter, F, F2, tolerance=0.0)
add("complex", "float32", lambda x, y: lax.real(lax.complex(x, y) * lax.complex(y, x)), F, F2)
add("real", "float32", lambda x, y: lax.real(lax.complex(x, y)), F, F2)
add("imag", "float32", lambda x, y: lax.imag(lax.complex(x, y)), F, F2)
add("conj", "float32", lambda x, y: lax.imag(lax.conj(lax.complex(x, y))), F, F2)
add("igamma", "float32", lax.igamma, POSITIVE, POSITIVE[::-1].copy(), tolerance=1e-2)
add("igammac", "float32", lax.igammac, POSITIVE, POSITIVE[::-1].copy(), tolerance=1e-2)
add("igamma_grad_a", "float32", lax.igamma_grad_a, POSITIVE, POSITIVE[::-1].copy(), tolerance=1e-2)
add("random_gamma_grad", "float32", lax.random_gamma_grad, POSITIVE, POSITIVE[::-1].copy(), tolerance=1e-2)
add("regularized_incomplete_beta", "float32", lax.betainc, POSITIVE, POSITIVE, np.abs(UNIT), tolerance=1e-2)
add("polygamma", "float32", lax.polygamma, np.ones(8, np.float32), POSITIVE, tolerance=1e-2)
add("zeta", "float32", lax.zeta, POSITIVE + 1.5, POSITIVE, tolerance=1e-2)
every("select_n", lambda x, y: lax.select_n(B, x, y), 2)
for kind, (x, y) in PAIRS.items():
    add("select_n", f"secret choice of {kind}", lax.select_n, B, x, y)
add("select_n", "of three", lambda k, x: lax.select_n(k, x, -x, x * x), np.arange(8, dtype=np.int32) % 3, F)
for kind, low, high in (("float32", -1.0, 0.5), ("int32", -2, 5)):
    add("clamp", kind, lambda x, low=low, high=high: lax.clamp(low, x, high), PAIRS[kind][0])
    add("clamp", f"{kind}, secret bounds", lambda x, a, b: lax.clamp(a, x, b), PAIRS[kind][0], *np.sort(PAIRS[kind], 0))
for kind, (x, _) in PAIRS.items():
    for to in PAIRS:
        if to != kind:
            add("convert_element_type", f"{kind} to {to}", lambda x, to=to: lax.convert_element_type(x, to), x)
for to in ("bfloat16", "float16", "int4"):
    add(
        "convert_element_type",
        f"float32 to {to}",
        lambda x, to=to: x.astype(to).astype(x.dtype),
        F,
        refused="no type on shares|pphlo.convert",
    )
add("convert_element_type", "float32 to complex64", lambda x: lax.real(x.astype(jnp.complex64) * 2), F)
add("bitcast_convert_type", "int32 to uint32", lambda x: lax.bitcast_convert_type(x, np.uint32) > 5, I)
add("bitcast_convert_type", "float32 to int32", lambda x: lax.bitcast_convert_type(x, np.int32), F, refused="bits")
add("bitcast_convert_type", "int32 to uint8", lambda x: lax.bitcast_convert_type(x, np.uint8), I, refused="bits")
add("reduce_precision", "float32", lambda x: lax.reduce_precision(x, 5, 3), F)
every("copy", lambda x: lax.copy_p.bind(x), 1)
every("add_any", lambda x, y: jax.interpreters.ad.add_jaxvals(x, y), 2, NUMBERS)
add("stop_gradient", "float32", lax.stop_gradient, F)

# ------------------------------------------------------------------------------------------------------------ shapes
for kind, (x, y) in PAIRS.items():
    square, other = x.reshape(2, 4), y.reshape(2, 4)
    add("broadcast_in_dim", kind, lambda x: lax.broadcast_in_dim(x, (3, 2, 4), (1, 2)), square)
    add("reshape", kind, lambda x: lax.reshape(x, (4, 2)), square)
    add("transpose", kind, lambda x: lax.transpose(x, (1, 0)), square)
    add("squeeze", kind, lambda x: lax.squeeze(x, (0,)), square[None])
    add("rev", kind, lambda x: lax.rev(x, (0, 1)), square)
    add("concatenate", kind, lambda x, y: lax.concatenate([x, y], 1), square, other)
    add("pad", kind, lambda x: lax.pad(x, np.ones((), x.dtype), [(1, 2, 0), (0, 1, 1)]), square)
    add("pad", f"{kind}, negative", lambda x: lax.pad(x, np.ones((), x.dtype), [(0, 0, 0), (-1, 2, 0)]), square)
    add("slice", kind, lambda x: lax.slice(x, (0, 1), (2, 4), (1, 2)), square)
    i = np.int32(1)
    add("dynamic_slice", kind, lambda x: lax.dynamic_slice(x, (0, 2), (2, 2)), square)
    add("dynamic_slice", f"{kind}, secret start", lambda x, i: lax.dynamic_slice(x, (0, i), (2, 2)), square, i)
    add("dynamic_slice", f"{kind}, beyond", lambda x, i: lax.dynamic_slice(x, (0, i), (2, 2)), square, np.int32(9))
    add("dynamic_update_slice", kind, lambda x, y: lax.dynamic_update_slice(x, y[:, :2], (0, 1)), square, other)
    add(
        "dynamic_update_slice",
        f"{kind}, secret start",
        lambda x, y, i: lax.dynamic_update_slice(x, y[:, :2], (0, i)),
        square,
        other,
        i,
    )
    add("gather", kind, lambda x: x[:, np.array([2, 0, 2])], square)
    add("gather", f"{kind}, secret index", lambda x, i: x[:, i], square, np.array([2, 0, 3], np.int32))
    add("gather", f"{kind}, beyond", lambda x: x.at[:, np.array([2, 9])].get(mode="fill", fill_value=1), square)
    add("gather", f"{kind}, clipped", lambda x, i: x.at[:, i].get(mode="clip"), square, np.array([2, 9, -9], np.int32))
    add(
        "gather",
        f"{kind}, secret beyond",
        lambda x, i: x.at[:, i].get(mode="fill", fill_value=1),
        square,
        np.array([2, 9, 3], np.int32),
    )
    places = np.array([[1, 3], [1, 0]])
    for method, name in {"set": "", "add": "-add", "multiply": "-mul", "min": "-min", "max": "-max"}.items():
        if kind == "bool" and method in ("add", "multiply"):
            continue

        def scattered(x, y, method=method):
            return getattr(x.at[:, np.array([1, 3])], method)(y[:, :2])

        def at_secret(x, y, i, method=method):
            return getattr(x.at[:, i], method)(y[:, :2])

        def repeated(x, y, method=method):
            return getattr(x.at[:, np.array([1, 1])], method)(y[:, :2])

        add(f"scatter{name}", kind, scattered, square, other)
        add(f"scatter{name}", f"{kind}, secret index", at_secret, square, other, np.array([1, 3], np.int32))
        add(f"scatter{name}", f"{kind}, secret beyond", at_secret, square, other, np.array([1, 9], np.int32))
        if method != "set":
            add(f"scatter{name}", f"{kind}, twice", repeated, square, other)
            add(f"scatter{name}", f"{kind}, secret, twice", at_secret, square, other, np.array([1, 1], np.int32))
    add("iota", kind, lambda x: x * lax.iota(np.int32 if x.dtype == bool else x.dtype, 4), square)

# -------------------------------------------------------------------------------------------------- sums and products
for kind, (x, y) in PAIRS.items():
    square = x.reshape(2, 4)
    for name in ("reduce_max", "reduce_min"):
        add(name, kind, lambda x, name=name: getattr(lax, f"{name}_p").bind(x, axes=(1,)), square)
    for name in ("argmax", "argmin"):
        add(name, kind, lambda x, name=name: getattr(lax, name)(x, 1, np.int32), square)
    for name in ("cummax", "cummin"):
        if kind != "bool":
            add(name, kind, lambda x, name=name: getattr(lax, name)(x, 1), square)
            add(name, f"{kind}, reverse", lambda x, name=name: getattr(lax, name)(x, 1, reverse=True), square)
    if kind != "float32":
        for name in ("reduce_and", "reduce_or", "reduce_xor"):
            add(name, kind, lambda x, name=name: getattr(lax, f"{name}_p").bind(x, axes=(1,)), square)
    if kind != "bool":
        for name in ("reduce_sum", "reduce_prod"):
            add(name, kind, lambda x, name=name: getattr(lax, f"{name}_p").bind(x, axes=(1,)), square)
        for name in ("cumsum", "cumprod"):
            add(name, kind, lambda x, name=name: getattr(lax, name)(x, 1), square)
        add(
            "reduce",
            kind,
            lambda x: lax.reduce(x, np.zeros((), x.dtype), lambda a, b: a + b + a * b, (1,)),
            square[:, :2],
        )
        add("dot_general", kind, lambda x, y: jnp.matmul(x, y), square, y.reshape(4, 2))
        add("dot_general", f"{kind}, batch", lambda x, y: jnp.einsum("bi,bi->b", x, y), square, y.reshape(2, 4))
        for name, init in {"sum": 0, "max": -1000, "min": 1000}.items():
            fn = {"sum": lax.add, "max": lax.max, "min": lax.min}[name]

            def windows(x, fn=fn, init=init, padding="SAME", dilation=(1, 1)):
                start = np.asarray(init, x.dtype)
                return lax.reduce_window(x, start, fn, (1, 2), (1, 1), padding, window_dilation=dilation)

            add(f"reduce_window_{name}", kind, windows, square)
        add(
            "reduce_window_max",
            f"{kind}, infinite start",
            lambda x: lax.reduce_window(
                x,
                -np.inf if x.dtype == np.float32 else np.iinfo(np.int32).min,
                lax.max,
                (1, 2),
                (1, 2),
                "SAME",
            ),
            square[:, :3],
        )
        add(
            "reduce_window",
            kind,
            lambda x: lax.reduce_window(x, np.ones((), x.dtype), lax.mul, (1, 2), (1, 1), "VALID"),
            square,
        )
        add("sort", kind, lambda x: lax.sort(x, 1), square)
        add("sort", f"{kind} with values", lambda x, y: lax.sort((x, y), num_keys=1), np.floor(x), y)
        add("sort", f"{kind}, two keys", lambda x, y: lax.sort((x, y, x - y), num_keys=2), np.floor(x), y)
    add("top_k", kind, lambda x: lax.top_k(x, 2), square)
add("approx_top_k", "float32", lambda x: lax.approx_max_k(x, 2), F2.reshape(2, 4))
add("cumlogsumexp", "float32", lambda x: lax.cumlogsumexp(x), F, tolerance=1e-2)
add("dot_general", "preferred type", lambda x, y: lax.dot(x, y, preferred_element_type=np.float32), I, I2)
image = np.arange(32, dtype=np.float32).reshape(1, 2, 4, 4) / 8 - 2
kernel = np.arange(16, dtype=np.float32).reshape(2, 2, 2, 2) / 8 - 1
add("conv_general_dilated", "float32", lambda x, w: lax.conv(x, w, (1, 1), "SAME"), image, kernel)
add(
    "conv_general_dilated",
    "dilated, strides",
    lambda x, w: lax.conv_general_dilated(x, w, (2, 1), [(1, 0), (0, 2)], (2, 1), (1, 2)),
    image,
    kernel,
)
add(
    "conv_general_dilated",
    "batch groups",
    lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "VALID", batch_group_count=2),
    np.concatenate([image, -image]),
    kernel,
)
add(
    "conv_general_dilated",
    "gradient by groups",
    jax.grad(lambda w, x: (lax.conv_general_dilated(x, w, (1, 1), "SAME", feature_group_count=2) ** 2).sum()),
    kernel[:, :1].copy(),
    image,
)
add(
    "conv_general_dilated",
    "groups",
    lambda x, w: lax.conv_general_dilated(x, w[:, :1], (1, 1), "VALID", feature_group_count=2),
    image,
    kernel,
)
add(
    "conv_general_dilated",
    "int32",
    lambda x, w: lax.conv(x, w, (1, 1), "SAME"),
    *(np.int32(a * 8) for a in (image, kernel)),
)
add(
    "select_and_gather_add",
    "float32",
    jax.grad(
        lambda x: jnp.sum(
            jax.grad(lambda x: jnp.sum(lax.reduce_window(x, -np.inf, lax.max, (1, 2), (1, 1), "VALID") ** 2))(x) ** 2
        )
    ),
    F2.reshape(2, 4),
)
add(
    "select_and_scatter_add",
    "float32",
    jax.grad(lambda x: jnp.sum(lax.reduce_window(x, -np.inf, lax.max, (1, 2), (1, 2), "VALID") ** 2)),
    F2.reshape(2, 4),
)
add(
    "select_and_scatter_add",
    "overlapping",
    jax.grad(lambda x: jnp.sum(lax.reduce_window(x, -np.inf, lax.max, (1, 2), (1, 1), "VALID") ** 2)),
    F2.reshape(2, 4),
)
add(
    "select_and_scatter",
    "float32",
    lambda x: lax.select_and_scatter_p.bind(
        x,
        x[:, ::2],
        np.float32(0),
        select_jaxpr=SELECT.jaxpr,
        select_consts=(),
        scatter_jaxpr=SCATTER.jaxpr,
        scatter_consts=(),
        window_dimensions=(1, 2),
        window_strides=(1, 2),
        padding=((0, 0), (0, 0)),
    ),
    F2.reshape(2, 4),
)
SELECT = jax.make_jaxpr(lambda a, b: a >= b)(np.float32(0), np.float32(0))
SCATTER = jax.make_jaxpr(lambda a, b: a + b)(np.float32(0), np.float32(0))
add("fft", "float32", lambda x: jnp.abs(jnp.fft.rfft(x)), F)
add(
    "ragged_dot",
    "float32",
    lambda x, w: lax.ragged_dot(x, w, np.array([1, 2], np.int32)),
    WIDE,
    np.stack([MATRIX[:, :2].repeat(2, 0)[:4]] * 2),
)

# ------------------------------------------------------------------------------------------------------------ matrices
linalg = lax.linalg
add("cholesky", "float32", lambda a: linalg.cholesky(a), MATRIX, tolerance=1e-2)
add("lu", "float32", lambda a: linalg.lu(a)[0], MATRIX, tolerance=1e-2)
add("qr", "float32", lambda a: linalg.qr(a)[1], MATRIX, tolerance=1e-2)
add("svd", "float32", lambda a: linalg.svd(a)[1], MATRIX, tolerance=1e-2)
add("eigh", "float32", lambda a: linalg.eigh(a)[1], MATRIX, tolerance=1e-2)
add("eig", "float32", lambda a: jnp.abs(linalg.eig(a)[0]), MATRIX, tolerance=1e-2)
add("schur", "float32", lambda a: linalg.schur(a)[0], MATRIX, tolerance=1e-2)
add("hessenberg", "float32", lambda a: linalg.hessenberg(a)[0], MATRIX, tolerance=1e-2)
add("householder_product", "float32", lambda a: linalg.householder_product(a, np.ones(2, np.float32)), MATRIX[:, :2])
add("tridiagonal", "float32", lambda a: linalg.tridiagonal(a, lower=True)[1], MATRIX, tolerance=1e-2)
add(
    "triangular_solve",
    "float32",
    lambda a, b: linalg.triangular_solve(a, b, left_side=True, lower=True),
    MATRIX,
    WIDE,
    tolerance=1e-2,
)
add(
    "tridiagonal_solve",
    "float32",
    linalg.tridiagonal_solve,
    *(np.float32(v) for v in ([0, 1, 1], [4, 5, 6], [1, 1, 0])),
    WIDE[:, :2],
    tolerance=1e-2,
)
add(
    "custom_linear_solve",
    "float32",
    lambda a, b: jax.scipy.linalg.solve(a, b, assume_a="pos"),
    MATRIX,
    WIDE[:, 0].copy(),
    tolerance=1e-2,
)
add("custom_linear_solve", "general", jnp.linalg.solve, MATRIX, WIDE[:, 0].copy(), tolerance=1e-2)
add(
    "custom_linear_solve",
    "conjugate gradients",
    lambda a, b: jax.scipy.sparse.linalg.cg(lambda x: a @ x, b, maxiter=5)[0],
    MATRIX,
    WIDE[:, 0].copy(),
    refused="While with secret condition",
)


# ------------------------------------------------------------------------------------------------------------- control
def every_pair(primitive: str, fn: Callable[..., Any]) -> None:
    every(primitive, fn, 2)


every_pair("cond", lambda x, y: lax.cond(x[0] > y[0], lambda: x, lambda: y))
add("cond", "switch", lambda i, x: lax.switch(i, [lambda: x, lambda: -x, lambda: x * x]), np.int32(1), F)
add("cond", "switch, beyond", lambda i, x: lax.switch(i, [lambda: x, lambda: -x, lambda: x * x]), np.int32(7), F)
add(
    "cond",
    "nested in a loop",
    lambda x: lax.fori_loop(0, 3, lambda i, c: lax.cond(c[0] < 0, lambda: c + 1, lambda: c * 2), x),
    F,
)
every_pair("scan", lambda x, y: lax.scan(lambda c, v: (c | v if c.dtype == bool else c + v, c), x[0], y))
add("scan", "reverse", lambda x: lax.scan(lambda c, v: (c * 0.5 + v, c), np.float32(0), x, reverse=True), F)
every_pair(
    "while",
    lambda x, y: lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] & y if x.dtype == bool else c[1] + y), (0, x)
    )[1],
)
add(
    "while",
    "secret condition",
    lambda x: lax.while_loop(lambda v: v.sum() < 100, lambda v: v * 2, x),
    POSITIVE,
    refused="While with secret condition",
)
every_pair("pjit", lambda x, y: jax.jit(lambda a, b: lax.max(a, b))(x, y))


@jax.custom_jvp
def own_derivative(x):
    return jnp.sin(x)


own_derivative.defjvp(lambda p, t: (jnp.sin(p[0]), 2 * t[0]))


@jax.custom_vjp
def own_gradient(x):
    return jnp.sin(x)


own_gradient.defvjp(lambda x: (jnp.sin(x), None), lambda r, g: (2 * g,))
add("custom_jvp_call", "float32", own_derivative, F)
add("custom_jvp_call", "gradient", jax.grad(lambda x: own_derivative(x).sum()), F)
add("custom_vjp_call_jaxpr", "float32", own_gradient, F)
add("custom_vjp_call_jaxpr", "gradient", jax.grad(lambda x: own_gradient(x).sum()), F)


@jax.custom_batching.custom_vmap
def own_batches(x):
    return x * 2


@own_batches.def_vmap
def own_batches_rule(size, batched, x):
    return x * 2, True


add("custom_vmap_call", "float32", own_batches, F)
add("checkpoint", "float32", jax.checkpoint(jnp.sin), F)
add("checkpoint", "gradient", jax.grad(lambda x: jax.checkpoint(jnp.sin)(x).sum()), F)
add("name", "float32", lambda x: checkpoint_name(x * 2, "here"), F)
every_pair("optimization_barrier", lambda x, y: lax.optimization_barrier((x, y)))
add(
    "linear_call",
    "float32",
    lambda x: jax.custom_derivatives.linear_call(lambda r, v: v * 2, lambda r, v: v * 2, (), x),
    F,
)
add("device_put", "float32", lambda x: jax.device_put(x) * 2, F)
add(
    "sharding_constraint",
    "float32",
    lambda x: lax.with_sharding_constraint(x, jax.sharding.SingleDeviceSharding(jax.devices()[0])),
    F,
)

# ---------------------------------------------------------------------------------------------- randomness, the outside
KEY = np.array([0, 42], np.uint32)


def next_key(data):
    return jax.random.fold_in(jax.random.wrap_key_data(data), 1)


add("random_wrap", "uint32", lambda k: jax.random.uniform(k, (8,)), KEY)
add(
    "random_bits",
    "float32",
    lambda x: lax.scan(lambda c, k: (c + jax.random.uniform(k), None), x, jax.random.split(jax.random.key(0), 3))[0],
    F,
)
add("random_fold_in", "int32", lambda i: jax.random.uniform(jax.random.fold_in(jax.random.key(0), i)), np.int32(3))
add("random_seed", "int32", lambda i: jax.random.uniform(jax.random.key(i)), np.int32(3))
add(
    "random_split",
    "uint32",
    lambda k: jax.random.key_data(jax.random.split(jax.random.wrap_key_data(k))).astype(np.float32),
    KEY,
)
add("random_unwrap", "uint32", lambda k: jax.random.key_data(next_key(k)).astype(np.float32), KEY)
add("random_clone", "uint32", lambda k: jax.random.uniform(jax.random.clone(jax.random.wrap_key_data(k))), KEY)
add("random_gamma", "float32", lambda a: jax.random.gamma(jax.random.key(0), a), POSITIVE)
add("threefry2x32", "uint32", lambda k: jax.random.bits(k, (8,)).astype(np.float32), KEY)
add(
    "rng_bit_generator",
    "uint32",
    lambda k: lax.rng_bit_generator(k, (4,))[1].astype(np.float32),
    np.arange(4, dtype=np.uint32),
)
add("rng_uniform", "float32", lambda x: x + lax.rng_uniform(0.0, 1.0, (8,)), F)
add("pure_callback", "float32", lambda x: jax.pure_callback(np.sin, x, x), F)
add("io_callback", "float32", lambda x: io_callback(lambda v: v, x, x), F)

add("debug_callback", "float32", lambda x: [jax.debug.callback(lambda v: None, x), x][1], F)
add("infeed", "float32", lambda x: x + lax.infeed(lax.create_token(x), jax.core.ShapedArray((8,), np.float32))[0], F)
add("outfeed", "float32", lambda x: [lax.outfeed(lax.create_token(x), x), x][1], F)
add("xla_pmap", "float32", lambda x: jax.pmap(lambda v: lax.psum(v, "i"), "i")(x), F[None])

# What JAX exports too, and why it has no example of its own.
ELSEWHERE = {
    **dict.fromkeys(["all_gather", "all_to_all", "axis_index", "pmax", "pmin", "ppermute", "psum"], "only in a pmap"),
    **dict.fromkeys(["after_all", "create_token"], "for infeed and outfeed"),
    **dict.fromkeys(["eq_to", "le_to", "lt_to"], "only in the comparisons of a sort"),
    **dict.fromkeys(["call", "closed_call", "custom_lin", "custom_jvp_call_jaxpr", "zeros_like"], "only inside JAX"),
}
# Names in other versions of JAX.
ALIASES = {
    "checkpoint": "remat2",
    "jit": "pjit",
    "custom_vjp_call": "custom_vjp_call_jaxpr",
    "debug_print": "debug_callback",
}
NAMES = [f"{primitive}: {kind}" for primitive, examples in EXAMPLES.items() for kind in examples]


def example(name: str) -> Example:
    primitive, kind = name.split(": ", 1)
    return EXAMPLES[primitive][kind]


# ---------------------------------------------------------------------------------------------------------- the program


def outcome(example: Example, parties: secure.InProcess) -> tuple[str, str]:
    try:
        got = secure.jit(example.fn, parties=parties)(*example.args)
    except secure.SecureError as error:
        return "refused", str(error)
    except Exception as error:
        return "error", repr(error)
    want = jax.tree.map(np.asarray, jax.jit(example.fn)(*example.args))
    for ours, exact in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if (ours.shape, ours.dtype) != (exact.shape, exact.dtype):
            return "wrong", f"{ours.dtype}{ours.shape} in place of {exact.dtype}{exact.shape}"
        near = example.tolerance * (1 + np.abs(exact)) if ours.dtype.kind == "f" else 0
        bad = ~(np.abs(ours.astype(np.float64) - exact) <= near)
        if bad.any():
            return "wrong", f"{ours[bad][:4].tolist()} in place of {exact[bad][:4].tolist()}"
    return "right", ""


def main() -> None:
    if "--without-table" in sys.argv:
        lowering.REFUSED = {}
    parties = secure.InProcess(sys.argv[1])
    for name in map(str.strip, sys.stdin):
        print(f"> {name}", flush=True)
        print("=", json.dumps([name, *outcome(example(name), parties)]), flush=True)


# ------------------------------------------------------------------------------------------------------------ the tests


PATIENCE = 200  # seconds for one example


def tried(names: Iterable[str], *arguments: str) -> dict[str, tuple[str, str]]:
    """Outcome and text of each, in a process that is started anew when an example ends it, or takes too long."""
    left, found = list(names), {}
    while left:
        command = [sys.executable, "-W", "ignore", __file__, *arguments]
        pipe = subprocess.PIPE
        clock = threading.Timer(PATIENCE, lambda: None)
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            feeding = threading.Thread(target=feed, args=(process.stdin, left))
            feeding.start()
            current = "the start"
            for line in process.stdout:
                clock.cancel()
                if line.startswith("> "):
                    current = line[2:].strip()
                clock = threading.Timer(PATIENCE, process.kill)
                clock.start()
                if line.startswith("= "):
                    name, *rest = json.loads(line[2:])
                    found[name] = tuple(rest)
            clock.cancel()
            feeding.join()
        if process.returncode:
            assert current in left, current
            found[current] = ("died", f"exit code {process.returncode}")
        left = [name for name in left if name not in found]
    return found


def feed(stdin: Any, names: list[str]) -> None:
    try:
        with stdin:
            stdin.writelines(f"{name}\n" for name in names)
    except BrokenPipeError:
        pass


def sweep(names: list[str], *arguments: str) -> dict[str, tuple[str, str]]:
    """The same, two at a time."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        halves = [pool.submit(tried, names[i::2], *arguments) for i in range(2)]
        return halves[0].result() | halves[1].result()


def unexpected(found: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    return {name: result for name, result in found.items() if not expected(name, *result)}


def expected(name: str, result: str, text: str) -> bool:
    refusal = example(name).refused
    if name.split(": ")[0] in REFUSED:
        named = re.fullmatch(r"SPU cannot compute (\S+) \([^)]*\): ([^\n]+)", text)
        return result == "refused" and named is not None and REFUSED.get(named[1]) == named[2]
    if refusal:
        return result == "refused" and "\n" not in text and re.search(refusal, text) is not None
    return result == "right"


def test_every_primitive_is_tried():
    exported = {
        value.name for module in (lax, primitives) for name, value in vars(module).items() if name.endswith("_p")
    }
    assert not {ALIASES.get(name, name) for name in exported} - set(EXAMPLES) - set(ELSEWHERE)
    assert {ALIASES.get(name, name) for name in REFUSED} <= set(EXAMPLES)


def test_every_primitive_is_right_or_refused_by_name():
    assert not unexpected(sweep(NAMES, "REF2K"))


def test_what_no_table_knows_is_refused_in_one_line(group, monkeypatch):
    monkeypatch.setattr(lowering, "REFUSED", {})
    with pytest.raises(secure.SecureError, match=r"^compiling failed: [^\n]*'hessenberg'[^\n]*$"):
        secure.jit(lambda a: lax.linalg.hessenberg(a), parties=group("REF2K"))(MATRIX)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["ABY3", "SEMI2K", "REF2K"])
def test_every_primitive_is_right_or_refused_by_every_protocol(protocol):
    odd = unexpected(sweep(NAMES, protocol))
    if protocol == "ABY3":  # it has no bits at secret places
        odd = {name: result for name, result in odd.items() if "expect OShare and AShare" not in result[1]}
    assert not odd


@pytest.mark.slow
def test_nothing_is_refused_that_is_right():
    refused = [name for name in NAMES if name.split(": ")[0] in REFUSED]
    found = sweep(refused, "REF2K", "--without-table")
    assert not [name for name, (result, _) in found.items() if result == "right"]


if __name__ == "__main__":
    main()
