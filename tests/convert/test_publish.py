"""What is published: a model that can be used, with a card."""

import json
import shutil
from pathlib import Path

import pytest

from flaxmpc.convert import card, publish
from flaxmpc.models import hub, zoo


@pytest.fixture
def copy(tmp_path):
    """A copy of the shipped model."""
    return Path(shutil.copytree(zoo.find(zoo.DEFAULT), tmp_path / "copy"))


def test_what_is_published_is_checked(copy):
    assert publish.check(copy) == hub.contents(copy)
    plan = json.loads((copy / "bits.json").read_text())
    (copy / "bits.json").write_text(json.dumps({**plan, "weights": "others"}))
    with pytest.raises(ValueError, match="was made for other weights"):
        publish.check(copy)
    (copy / "bits.json").unlink()
    (copy / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        publish.check(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 3072}))
    with pytest.raises(ValueError, match="does not fit the model"):
        publish.check(copy)


def test_a_card_is_written_where_there_is_none(copy, monkeypatch):
    uploads = []

    def upload(folder, repository, *, private):
        uploads.append(((folder / "README.md").read_text(), repository, private))
        return "address"

    monkeypatch.setattr(hub, "upload", upload)
    (copy / "README.md").unlink()
    expected = publish.check(copy)
    assert not (copy / "README.md").exists()  # a check writes nothing
    assert publish.push(copy, "org/name", private=True) == "address"
    (uploaded,) = uploads
    assert uploaded == (card.text(copy), "org/name", True)
    assert expected == hub.contents(copy)
    (copy / "README.md").write_text("mine")
    publish.push(copy, "org/name")
    assert uploads[1:] == [("mine", "org/name", False)]


def test_without_figures_there_is_no_card(copy):
    for name in ("README.md", "results.json"):
        (copy / name).unlink()
    assert "README.md" not in publish.check(copy)


@pytest.mark.parametrize("content", ["{}", '{"data": 3}', '{"data": "movie", "stage1": []}'])
def test_a_recipe_that_no_card_can_be_made_of_is_one_line(content, copy):
    (copy / "README.md").unlink()
    (copy / "recipe.json").write_text(content)
    with pytest.raises(ValueError, match=r"no card can be made of its recipe\.json and results\.json .*"):
        publish.check(copy)
