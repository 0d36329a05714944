"""Array shapes are checked while testing, nothing reaches for a hub, and parties are started once."""

import functools
import gc
import os
import signal
from pathlib import Path

import hypothesis
import jaxtyping
import pytest

# Before anything of the project, or transformers, is imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
# JAX's programs run a few times here: to optimise one takes longer than all its runs. SPU's are compiled as ever.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# Of millions of objects that JAX keeps, a collection looks through all: a sixth of the time of the tests.
gc.set_threshold(20_000)
jaxtyping.install_import_hook(["flaxmpc.nn", "flaxmpc.models"], "beartype.beartype")

# What is started in the background ignores Ctrl-C, and so would the processes that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no failure.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


def pytest_addoption(parser):
    parser.addoption(
        "--record",
        action="store_true",
        help="write what transformers' Flax models give to tests/models/data, for versions without these models",
    )


@pytest.fixture(scope="session", autouse=True)
def program_cache(tmp_path_factory):
    """Where compiled secure programs go: a directory of the session."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("programs")
        patch.setenv("FLAXMPC_CACHE", str(path))
        yield path


@pytest.fixture(scope="session")
def group():
    """group(protocol) -> the session's parties for it."""
    from flaxmpc import secure

    return functools.cache(secure.InProcess)


@pytest.fixture(scope="session")
def running():
    """running(directory, ...) -> context of a Running whose parties have started.

    Optional: protocol, timeout, changes of cluster.toml (pairs of old and new text), and code, a function of the rank.
    """
    import clusters

    return clusters.running


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The HF folder of the pre-trained MiniLM-L6."""
    from flaxmpc.convert.recipe import minilm_l6

    return minilm_l6()


@pytest.fixture(scope="session")
def write_classifier():
    """write_classifier(folder, **config) -> a model folder in it: a small random classifier of 20 tokens.

    `architecture` is its class, by default BertForSequenceClassification.
    """
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", "."]
    words = ["a", "the", "film", "movie", "acted", "beautifully", "gripping", "tedious", "lifeless", "mess"]
    vocabulary = [*special, *words, "good", "bad", "very"]

    def write(folder: Path, architecture=None, **changes) -> Path:
        from flaxmpc.models import folder as folders
        from flaxmpc.models.base import init_params
        from flaxmpc.models.bert import BertConfig, BertForSequenceClassification

        (folder / "source").mkdir(parents=True)
        (folder / "source" / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        parts = {"attention": "2quad_freediv", "hidden_act": "quad", "id2label": ("negative", "positive")}
        size = {"vocab_size": len(vocabulary), "max_position_embeddings": 24, "initializer_range": 0.2}
        model = (architecture or BertForSequenceClassification)(BertConfig(**{**shape, **parts, **size, **changes}))
        params = init_params(model, seed=3)
        for layer in range(model.config.num_hidden_layers):
            attention = params["bert"][f"layer_{layer}"]["attention"]
            if "scale" in attention:
                attention["scale"] = attention["scale"] / 30
        return folders.save(folder / "model", model, params, folder / "source")

    return write


@pytest.fixture(scope="session")
def write_diverging(write_classifier):
    """write_diverging(folder, **config) -> the same, but a text with the word "mess" leaves its LayerNorms' range."""

    def write(folder: Path, **changes) -> Path:
        import numpy as np
        from safetensors.numpy import load_file, save_file

        norm = {"name": "layer_norm_chebyshev", "low": 0.5, "high": 20.0, "depth": 5}
        model = write_classifier(folder, layer_norm=norm, **changes)
        tensors = load_file(model / "model.safetensors")
        mess = np.resize([1.0, -1.0], 32)
        tensors["bert.embeddings.word_embeddings.weight"][16] = 20 * mess
        tensors["bert.encoder.layer.0.intermediate.dense.weight"][0] = mess
        save_file(tensors, model / "model.safetensors")
        return model

    return write
