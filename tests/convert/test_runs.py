"""What a run's folders must hold, and that they are its own. Whole conversions are in test_conversion.py."""

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest

from flaxmpc import files
from flaxmpc.convert import runs
from flaxmpc.convert.configs import FineTuning

INPUTS = {"data": "00ff", "encoder": "1234"}


@pytest.fixture
def config(tmp_path) -> FineTuning:
    return FineTuning(Path("encoder"), "movie", tmp_path / "out")


def begun(config: FineTuning) -> Path:
    """The config.json of a run that has more than that to lose."""
    folder = runs.run_folder(config, INPUTS)
    (folder / "stage1").mkdir()
    return folder / "config.json"


def test_both_folders_of_a_config_are_claimed(config):
    folders = (config.out, config.out.with_name("out.run"))

    @runs.alone
    def make(config):
        for folder in folders:
            with pytest.raises(ValueError, match="writes to"), files.claimed(folder):
                pass
        return "made"

    assert make(config) == "made"
    for folder in folders:
        with files.claimed(folder), pytest.raises(ValueError, match=f"writes to .*{folder.name}: wait"):
            make(config)
    same = FineTuning(Path("encoder"), "movie", config.out, runs=config.out.parent / "." / "out")
    with pytest.raises(ValueError, match="both --out and --runs"):
        make(same)


def test_a_run_is_known_again(config):
    folder = runs.run_folder(config, INPUTS)
    assert folder == config.out.with_name("out.run")
    assert json.loads((folder / "config.json").read_text()) == runs.recipe(config, INPUTS)
    assert runs.run_folder(config, INPUTS) == folder


@pytest.mark.parametrize("content", [b"", b'{"seed": 0', b"[]"])
def test_a_damaged_config_is_named(content, config):
    path = begun(config)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"out\.run/config\.json .*: remove the folder, or"):
        runs.run_folder(config, INPUTS)


def test_a_changed_bit_of_a_config_is_seen(config):
    path = begun(config)
    before = path.read_bytes()
    for place in range(0, len(before), 5):
        for bit in (0, 5):
            path.write_bytes(before[:place] + bytes([before[place] ^ 1 << bit]) + before[place + 1 :])
            try:
                same = json.loads(path.read_bytes()) == runs.recipe(config, INPUTS)  # a changed line break, say
            except ValueError:
                same = False
            with contextlib.nullcontext() if same else pytest.raises(ValueError, match=r"out\.run"):
                runs.run_folder(config, INPUTS)


def test_options_that_are_newer_than_a_run_were_as_they_are_by_default(config):
    path = begun(config)
    recorded = json.loads(path.read_text())
    for field in ("public_layers", "seed"):
        del recorded[field]
    for field in ("padded_lengths", "dtype"):
        del recorded["schedule"][field]
    path.write_text(json.dumps(recorded))
    assert runs.run_folder(config, INPUTS) == path.parent
    for changed, named in (
        (dataclasses.replace(config, seed=1), "seed"),
        (dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, dtype="bfloat16")), "schedule"),
    ):
        with pytest.raises(ValueError, match=f"holds a run with another {named}:"):
            runs.run_folder(changed, INPUTS)
    config.out.mkdir()
    (config.out / "results.json").write_text("{}")
    (config.out / "recipe.json").write_text(json.dumps(recorded))
    assert runs.done(config, INPUTS)
    assert not runs.done(dataclasses.replace(config, seed=1), INPUTS)


def test_a_run_with_nothing_to_lose_is_begun_anew_with_another_config(config):
    folder = runs.run_folder(dataclasses.replace(config, seed=1), INPUTS)
    assert runs.run_folder(config, INPUTS) == folder
    assert json.loads((folder / "config.json").read_text())["seed"] == 0
    (folder / "search.json").write_text("{}")
    with pytest.raises(ValueError, match=r"out\.run holds a run with another seed: remove the folder, or"):
        runs.run_folder(dataclasses.replace(config, seed=1), INPUTS)


def test_checkpoints_of_nobody_knows_what_are_not_gone_on_with(config):
    folder = runs.run_folder(config, INPUTS)
    (folder / "stage1").mkdir()
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"out\.run has no config\.json, which says what run it holds: remove"):
        runs.run_folder(config, INPUTS)


def test_a_run_that_was_killed_before_its_config_was_whole_begins_anew(config):
    folder = config.out.with_name("out.run")
    folder.mkdir()
    (folder / "config.json.new").write_text("{")
    assert runs.run_folder(config, INPUTS) == folder
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_what_is_done_has_its_recipe_and_its_results(config):
    config.out.mkdir()
    assert not runs.done(config, INPUTS)
    (config.out / "recipe.json").write_text(json.dumps(runs.recipe(config, INPUTS)))
    assert not runs.done(config, INPUTS)
    (config.out / "results.json").write_text("{}")
    assert runs.done(config, INPUTS)
    (config.out / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match=r"out/recipe\.json .*: remove it"):
        runs.done(config, INPUTS)
    runs.unfinished(config)
    assert not runs.done(config, INPUTS)
