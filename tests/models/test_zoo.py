import json
from pathlib import Path

import pytest

import flaxmpc
from flaxmpc.convert import card
from flaxmpc.models import zoo
from flaxmpc.models.folder import read_config
from flaxmpc.training import metrics


@pytest.fixture
def own_zoo(tmp_path, monkeypatch):
    """A zoo of two models, and a folder that is none."""
    for name in ("movie-tiny", "movie-base"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    monkeypatch.setenv("FLAXMPC_ZOO", str(tmp_path))
    return tmp_path


def test_the_zoo_is_every_folder_with_a_config(own_zoo):
    assert zoo.entries() == {"movie-base": own_zoo / "movie-base", "movie-tiny": own_zoo / "movie-tiny"}


def test_a_model_is_found_by_name_and_by_folder(own_zoo, tmp_path_factory):
    assert zoo.find("movie-tiny") == own_zoo / "movie-tiny"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert zoo.find(elsewhere) == zoo.find(str(elsewhere)) == elsewhere


def test_a_folder_goes_before_a_name(own_zoo, tmp_path_factory, monkeypatch):
    here = tmp_path_factory.mktemp("here")
    (here / "movie-tiny").mkdir()
    monkeypatch.chdir(here)
    assert zoo.find("movie-tiny").resolve() == here / "movie-tiny"


def test_an_unknown_name_gets_the_known_ones_and_the_closest(own_zoo):
    with pytest.raises(
        ValueError,
        match=r"^unknown model 'movie-tyni'\. Did you mean 'movie-tiny'\? Known: movie-base, movie-tiny; or a folder, ",
    ):
        zoo.find("movie-tyni")


def test_a_path_to_nothing_is_no_misspelt_name(own_zoo):
    with pytest.raises(FileNotFoundError, match=r"^some/where is no folder$"):
        zoo.find(Path("some/where"))
    with pytest.raises(FileNotFoundError, match=r"^some/where is no folder here, HF_HUB_OFFLINE says not to ask"):
        zoo.find("some/where")


def test_a_file_is_no_folder(own_zoo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").write_text("")
    for path in ("model", str(tmp_path / "model"), tmp_path / "model"):
        with pytest.raises(FileNotFoundError, match=r"model is a file, not the folder of a model$"):
            zoo.find(path)


@pytest.mark.parametrize("name", ["m" * 5000, "m\0", "/" + "m" * 5000])
def test_what_the_file_system_does_not_take_is_no_model(own_zoo, name):
    with pytest.raises((ValueError, FileNotFoundError), match=r"^(unknown model|.* is no folder)") as error:
        zoo.find(name)
    assert len(str(error.value)) < 300


def test_weights_in_shards_are_weights(own_zoo):
    folder = own_zoo / "movie-tiny"
    (folder / "recipe.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="has no weights here"):
        zoo.with_weights("movie-tiny")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert zoo.with_weights("movie-tiny") == folder


def test_an_empty_zoo_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.setenv("FLAXMPC_ZOO", str(tmp_path / "none"))
    assert zoo.entries() == {}
    with pytest.raises(FileNotFoundError, match=r"no model in the zoo .*none \(FLAXMPC_ZOO\)"):
        zoo.find("movie")


def test_the_zoo_is_installed_with_the_package(monkeypatch):
    monkeypatch.delenv("FLAXMPC_ZOO", raising=False)
    folder = zoo.zoo_folder()
    assert folder == Path(flaxmpc.__file__).parent / "zoo"
    assert folder.resolve() == Path(__file__).parents[2] / "models"  # in a checkout


def test_an_empty_name_is_no_folder(own_zoo):
    with pytest.raises(ValueError, match="unknown model ''"):
        zoo.find("")


def test_a_model_without_results_has_none(own_zoo):
    folder = own_zoo / "movie-tiny"
    assert zoo.results(folder) == {}
    (folder / "results.json").write_text(json.dumps({"accuracy": 0.9, "ref2k_accuracy": None}))
    assert zoo.results(folder) == {"accuracy": 0.9}


@pytest.mark.parametrize(
    "name", [*metrics.NAMES, *(f"ref2k_{name}" for name in metrics.NAMES), "ci_low", "margin_bits"]
)
@pytest.mark.parametrize("value", ["0.9", [0.9], {}])
def test_figures_are_numbers(own_zoo, name, value):
    folder = own_zoo / "movie-tiny"
    (folder / "results.json").write_text(json.dumps({name: value}))
    with pytest.raises(ValueError, match=rf"results\.json has {name} .*, not a number"):
        zoo.results(folder)


# ------------------------------------------------------------------------------------------------- what is shipped


def test_the_default_is_in_the_zoo():
    assert zoo.DEFAULT in zoo.entries()


@pytest.mark.parametrize("name", zoo.entries() or [zoo.DEFAULT])
def test_every_entry_is_whole_small_and_measured(name):
    folder = zoo.find(name)
    config = read_config(folder)
    assert config.embedding.name in (folder / "README.md").read_text("utf-8")  # the card says which mode it is for
    assert config.model_max_length == json.loads((folder / "recipe.json").read_text("utf-8"))["max_length"]
    assert card.text(folder) == (folder / "README.md").read_text("utf-8")
    results = zoo.results(folder)
    assert 0.5 < results["accuracy"] <= 1
    assert (folder / "recipe.json").is_file()
    script, *_, entry = results["made_by"].split()
    assert (Path(__file__).parents[2] / script).is_file()
    # A student stands beside its teacher.
    assert "accuracy" in zoo.results(zoo.find(name if entry == "teacher" else name.removesuffix(f"-{entry}")))
    weights = folder / "model.safetensors"
    if weights.is_file():
        assert weights.stat().st_size <= 20e6
        assert 0.5 < results["ref2k_accuracy"] <= 1
    else:
        assert "by recipe" in (folder / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"accuracy": "high"}', "results.json has accuracy 'high', not a number"),
        ('{"made_by": 3}', "results.json has made_by 3, not text"),
        ("[" * 1000, "results.json is nested more than 64 deep"),
        ("[]", "results.json holds no JSON object"),
    ],
)
def test_results_that_are_no_figures_are_refused(content, message, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        zoo.results(tmp_path)
