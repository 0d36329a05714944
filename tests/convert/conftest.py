import jax
import numpy as np
import pytest

from flaxmpc.data.batches import Split
from flaxmpc.models.base import init_params
from flaxmpc.models.bert import BertConfig, BertForSequenceClassification


@pytest.fixture(scope="session")
def tiny() -> BertForSequenceClassification:
    """One layer, two heads, no dropout."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=24,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.2,
        )
    )


@pytest.fixture(scope="session")
def tiny_params(tiny):
    return jax.device_get(init_params(tiny, seed=1))


@pytest.fixture(scope="session")
def toy_split():
    """40 sentences of 3 to 16 tokens (one length, so one program); each label has its own words."""
    rng = np.random.default_rng(0)
    labels = [i % 2 for i in range(40)]
    ids = [[1, *rng.integers(4 + 18 * label, 22 + 18 * label, rng.integers(1, 15)).tolist(), 2] for label in labels]
    return Split(ids, np.array(labels))
