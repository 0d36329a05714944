"""`secure.jit`: compile a JAX function with SPU and run it on secret shares."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxmpc.secure import cache
from flaxmpc.secure._spu import SecureError, compile_source, load_spu
from flaxmpc.secure.cache import cache_dir
from flaxmpc.secure.cost import Cost
from flaxmpc.secure.lowering import lower
from flaxmpc.secure.party import InProcess, Parties, Planned, Resident, check_visibility, to_arrays
from flaxmpc.secure.protocol import Config


class Run(NamedTuple):
    """A finished run: the output pytree (numpy arrays) and what it cost."""

    output: Any
    cost: Cost


class Program(NamedTuple):
    """A compiled function: SPU's code (text in its dialect pphlo) and the output's pytree of ShapeDtypeStructs."""

    code: bytes
    output: Any


def jit(
    fn: Callable[..., Any],
    protocol: str | None = None,
    *,
    ring: str | None = None,
    fraction_bits: int | None = None,
    exp_mode: str | None = None,
    shared_reciprocal: bool = False,
    visibility: str | tuple[str, ...] = "secret",
    parties: Parties | None = None,
) -> SecureFunction:
    """Makes `fn` run on secret shares.

        secure_loss = secure.jit(loss, "ABY3")
        value, cost = secure_loss.run(params, batch)

    It gives what JAX gives, within the precision of fixed point, as long as no number overflows (`secure.check`): what
    SPU by itself computes otherwise is rewritten, or refused by name when it is compiled (`flaxmpc.secure.lowering`).
    Where `exp_mode` is "taylor", exp is less exact, and so is tanh: within 0.005.

    Args:
        fn: any JAX function of pytrees (positional arguments) that returns a pytree; shapes are static.
        protocol: a name in PROTOCOLS; "ABY3" unless `parties` are given.
        ring: "FM32", "FM64" (default) or "FM128".
        fraction_bits: bits after the binary point, 18 by default.
        exp_mode: how exponentials are computed, see Config: "pade" where there is room for it, by default. "taylor" is
            cheaper, and exact for operands from -500 to 0: a softmax's, but for those that a mask of -1e9 made.
        shared_reciprocal: whether x / y, where y was broadcast (a row's sum), is x times one reciprocal of y that a row
            shares, in place of a division of each number: a softmax of 128 x 128 scores and 64 columns of V sends half
            the bytes. But 1/y has the fraction bits only: the quotient's error grows with x, to 2^-18 x, so it is for
            sums that are not large: a softmax's, not squares'.
        visibility: "secret" or "public", for all arguments or as a tuple with one for each. A resident argument has
            its own.
        parties: who computes. Functions that share the group share its resident values. By default the function
            starts an InProcess group of its own on first use.

    Raises:
        ValueError: unknown names, or settings that are not those of `parties`.
    """
    given = {"protocol": protocol, "ring": ring, "fraction_bits": fraction_bits, "exp_mode": exp_mode}
    given = {name: value for name, value in given.items() if value is not None}
    config = Config(**given) if parties is None else parties.config
    for name, value in given.items():
        if value not in ("auto", getattr(config, name)):
            raise ValueError(f"{name} {value!r} was asked for, but the parties have {getattr(config, name)!r}")
    for item in (visibility,) if isinstance(visibility, str) else visibility:
        check_visibility(item)
    return SecureFunction(fn, config, visibility, parties, shared_reciprocal)


@dataclasses.dataclass(eq=False, repr=False)
class SecureFunction:
    """A JAX function that runs on secret shares; made by `jit`.

    It is compiled once for each combination of pytree structure, shapes, dtypes and visibilities. Compiled programs
    are kept on disk too, in $FLAXMPC_CACHE, $XDG_CACHE_HOME/flaxmpc/programs or ~/.cache/flaxmpc/programs.
    """

    fn: Callable[..., Any]
    config: Config
    _visibility: str | tuple[str, ...]
    _parties: Parties | None
    _shared_reciprocal: bool

    def __post_init__(self):
        self._programs: dict[Any, Program] = {}
        self._lock = threading.Lock()

    @property
    def parties(self) -> Parties:
        """The parties that compute, started if need be; `parties.put(tree)` makes values resident there."""
        with self._lock:
            if self._parties is None:
                self._parties = InProcess(**dataclasses.asdict(self.config))
            return self._parties

    def __call__(self, *args: Any) -> Any:
        """The output pytree of `fn(*args)`, computed on shares, as numpy arrays."""
        return self.run(*args).output

    def run(self, *args: Any) -> Run:
        """Shares the arguments, runs `fn` on them and opens the result.

        Args:
            *args: pytrees of arrays or scalars, or `Resident` values of the same parties in place of whole arguments.

        Raises:
            ValueError, TypeError: an argument that has no fixed-point encoding (the message has the leaf's path).
            SecureError: SPU cannot compile or run the function; the message says why.
        """
        args = self._encodable(args)
        visibilities = self._visibilities(args)
        program, compile_seconds = self._compiled(args, visibilities)
        structs, treedef = jax.tree.flatten(program.output)

        parties = self.parties
        inputs = [
            arg if isinstance(arg, Resident) else parties.put(arg, visibility)
            for arg, visibility in zip(args, visibilities, strict=True)
        ]
        for resident in inputs:
            resident.check(parties)
        stem = secrets.token_hex(8)
        outputs = [f"{stem}.{i}" for i in range(len(structs))]
        executable = load_spu().Executable(
            name="run",
            input_names=[name for resident in inputs for name in resident.names],
            output_names=outputs,
            code=program.code,
        )
        try:
            seconds, profile = parties.run(executable)
            opened = [
                np.asarray(parties.open(name), struct.dtype).reshape(struct.shape)
                for name, struct in zip(outputs, structs, strict=True)
            ]
        finally:
            parties.delete(outputs)
            for arg, resident in zip(args, inputs, strict=True):
                if arg is not resident:
                    resident.delete()
            parties.sweep()
        cost = Cost.from_profile(self.config, profile, seconds, compile_seconds)
        return Run(jax.tree.unflatten(treedef, opened), cost)

    def estimate(self, *args: Any) -> Cost:
        """What a run would cost, without secrets: measured on a run, as cost does not depend on secret values.

        Args:
            *args: the arguments as `run` takes them; a jax.ShapeDtypeStruct leaf stands for zeros.
        """
        return self.run(*jax.tree.map(_zeros, args)).cost

    def compile(self, *args: Any) -> Program:
        """The compiled program, without running it; arguments as for `estimate`, or `Planned` values."""
        args = self._encodable(jax.tree.map(_zeros, args))
        return self._compiled(args, self._visibilities(args))[0]

    def program(self, *args: Any) -> str:
        """The same in pphlo, SPU's dialect, as text."""
        return self.compile(*args).code.decode()

    def _encodable(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            arg if isinstance(arg, Planned) else to_arrays(arg, self.config, f"argument {i}")
            for i, arg in enumerate(args)
        )

    def _visibilities(self, args: tuple[Any, ...]) -> tuple[str, ...]:
        given = (self._visibility,) * len(args) if isinstance(self._visibility, str) else self._visibility
        if len(given) != len(args):
            raise ValueError(f"{len(given)} visibilities were given for {len(args)} arguments")
        return tuple(arg.visibility if isinstance(arg, Planned) else one for arg, one in zip(args, given, strict=True))

    def _compiled(self, args: tuple[Any, ...], visibilities: tuple[str, ...]) -> tuple[Program, float]:
        """The program for such arguments, and the seconds that it took if it was not in memory yet."""
        structs = tuple(arg.struct if isinstance(arg, Planned) else jax.tree.map(_struct, arg) for arg in args)
        leaves, treedef = jax.tree.flatten(structs)
        once = tuple(self.config.opens_once and isinstance(arg, Planned) and arg.visibility == "secret" for arg in args)
        key = (treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves), visibilities, once)
        with self._lock:
            if key in self._programs:
                return self._programs[key], 0.0
            start = time.perf_counter()
            per_leaf = [
                visibility
                for struct, visibility in zip(structs, visibilities, strict=True)
                for _ in jax.tree.leaves(struct)
            ]
            fn = _opened_once(self.fn, once) if any(once) else self.fn
            program = _compile(fn, structs, per_leaf, self.config, self._shared_reciprocal)
            self._programs[key] = program
            return program, time.perf_counter() - start


def _opened_once(fn: Callable[..., Any], once: Sequence[bool]) -> Callable[..., Any]:
    """`fn` whose arguments are marked, where `once` says so, as values that products open on their first use only."""
    load_spu()
    from spu.experimental import make_cached_var

    def marked(*args: Any) -> Any:
        pairs = zip(args, once, strict=True)
        return fn(*(jax.tree.map(make_cached_var, arg) if mark else arg for arg, mark in pairs))

    return marked


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _zeros(leaf: Any) -> Any:
    return np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


def _compile(
    fn: Callable[..., Any],
    structs: tuple[Any, ...],
    visibilities: Sequence[str],
    config: Config,
    shared_reciprocal: bool,
) -> Program:
    """Traces `fn` on pytrees of ShapeDtypeStructs and compiles it, or takes the code from disk."""
    spu = load_spu()
    from spu import libspu

    lowered, output = _lower(fn, structs, config)
    if not jax.tree.leaves(output):
        raise ValueError("the function returns no array, so there is nothing to compute")
    # Unlike the serialized HLO the text has no source locations: another caller, or an edit above, is the same program.
    text = lowered.as_text()
    options = libspu.CompilerOptions()
    options.enable_optimize_denominator_with_broadcast = shared_reciprocal
    key = [spu.__version__, f"shared_reciprocal={shared_reciprocal}", *visibilities, text]
    folder = cache_dir()
    path = folder and folder / hashlib.sha256("\n".join(key).encode()).hexdigest()
    code = path and cache.read(path)
    if code is None:
        source = libspu.CompilationSource(
            libspu.SourceIRType.XLA,
            lowered.compiler_ir("hlo").as_serialized_hlo_module_proto(),
            [spu.parse_visibility(f"VIS_{visibility.upper()}") for visibility in visibilities],
        )
        code = compile_source(source, options)
        if path:
            cache.write(path, code)
    return Program(code, output)


def _lower(fn: Callable[..., Any], structs: tuple[Any, ...], config: Config) -> tuple[Any, Any]:
    """`lowering.lower`, with SPU's patch, which keeps `sort` from looking at the bits of a float."""
    from jax._src.lax import lax
    from spu.utils import frontend

    with frontend._jax_lock:
        # Not what `_patch_jax` returns: an interrupt in it would leave the patch where it is.
        before = {name: vars(lax)[name] for name in frontend.lax_patches["sort"].possible_names if name in vars(lax)}
        try:
            frontend._patch_jax()
            lowered, output = lower(fn, structs, config)
            return lowered, jax.tree.map(_struct, output)
        except NotImplementedError as error:  # of a primitive that JAX has for some devices only
            raise SecureError.wrap("compiling", error) from error
        finally:
            frontend._restore_jax_patch(before)
