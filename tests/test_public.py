"""What `import flaxmpc` gives."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import flaxmpc


def test_every_public_name_is_there_and_is_that_of_its_module():
    from flaxmpc.models import base, bert, folder
    from flaxmpc.serve.private import private

    assert flaxmpc.private is private
    assert (flaxmpc.init_params, flaxmpc.BertConfig, flaxmpc.load) == (base.init_params, bert.BertConfig, folder.load)
    assert flaxmpc.nn is sys.modules["flaxmpc.nn"]
    for name in flaxmpc.__all__:
        assert getattr(flaxmpc, name) is not None
    assert set(flaxmpc.__all__) < set(dir(flaxmpc))


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'flaxmpc' has no attribute 'BertModell'"):
        flaxmpc.BertModell  # pyright: ignore[reportAttributeAccessIssue] # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'BertModell'"):
        from flaxmpc import BertModell  # pyright: ignore[reportAttributeAccessIssue] # noqa: F401


def test_the_version_is_that_of_the_package():
    assert importlib.metadata.version("flaxmpc") == flaxmpc.__version__


def test_importing_it_alone_imports_nothing_heavy():
    code = "import sys, flaxmpc; print({'jax', 'flax', 'numpy', 'spu', 'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")
