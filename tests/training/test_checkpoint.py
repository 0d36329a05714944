import shutil

import numpy as np
import pytest

from flaxmpc.training.checkpoint import Checkpoints


def tree(value):
    return {"params": {"w": np.full((2, 3), value, np.float32)}, "optimizer": [np.int32(value)]}


def steps(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with steps 2 and 3, after 1."""
    folder = tmp_path_factory.mktemp("saved") / "stage" / "checkpoints"
    with Checkpoints(folder) as kept:
        assert kept.step() == -1
        for step in (1, 2, 3):
            kept.save(step, tree(step))
    return folder


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """A folder with the best of three steps, the second."""
    folder = tmp_path_factory.mktemp("chosen") / "stage" / "best"
    with Checkpoints(folder, best="figure") as kept:
        for step, figure in enumerate([0.25, 0.75, 0.5]):
            kept.save(step, tree(step), {"figure": figure}, wait=True)
    return folder


def copied(folder, to):
    return shutil.copytree(folder, to / folder.parent.name / folder.name)


def read(folder, **options):
    """The step that a run goes on from, and what it restores."""
    with Checkpoints(folder, **options) as kept:
        step = kept.step()
        found = kept.restore(step, tree(0))
    np.testing.assert_array_equal(found["params"]["w"], tree(step)["params"]["w"])
    assert found["optimizer"] == [step]
    return step


def test_the_last_is_found_and_restored_by_another_run(saved):
    assert read(saved) == 3
    assert steps(saved) == [2, 3]


def test_a_step_that_is_there_is_left(tmp_path):
    with Checkpoints(tmp_path) as kept:
        kept.save(1, tree(1), wait=True)
        kept.save(1, tree(7), wait=True)
        assert kept.restore(1, tree(0))["optimizer"] == [1]


@pytest.mark.parametrize(("figures", "best"), [([0.2, 0.9, 0.5], 1), ([0.5, 0.9, 0.9], 2)])
def test_the_best_is_that_of_the_largest_figure_and_the_last_of_equals(figures, best, tmp_path):
    with Checkpoints(tmp_path, best="figure") as kept:
        assert kept.step() == -1
        for step, figure in enumerate(figures):
            kept.save(step, tree(step), {"figure": figure}, wait=True)
        assert kept.step() == best
        assert kept.restore(best, tree(0))["optimizer"] == [best]


def flipped(path):
    content = bytearray(path.read_bytes())
    place = int(np.random.default_rng(len(content)).integers(len(content)))
    content[place] ^= 1 << place % 8
    path.write_bytes(content)


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def of_another_step(path):
    """In place of it, the file of the same name of another step, or of one of its own files."""
    step = next(parent for parent in path.parents if parent.name.isdecimal())
    files = [other for other in step.parent.rglob("*") if other.is_file() and step not in other.parents]
    same = [other for other in files if other.name == path.name] or files or [step / "sha256.json"]
    path.write_bytes(same[0].read_bytes())


DAMAGES = {
    "flipped": flipped,
    "cut": cut,
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "of another step": of_another_step,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, saved, tmp_path, capsys):
    """Whichever file it is; of the note that orbax takes of a step, nothing is believed."""
    names = sorted(path.relative_to(saved) for path in (saved / "3").rglob("*") if path.is_file())
    assert len(names) > 5
    noticed = 0
    for number, name in enumerate(names):
        folder = copied(saved, tmp_path / str(number))
        before = (folder / name).read_bytes()
        DAMAGES[damage](folder / name)
        changed = not (folder / name).is_file() or (folder / name).read_bytes() != before
        found = read(folder)
        said = capsys.readouterr().out
        if len(name.parts) > 2 or name.name == "sha256.json":
            assert found == (2 if changed else 3), name
        if found == 2:
            noticed += 1
            assert f"{folder / '3'}" in said
            assert said.endswith("the checkpoint is removed, and training goes on from step 2\n")
            assert steps(folder) == [2]
        else:
            assert said == ""
    assert noticed > len(names) / 2


def test_every_file_that_is_read_is_vouched_for(saved, chosen):
    for folder in (saved / "3", chosen / "1"):
        loose = {path.name for path in folder.iterdir() if path.is_file()}
        assert loose <= {"sha256.json", "_CHECKPOINT_METADATA", "commit_success.txt"}


def test_a_step_in_the_place_of_another_is_damaged(saved, tmp_path, capsys):
    folder = copied(saved, tmp_path)
    shutil.rmtree(folder / "3")
    shutil.copytree(folder / "2", folder / "3")
    assert read(folder) == 2
    assert capsys.readouterr().out.startswith(f"{folder / '3'} holds step 2: the checkpoint is removed")


def test_a_later_checkpoint_stands_in_for_a_damaged_one(saved, tmp_path, capsys):
    folder = copied(saved, tmp_path)
    shutil.rmtree(folder / "2" / "default")
    assert read(folder) == 3
    assert "goes on from step 3" in capsys.readouterr().out


def test_without_a_whole_checkpoint_nothing_is_begun(saved, tmp_path):
    folder = copied(saved, tmp_path)
    for step in ("2", "3"):
        (folder / step / "sha256.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"/2/sha256\.json cannot be read .*remove {folder.parent}, and what is"):
        Checkpoints(folder)
    assert steps(folder) == [2, 3]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_best_epoch_is_refused(damage, chosen, tmp_path):
    names = sorted(path.relative_to(chosen) for path in (chosen / "1").rglob("*") if path.is_file())
    for number, name in enumerate(names):
        folder = copied(chosen, tmp_path / str(number))
        before = (folder / name).read_bytes()
        DAMAGES[damage](folder / name)
        loose = len(name.parts) == 2 and name.name != "sha256.json"
        if loose or ((folder / name).is_file() and (folder / name).read_bytes() == before):
            assert read(folder, best="figure") == 1
        else:
            with pytest.raises(ValueError, match=rf"^{folder}/1.*, and no other checkpoint stands in for it: remove"):
                read(folder, best="figure")


def test_what_is_damaged_while_training_goes_on_is_not_restored(tmp_path):
    with Checkpoints(tmp_path, best="figure") as kept:
        kept.save(0, tree(0), {"figure": 1.0}, wait=True)
        flipped(next(path for path in (tmp_path / "0" / "default").rglob("*") if path.is_file()))
        with pytest.raises(ValueError, match=r"/0/default/.* is not as it was written: start the run again"):
            kept.restore(0, tree(0))


def test_what_a_killed_save_left_is_removed(saved, tmp_path):
    folder = copied(saved, tmp_path)
    leftovers = (folder / "4.orbax-checkpoint-tmp-0", folder / "removed" / "1")
    for leftover in leftovers:
        shutil.copytree(folder / "3", leftover)
    with Checkpoints(folder) as kept:
        assert kept.step() == 3
        assert not any(leftover.exists() for leftover in leftovers)
        kept.save(4, tree(4), wait=True)
    assert read(folder) == 4
    assert steps(folder) == [3, 4]
