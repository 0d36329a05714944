"""What models give beside their logits."""

from typing import Any, NamedTuple

from jaxtyping import Array

from flaxmpc.nn.layers import Seen
from flaxmpc.nn.lazy import State


class Intermediates(NamedTuple):
    """What distillation matches and calibration looks at. Layers of a lazy state have no scores and no variances.

    Attributes:
        embeddings: (batch, token, hidden), after their normalisation; an array or a lazy state, as it was given.
        hidden_states: the output of every layer, each (batch, token, hidden), alike.
        scores: every layer's Q K^T / sqrt(d) before the mask, each (batch, head, query, key).
        variances: what every layer's normalisations met, in their order, each (batch, token, 1).
    """

    embeddings: Any
    hidden_states: tuple[Any, ...]
    scores: tuple[Any, ...]
    variances: tuple[tuple[Any, ...], ...]


class EncoderOutput(NamedTuple):
    """What an encoder gives: the last hidden state, (batch, token, hidden), and what led there."""

    hidden: State
    intermediates: Intermediates

    @classmethod
    def of(cls, embeddings: State, layers: list[tuple[State, Seen]]) -> "EncoderOutput":
        """From the embeddings and what each layer gave."""
        hidden_states = tuple(hidden for hidden, _ in layers)
        intermediates = Intermediates(
            embeddings,
            hidden_states,
            tuple(seen.scores for _, seen in layers),
            tuple(seen.variances for _, seen in layers),
        )
        return cls(hidden_states[-1] if layers else embeddings, intermediates)


class Outputs(NamedTuple):
    """A model's logits and what led there."""

    logits: Array
    intermediates: Intermediates
