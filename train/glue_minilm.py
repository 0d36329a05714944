"""MiniLM-L6 on tasks of GLUE: teachers and students. The zoo's sst2-*, mrpc-*, cola-*, rte-* and stsb-* entries.

    ln -s FOLDER runs/glue                          # GLUE as it ships: SST-2/train.tsv, MRPC/train.tsv, ...
    python train/glue_minilm.py sst2 teacher
    python train/glue_minilm.py sst2 2quad-freediv  # then also: 2quad-freediv/seed-1, softmax-freediv, ...
    python train/glue_minilm.py rte teacher/from-intermediate

GLUE's dev rows are the test rows here, looked at once; a tenth of its train rows chooses the epochs. Method: as in
movie.py. The small tasks have too few texts for stage 1, so it learns from the texts of other tasks too, without
labels: those of pairs from each other's, CoLA from SST-2's. Left out are rows with a text of the task's own dev, which
MRPC and STS-B have in common. A killed run goes on from its last checkpoint when it is started again. How several are
made at a time is in movie.py.
"""

import csv
import dataclasses
import io
import os
from pathlib import Path
from typing import Annotated, Any

import tyro
from entries import RUNS, make_entry, run_of

from flaxmpc import files
from flaxmpc.convert.configs import Conversion, FineTuning
from flaxmpc.convert.distill import Stage
from flaxmpc.convert.recipe import minilm_l6
from flaxmpc.data.glue import GLUE as COLUMNS
from flaxmpc.training.fit import Schedule

GLUE = RUNS / "glue"


@dataclasses.dataclass(frozen=True)
class Task:
    """How a task is learned.

    Attributes:
        folder: the name of its folder in GLUE.
        epochs, stage1_epochs: of the teacher's fine-tuning, and of a student's first stage.
        max_length: the number of tokens that a text is cut at.
        least_squares_rows: of a student, see `Conversion`.
        texts_of: the tasks whose texts a student's first stage learns from, beside its own.
        intermediate: another task, whose teacher `teacher/from-intermediate` starts from.
    """

    folder: str
    epochs: int
    stage1_epochs: int
    max_length: int = 64
    least_squares_rows: int = 0
    texts_of: tuple[str, ...] = ()
    intermediate: str | None = None


TASKS = {
    "sst2": Task("SST-2", epochs=2, stage1_epochs=2),
    "mrpc": Task("MRPC", epochs=5, stage1_epochs=8, max_length=128, texts_of=("rte", "stsb")),
    "cola": Task("CoLA", epochs=6, stage1_epochs=1, least_squares_rows=8192, texts_of=("sst2",)),
    "rte": Task("RTE", 8, 4, max_length=128, least_squares_rows=4096, texts_of=("stsb", "mrpc"), intermediate="stsb"),
    "stsb": Task("STS-B", 6, 4, max_length=128, least_squares_rows=8192, texts_of=("rte", "mrpc")),
}

# The second is of tasks with an intermediate.
TEACHERS = ("teacher", "teacher/from-intermediate")

_NONE = Stage(epochs=0, learning_rate=1.0)
_LAYERS_ALONE = dataclasses.replace(Conversion.stage0, epochs=2)

# What a student has in place of the teacher's parts, by the name of the entry; after a slash, another run of it.
STUDENTS: dict[str, dict[str, Any]] = {
    "2quad-freediv": {},
    "2quad-freediv/seed-1": {"seed": 1},
    "2quad-freediv/seed-2": {"seed": 2},
    "softmax-freediv": {"attention": "softmax_freediv"},
    "softmax-freediv/seed-1": {"attention": "softmax_freediv", "seed": 1},
    "softmax-freediv/seed-2": {"attention": "softmax_freediv", "seed": 2},
    "softmax": {"attention": "softmax"},
    "2quad": {"attention": "2quad"},
    "2quad-freediv/3-layers": {"num_hidden_layers": 3, "least_squares_rows": 16384, "stage0": _LAYERS_ALONE},
    "2quad-freediv/stage-0-alone": {
        "least_squares_rows": 16384,
        "stage0": _LAYERS_ALONE,
        "stage1": _NONE,
        "stage2": _NONE,
    },
}


def texts_for(task: str) -> Path:
    """The file of other tasks' texts that a task's students learn from."""
    return RUNS / f"texts-for-{task}.csv"


def write_texts(task: str) -> None:
    """Writes it. Texts count as those of dev where letters and digits are the same: MRPC's are tokenized."""
    dev = {_letters(text) for row in _rows(task, "dev") for text in row}
    found = [row for other in TASKS[task].texts_of for row in _rows(other, "train")]
    kept = [row for row in found if dev.isdisjoint(map(_letters, row))]
    out = io.StringIO()
    csv.writer(out).writerows([COLUMNS[task].text_columns, *kept])
    files.write(texts_for(task), out.getvalue())


def _rows(task: str, split: str) -> list[tuple[str, ...]]:
    """The texts of a task's rows."""
    (table,) = COLUMNS[task].read(GLUE / TASKS[task].folder, {split}).values()
    return list(zip(*(table.columns[name] for name in COLUMNS[task].text_columns), strict=True))


def _letters(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())


def names_of(task: str) -> tuple[str, ...]:
    """The names of a task's entries, and of other runs of them."""
    return (*teachers_of(task), *STUDENTS)


def teachers_of(task: str) -> tuple[str, ...]:
    """The names of a task's teachers. The last is the students'."""
    return TEACHERS if TASKS[task].intermediate else TEACHERS[:1]


def config_of(task: str, name: str) -> FineTuning | Conversion:
    """What a task's entry is made by."""
    own = TASKS[task]
    data = f"{task}={os.path.relpath(GLUE / own.folder)}"
    out = run_of(f"{task}-minilm-l6", name)
    if name in TEACHERS:
        encoder = minilm_l6() if name == "teacher" else run_of(f"{own.intermediate}-minilm-l6", "teacher")
        schedule = Schedule(epochs=own.epochs, learning_rate=5e-5)
        return FineTuning(encoder, data, out, schedule, max_length=own.max_length)
    fields: dict[str, Any] = {
        "unlabelled": texts_for(task) if own.texts_of else None,
        "stage1": dataclasses.replace(Conversion.stage1, epochs=own.stage1_epochs),
        "least_squares_rows": own.least_squares_rows,
        "stage0": _LAYERS_ALONE if own.least_squares_rows else Conversion.stage0,
        "max_length": own.max_length,
    }
    teacher = run_of(f"{task}-minilm-l6", teachers_of(task)[-1])
    return Conversion(teacher, data, out, **{**fields, **STUDENTS[name]})


def main(
    task: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TASK")],
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")],
    epochs: Annotated[int | None, tyro.conf.arg(help_behavior_hint="")] = None,
) -> None:
    """Makes one model in runs/, evaluates it, and writes what the zoo keeps of it to models/.

    Args:
        task: sst2, mrpc, cola, rte or stsb.
        name: one of TEACHERS, or of STUDENTS.
        epochs: of every stage, in place of the recipe's: to see that it runs; the zoo is left as it is.
    """
    if task not in TASKS:
        raise SystemExit(f"unknown {task!r}: {', '.join(TASKS)}")
    if name not in names_of(task):
        raise SystemExit(f"unknown {name!r}: {', '.join(names_of(task))}")
    others = TASKS[task].texts_of if name in STUDENTS else ()
    for each in (task, *others):
        if not (folder := GLUE / TASKS[each].folder).is_dir():
            raise SystemExit(f"{folder} does not exist: ln -s FOLDER {GLUE}, where FOLDER has GLUE as it ships")
    if others:
        write_texts(task)
    make_entry(
        config_of(task, name), f"{task}-minilm-l6", name, epochs=epochs, made_by=f"train/glue_minilm.py {task} {name}"
    )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
