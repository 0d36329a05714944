"""MiniLM-L6 finds named entities in posts: teacher and students. The zoo's wnut17-* entries.

    ln -s FOLDER runs/wnut17                        # train.conll, dev.conll and test.conll
    python train/wnut17_minilm.py teacher
    python train/wnut17_minilm.py 2quad-freediv     # then also: softmax-freediv, 2quad

Data: the shared task of WNUT 2017 (Derczynski and others, aclanthology.org/W17-4418; CC BY 4.0), 13 tags of six kinds
of entities that are new or rare. Its train, dev and test rows are used as they are. Method: as in movie.py, but the
first stage has no other texts to learn from. A killed run goes on from its last checkpoint when it is started again.
"""

import dataclasses
import os
from typing import Annotated, Any

import tyro
from entries import RUNS, make_entry, run_of

from flaxmpc.convert.configs import Conversion, FineTuning
from flaxmpc.convert.recipe import minilm_l6
from flaxmpc.training.fit import Schedule

TEACHER = "wnut17-minilm-l6"
DATA = RUNS / "wnut17"
LONGEST = 128  # tokens: of 64, a twentieth of the test rows would be cut

# What a student has in place of the teacher's parts, by the name of the entry.
STUDENTS: dict[str, dict[str, Any]] = {
    "2quad-freediv": {},
    "softmax-freediv": {"attention": "softmax_freediv"},
    "2quad": {"attention": "2quad"},
}


def config_of(name: str) -> FineTuning | Conversion:
    """What an entry is made by."""
    data = os.path.relpath(DATA)
    out = run_of(TEACHER, name)
    if name == "teacher":
        return FineTuning(minilm_l6(), data, out, Schedule(epochs=8, learning_rate=1e-4), max_length=LONGEST)
    stage1 = dataclasses.replace(Conversion.stage1, epochs=10)
    stage2 = dataclasses.replace(Conversion.stage2, epochs=5)
    return Conversion(
        run_of(TEACHER, "teacher"), data, out, stage1=stage1, stage2=stage2, max_length=LONGEST, **STUDENTS[name]
    )


def main(
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")],
    epochs: Annotated[int | None, tyro.conf.arg(help_behavior_hint="")] = None,
) -> None:
    """Makes one model in runs/, evaluates it, and writes what the zoo keeps of it to models/.

    Args:
        name: teacher, or one of the students: see STUDENTS.
        epochs: of every stage, in place of the recipe's: to see that it runs; the zoo is left as it is.
    """
    if name not in ("teacher", *STUDENTS):
        raise SystemExit(f"unknown {name!r}: teacher, {', '.join(STUDENTS)}")
    if not DATA.is_dir():
        raise SystemExit(f"{DATA} does not exist: ln -s FOLDER {DATA}, where FOLDER has the .conll files")
    make_entry(config_of(name), TEACHER, name, epochs=epochs, made_by=f"train/wnut17_minilm.py {name}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
