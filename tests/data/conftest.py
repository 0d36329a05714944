import datasets
import pytest

from flaxmpc.data.tasks import load
from flaxmpc.models.folder import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(minilm):
    """The tokenizer of MiniLM-L6."""
    return load_tokenizer(minilm)


@pytest.fixture(autouse=True)
def quiet():
    """No progress bars."""
    datasets.disable_progress_bars()


@pytest.fixture
def read(tokenizer):
    """read(data) -> its task, of 16 tokens."""
    return lambda data, **options: load(str(data), tokenizer, 16, **options)
