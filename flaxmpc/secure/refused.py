"""What SPU cannot compute: JAX's primitives that end the process, give something else, or have no meaning on shares."""

from types import MappingProxyType

_BITS = "it looks at the bits of a number, which shares do not have"
_KEY = "a random key must be known when the function is compiled: a constant in it, not an argument"
_HOST = "the parties cannot call back into Python: they see no value"
_NONE = "SPU has no such operation"
_LOOP = "it loops until it has converged, which no party may see"
_LONG = "SPU does not come to its end within nine minutes, for eight numbers"

REFUSED = MappingProxyType(
    {
        "random_bits": _KEY,
        "random_clone": _KEY,
        "random_fold_in": _KEY,
        "random_gamma": _KEY,
        "random_seed": _KEY,
        "random_split": _KEY,
        "random_unwrap": _KEY,
        "random_wrap": _KEY,
        "rng_bit_generator": _KEY,
        "rng_uniform": "it draws other numbers at every call",
        "threefry2x32": _KEY,
        "eig": _NONE,
        "eigh": _NONE,
        "fft": _NONE,
        "hessenberg": _NONE,
        "schur": _NONE,
        "svd": _NONE,
        "tridiagonal": _NONE,
        "igamma": _LOOP,
        "igamma_grad_a": _LOOP,
        "igammac": _LOOP,
        "polygamma": _LONG,
        "random_gamma_grad": _LOOP,
        "regularized_incomplete_beta": _LOOP,
        "zeta": _LONG,
        "clz": _BITS,
        "nextafter": _BITS,
        "reduce_precision": _BITS,
        "debug_callback": _HOST,
        "debug_print": _HOST,
        "infeed": _HOST,
        "io_callback": _HOST,
        "outfeed": _HOST,
        "pure_callback": _HOST,
        "xla_pmap": "the parties compute as one device",
    }
)
"""Names of primitives, and why."""
