"""Makes the head of a sequence classifier linear: without an activation it is one matrix on shares."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track

from flaxmpc.convert.finetune import apply_with_states, in_order
from flaxmpc.data.batches import Split
from flaxmpc.models.base import WithHead
from flaxmpc.models.params import flatten, unflatten
from flaxmpc.nn.activation import IDENTITY

MOST_ERROR = 0.02
"""The largest error of a linear head that is taken: the root mean square of its logits less those of the head that it
replaces, in standard deviations of these.
"""

_RIDGE = 1e-3  # of the states' mean square
_MOST_ROWS = 32_768  # many more than a state has numbers


class _Read(NamedTuple):
    """What a head reads and gives, in float64: the first token's state (row, hidden), and logits (row, label)."""

    states: np.ndarray
    logits: np.ndarray


def linear_head(
    model: WithHead, params: dict[str, Any], rows: Split, held_out: Split
) -> tuple[WithHead, dict[str, Any], float | None]:
    """A classifier with the linear head whose logits are nearest to its own, where that is near enough.

    The head is a dense layer, an activation and another one. On shares a tanh takes 49 rounds (ABY3, 18 fraction bits).
    But it reads a state that was normalised, and gives few numbers, so a linear function of the state can have nearly
    the same logits: `linear_head_error` in the zoo's results is 0.8 %. The nearest one becomes the second layer; the
    first one passes the state on.

    Args:
        model, params: the classifier.
        rows: what the head is fitted on; of many, some.
        held_out: what it is judged on.

    Returns:
        The classifier and its parameters: as they were given where the error is above `MOST_ERROR`, the head has not
        two dense layers, or is linear already. And the error, of the head that was tried; None where none was.
    """
    if model.head_matrices is None or model.config.classifier_activation == IDENTITY:
        return model, params, None
    seen, other = (_read(model, params, split) for split in (rows, held_out))
    spread = np.sqrt(other.logits.var(0).mean()) if len(seen.logits) and len(other.logits) else 0.0
    if not spread:  # all rows diverge, or have the same answer: neither says what the head is
        return model, params, None
    kernel, bias = _fitted(seen)
    off = other.states @ kernel + bias - other.logits
    error = float(np.sqrt(np.square(off).mean()) / spread)
    if error > MOST_ERROR:
        return model, params, error
    first, second = model.head_matrices
    config = dataclasses.replace(model.config, classifier_activation=IDENTITY)
    layers = {
        f"{first}/kernel": np.eye(len(kernel)),
        f"{first}/bias": np.zeros(len(kernel)),
        f"{second}/kernel": kernel,
        f"{second}/bias": bias,
    }
    fresh = {path: leaf.astype(np.float32) for path, leaf in layers.items()}
    return model.clone(config=config), unflatten({**flatten(params), **fresh}), error


def _fitted(seen: _Read) -> tuple[np.ndarray, np.ndarray]:
    """The kernel and bias of least squares, with a ridge: states lie near a plane, and shares round numbers."""
    mean, target = seen.states.mean(0), seen.logits.mean(0)
    states = seen.states - mean
    gram = states.T @ states
    ridge = _RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    kernel = np.linalg.solve(gram + ridge, states.T @ (seen.logits - target))
    return kernel, target - mean @ kernel


def _read(model: WithHead, params: dict[str, Any], split: Split) -> _Read:
    """Of the rows whose logits are finite; others have none to be near to."""
    some = split[np.linspace(0, len(split) - 1, min(len(split), _MOST_ROWS)).astype(int)]
    states, logits = [], []
    for batch in track(list(in_order(some, most=model.config.num_positions)), description="linear head"):
        own, found = apply_with_states(model)(params, batch)
        right = (np.asarray(batch.row_mask) > 0) & np.isfinite(np.asarray(own)).all(-1)
        states.append(np.asarray((found.embeddings, *found.hidden_states)[-1])[right, 0])
        logits.append(np.asarray(own)[right])
    return _Read(*(np.concatenate(each).astype(np.float64) for each in (states, logits)))
