"""Weights stored in 8 or 4 bits: groups of a row share a scale. Storage only: they are read back as float32."""

import numpy as np

GROUP = 64
_LARGEST = {8: 127, 4: 7}


def quantize(weights: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric rounding with one scale for every 64 neighbours of a row.

    What `dequantize` returns is quantised to the same integers again, so weights that a model was trained with after
    a round trip are stored without loss.

    Args:
        weights: (row, column), columns a multiple of 64.
        bits: 8 or 4.

    Returns:
        The integers, int8 (row, column) for 8 bits, uint8 (row, column / 2) with two to a byte for 4; and the scales,
        float16 (row, column / 64).

    Raises:
        ValueError: another shape or number of bits, or weights that are not finite or too large for the scale.
    """
    if bits not in _LARGEST:
        raise ValueError(f"bits must be one of {sorted(_LARGEST)}, not {bits}")
    if weights.ndim != 2 or weights.shape[1] % GROUP:
        raise ValueError(f"only matrices with a multiple of {GROUP} columns are quantised, not {weights.shape}")
    groups = weights.astype(np.float32).reshape(weights.shape[0], -1, GROUP)
    with np.errstate(over="ignore"):
        scale = (np.abs(groups).max(-1) / _LARGEST[bits]).astype(np.float16)
    if not np.isfinite(scale).all():
        raise ValueError(f"only finite weights below {65504 * _LARGEST[bits]:g} are quantised to {bits} bits")
    # The smallest normal float16 keeps a group of zeros, or of tiny numbers, from a division by 0.
    scale = np.maximum(scale, np.finfo(np.float16).tiny)
    rounded = np.rint(groups / scale[..., None].astype(np.float32)).clip(-_LARGEST[bits], _LARGEST[bits])
    integers = rounded.astype(np.int8).reshape(weights.shape)
    if bits == 4:
        nibbles = (integers + 8).astype(np.uint8)
        integers = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    return integers, scale


def dequantize(integers: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The float32 (row, column) matrix of what `quantize` returned; int8 or uint8 tell 8 from 4 bits."""
    if integers.dtype == np.uint8:
        nibbles = np.stack([integers & 15, integers >> 4], -1).reshape(integers.shape[0], -1)
        integers = nibbles.astype(np.int8) - 8
    groups = integers.astype(np.float32).reshape(*scale.shape, GROUP)
    return (groups * scale[..., None].astype(np.float32)).reshape(integers.shape)
