"""MPNet base with its real weights: the hidden states that PyTorch gives.

python train/mpnet_base.py runs/mpnet-base          fetches them; FLAXMPC_MPNET names another folder
pytest tests/models/test_mpnet.py --record          writes data/hf_mpnet_base.npz, where torch 2.6 is too
"""

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from flaxmpc.models import folder as folders

FOLDER = Path(os.environ.get("FLAXMPC_MPNET") or Path(__file__).parents[2] / "runs" / "mpnet-base")
DATA = Path(__file__).parent / "data" / "hf_mpnet_base.npz"
SENTENCE = "A gripping, beautifully acted film about naïve people, and nothing else. "
# The last has distances beyond those that have a bucket of their own, and beyond those that are told apart at all.
TEXTS = ["Good.", "A tedious, lifeless mess of a film!", SENTENCE * 12]


def theirs(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Embeddings and the states after every layer, at the tokens: (state, token, hidden)."""
    torch = pytest.importorskip("torch")
    import transformers

    model: Any = transformers.MPNetModel.from_pretrained(FOLDER).eval()
    with torch.no_grad():
        states = model(torch.from_numpy(ids), torch.from_numpy(mask), output_hidden_states=True).hidden_states
    return np.stack([state.numpy()[mask > 0] for state in states])


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"there is no {FOLDER}: train/mpnet_base.py fetches it")
def test_hidden_states_of_the_real_weights_are_those_of_pytorch(request):
    model, params, tokenizer, _ = folders.load_pretrained(FOLDER)
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    ids = np.full((len(rows), max(map(len, rows))), model.config.pad_token_id)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    mask = (np.arange(ids.shape[1]) < np.array([[len(tokens)] for tokens in rows])).astype(np.int64)
    found: Any = model.apply({"params": params}, jnp.asarray(ids), jnp.asarray(mask), method="outputs")
    states = np.stack([found.intermediates.embeddings, *found.intermediates.hidden_states])[:, mask > 0]
    assert states.shape[0] == 13
    tokens, features = (np.linspace(0, size - 1, 16).astype(int) for size in states.shape[1:])
    part = np.ix_(np.arange(13), tokens, features)
    if request.config.getoption("--record"):
        expected = theirs(ids, mask)
        np.testing.assert_allclose(states, expected, rtol=0, atol=2e-5)  # all of them, not only what is kept
        np.savez_compressed(DATA, ids=ids.astype(np.int32), states=expected[part])
    recorded = np.load(DATA)
    np.testing.assert_array_equal(ids, recorded["ids"])
    assert recorded["states"].std((1, 2)).min() > 0.05
    np.testing.assert_allclose(states[part], recorded["states"], rtol=0, atol=2e-5)
