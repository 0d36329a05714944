"""One party of CrypTen: parts of CrypTen, MPCFormer and SHAFT on shares. peers.py starts two of them.

    python crypten_party.py FOLDER RANK    runs what is in FOLDER, see `run`
    python crypten_party.py                prints the versions, as JSON

It runs in a Python of its own, which has CrypTen and PyTorch but nothing of flaxmpc. The first party deals the triples
(CrypTen's TrustedFirstParty), as in SPU's SEMI2K. All parts are written here in CrypTen's public API, after

- CrypTen 0.4.1, its own functions with its configs/default.yaml: precision_bits 16, exp_iterations 8,
  reciprocal_nr_iters 10, sqrt_nr_iters 3, erf_iterations 8, max_method log_reduction;
- MPCFormer, DachengLi1/MPCFormer, commit 38cb42c, src/benchmark/utils.py: softmax_2QUAD, activation_quad;
- SHAFT, andeskyl/SHAFT, commit 3ceb0ee, crypten/common/functions/approximations.py, with its configs/default.yaml:
  softmax_ode_iter_num 16, softmax_ode_lb -4, softmax_ode_ub 12, gelu_fs_period 8, gelu_fs_terms 8, sqrt_nr_iters 5;
- SecFormer (ACL Findings 2024), as SHAFT's file has it: erf_fs_period 20, erf_fs_terms 7.

"Mended" is what gives a part its best setting: the function stays, and the docstrings say what changed.
CrypTen truncates a product where it is: no message, but with two parties a number x, of 16 fraction bits before and 32
after the product, is off by 2^32 with a chance of |x| / 2^32. Its decoding is off by 1 for numbers that lie above a
negative whole number -m by less than m / 2^16, so what is opened is decoded here.
"""
# pyright: basic, reportMissingImports=false

import functools
import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

try:  # where CrypTen looks for it
    import torch.onnx._internal.registration
except ImportError:  # PyTorch has moved it since
    import torch.onnx._internal.torchscript_exporter.registration as moved

    sys.modules["torch.onnx._internal.registration"] = moved

import crypten
from crypten import communicator
from crypten.config import cfg

Shared = Any  # a CrypTensor: CrypTen has no types
Attend = Callable[[Shared, Shared], Shared]

ALL_POSITIVE = {"functions.reciprocal_all_pos": True}


# ------------------------------------------------------------------------------ attention: scores, values -> context


def softmax(scores: Shared, values: Shared) -> Shared:
    """CrypTen's: the row's maximum by comparisons, (1 + x/2^8)^(2^8), ten Newton steps to the reciprocal of the sum."""
    return scores.softmax(-1).matmul(values)


def two_quad_published(scores: Shared, values: Shared) -> Shared:
    """(s + 5)^2 by its row's sum, as MPCFormer's benchmark has it: a product with itself, and CrypTen's division.

    CrypTen looks for a reciprocal from 3 exp(1 - 2x) + 0.003 on, and its exponential, (1 + x/2^8)^(2^8), grows again
    below -512. So a sum above 256 has none: ten scores of 0 are 250.
    """
    squares = (scores + 5) * (scores + 5)
    return (squares / squares.sum(dim=-1, keepdim=True)).matmul(values)


def two_quad(scores: Shared, values: Shared) -> Shared:
    """The same, mended: a square, which opens one operand, and a sixteenth of the row's mean, which has a reciprocal.

    Means of real rows are 3 to 293. The division comes after the product with the values: there is less to divide.
    """
    squares = (scores + 5).square() / (16 * scores.size(-1))
    with cfg.temp_override(ALL_POSITIVE):
        inverse = squares.sum(dim=-1, keepdim=True).reciprocal()
    return squares.matmul(values) * inverse


def two_quad_freediv(folded: Shared, values: Shared) -> Shared:
    """Ours, in CrypTen: the square of scores that hold c, r and 1/n already."""
    return folded.square().matmul(values)


def ode(scores: Shared, values: Shared, *, steps: int, bounds: tuple[int, int] | None) -> Shared:
    """SHAFT's softmax: Euler steps of g' = g (x - <g, x>) from 1/n on, of clipped scores."""
    if bounds is not None:
        low, high = bounds
        over, under = (part.squeeze(0) for part in crypten.stack([scores - high, low - scores]).relu().split(1))
        scores = scores - over + under
    step = scores / steps
    weights = crypten.cryptensor(torch.full(scores.size(), 1 / scores.size(-1)), src=0)
    for _ in range(steps):
        weights = weights + (step - (weights * step).sum(dim=-1, keepdim=True)) * weights
    return weights.matmul(values)


# --------------------------------------------------------------------------------------------- activations: x -> f(x)


def gelu_erf(x: Shared) -> Shared:
    """x/2 (1 + erf(x / sqrt 2)) with CrypTen's erf, a Taylor series of eight terms: for small numbers only."""
    return x * (x * math.sqrt(0.5)).erf().add(1) / 2


def gelu_tanh(x: Shared) -> Shared:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) with CrypTen's tanh, of an exponential and a reciprocal."""
    return x * ((x.square() * x * 0.044715 + x) * math.sqrt(2 / math.pi)).tanh().add(1) / 2


def quad_published(x: Shared) -> Shared:
    """0.125 x x + 0.25 x + 0.5, which MPCFormer trains with, by the product that its benchmark takes."""
    return 0.125 * x * x + 0.25 * x + 0.5


def quad(x: Shared) -> Shared:
    """The same, mended: by a square, which opens one operand."""
    return 0.125 * x.square() + 0.25 * x + 0.5


def opened(x: Shared) -> torch.Tensor:
    """In the clear, without CrypTen's decoding."""
    return (x.reveal().double() / x.encoder.scale).float()


def sines(x: Shared, coefficients: Sequence[float], period: float) -> Shared:
    """sum_k b_k sin(2 pi k x / period) in one opening, as SHAFT and SecFormer have it.

    The first party deals a random t with its sines and cosines; x - t is opened, and sin(x) is then a sum of products
    with public numbers. As published x - t is opened whole and t lies in one period, so that a large x shows: it hides
    less than the rest does.
    """
    k = torch.arange(1, len(coefficients) + 1).reshape(-1, *[1] * x.dim()) * (2 * math.pi / period)
    b = torch.tensor(coefficients).reshape(k.shape)
    t = torch.rand(x.size()) * period
    mask, sine, cosine = (crypten.cryptensor(part, src=0) for part in (t, torch.sin(k * t), torch.cos(k * t)))
    angle = k * opened(x - mask)
    return (cosine * (b * torch.sin(angle)) + sine * (b * torch.cos(angle))).sum(dim=0)


def gelu_shaft(x: Shared) -> Shared:
    """SHAFT's: relu(x) + [|x| < 4] of a sine series of eight terms and period 8."""
    relu = x.relu()
    size = 2 * relu - x
    inside = size < 4
    return relu + inside * sines(size, (-0.0818, -0.0809, -0.0424, -0.0176, -0.0079, -0.0043, -0.0026, -0.0017), 8.0)


def gelu_secformer(x: Shared) -> Shared:
    """SecFormer's: x/2 (1 + erf(z)), z = x / sqrt 2, erf a sine series of seven terms and period 20 where |z| < 1.7.

    Mended: both comparisons at once, and their bits added before they multiply.
    """
    edge = 1.7 * math.sqrt(2)
    below, above = (bit.squeeze(0) for bit in (crypten.stack([x + edge, edge - x]) < 0).split(1))
    series = sines(
        x * math.sqrt(0.5), (1.25772, -0.0299154, 0.382155, -0.0519123, 0.196033, -0.0624557, 0.118029), 20.0
    )
    return x * ((1 - below - above) * series + above - below + 1) / 2


# -------------------------------------------------------------------------------------------------- a BERT layer


def layer_norm(x: Shared, weights: Mapping[str, Shared], name: str) -> Shared:
    """Over the features, with CrypTen's inverse root, as SHAFT has it. MPCFormer's benchmark has a BatchNorm."""
    centred = x - x.mean(dim=-1, keepdim=True)
    inverse = centred.square().mean(dim=-1, keepdim=True).inv_sqrt()
    return centred * inverse * weights[f"{name}/scale"] + weights[f"{name}/bias"]


def layer(
    weights: Mapping[str, Shared], x: Shared, *, attend: Attend, activation: Callable[[Shared], Shared]
) -> Shared:
    """Post-LayerNorm, of (token, hidden), in heads of 64; 1/sqrt(d) is in the query's matrix, and so is sqrt(r/n).

    The shift is c sqrt(r/n), or 0. Queries, keys and values are one product: x is opened once for them.
    """
    qkv = x.matmul(weights["qkv/kernel"]) + weights["qkv/bias"]
    heads = qkv.reshape(x.size(0), 3, -1, 64).permute(1, 2, 0, 3)
    query, key, value = (part.squeeze(0) for part in heads.split(1))
    scores = query.matmul(key.transpose(-1, -2)) + weights["shift"]
    context = attend(scores, value).permute(1, 0, 2).reshape(x.size())
    attended = x + context.matmul(weights["attention/output/kernel"]) + weights["attention/output/bias"]
    attended = layer_norm(attended, weights, "attention_layer_norm")
    wide = activation(attended.matmul(weights["intermediate/kernel"]) + weights["intermediate/bias"])
    output = attended + wide.matmul(weights["output/kernel"]) + weights["output/bias"]
    return layer_norm(output, weights, "output_layer_norm")


shaft_softmax = functools.partial(ode, steps=16, bounds=(-4, 12))  # as its default.yaml has it
# For scores that reach 46, as a real model's first layer has them: more steps, and nothing to clip.
shaft_softmax_wide = functools.partial(ode, steps=64, bounds=None)

PARTS: dict[str, Callable[..., Shared]] = {
    "softmax": softmax,
    "2quad_published": two_quad_published,
    "2quad": two_quad,
    "2quad_freediv": two_quad_freediv,
    "softmax_shaft": shaft_softmax,
    "softmax_shaft_wide": shaft_softmax_wide,
    "gelu_erf": gelu_erf,
    "gelu_tanh": gelu_tanh,
    "quad_published": quad_published,
    "quad": quad,
    "gelu_shaft": gelu_shaft,
    "gelu_secformer": gelu_secformer,
    "layer_softmax": functools.partial(layer, attend=softmax, activation=gelu_tanh),
    "layer_2quad": functools.partial(layer, attend=two_quad, activation=quad),
    "layer_shaft": functools.partial(layer, attend=shaft_softmax, activation=gelu_shaft),
    "layer_2quad_freediv": functools.partial(layer, attend=two_quad_freediv, activation=quad),
}
SETTINGS = {"layer_shaft": {"functions.sqrt_nr_iters": 5}}  # SHAFT's; CrypTen's is 3


def run(folder: Path, rank: int) -> None:
    """Runs a part: once for each place of the inputs' first axis.

    Args:
        folder: has job.json ({"part", "threads"}), weights.npz (arrays by name, shared once) and inputs.npz (arrays by
            place). Gets {rank}.json, of what each run took and sent, and from rank 0 output.npy.
    """
    job = json.loads((folder / "job.json").read_text("utf-8"))
    os.environ.update(
        WORLD_SIZE="2", RANK=str(rank), DISTRIBUTED_BACKEND="gloo", RENDEZVOUS=f"file://{(folder / 'store').resolve()}"
    )
    torch.set_num_threads(job["threads"])
    crypten.init()
    cfg.communicator.verbose = True  # else nothing is counted
    found, outputs = [], []
    with crypten.no_grad(), cfg.temp_override(SETTINGS.get(job["part"], {})):
        part, weights = PARTS[job["part"]], _shared(folder / "weights.npz")
        if weights:
            part = functools.partial(part, weights)
        inputs = dict(np.load(folder / "inputs.npz"))
        for place in range(len(next(iter(inputs.values())))):
            shares = [crypten.cryptensor(torch.from_numpy(array[place]), src=0) for array in inputs.values()]
            comm = communicator.get()
            comm.barrier()
            comm.reset_communication_stats()
            start = time.perf_counter()
            output = part(*shares)
            counted = comm.get_communication_stats()
            comm.barrier()
            seconds = time.perf_counter() - start
            # Every message is an all_reduce of both, of which CrypTen counts what is sent and what is received.
            found.append({"seconds": seconds, "bytes_sent": counted["bytes"] // 2, "openings": counted["rounds"]})
            outputs.append(opened(output).numpy())
    crypten.uninit()  # else gloo's threads may end the process badly
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (folder / f"{rank}.json").write_text(json.dumps({"runs": found, "peak_memory_bytes": peak}), "utf-8")
    if rank == 0:
        np.save(folder / "output.npy", np.stack(outputs))


def _shared(file: Path) -> dict[str, Shared]:
    return {name: crypten.cryptensor(torch.from_numpy(array), src=0) for name, array in np.load(file).items()}


def versions() -> dict[str, str]:
    return {"crypten": metadata.version("crypten"), "torch": torch.__version__,
            "peers_python": platform.python_version()}  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(json.dumps(versions()))
    else:
        run(Path(sys.argv[1]), int(sys.argv[2]))
