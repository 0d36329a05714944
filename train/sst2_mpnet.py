"""MPNet base on SST-2: a teacher and its student at base size. The zoo's sst2-mpnet-base* entries: figures, no weights.

    ln -s FOLDER runs/glue                          # GLUE as it ships: SST-2/train.tsv, SST-2/dev.tsv
    python train/mpnet_base.py runs/mpnet-base      # the encoder
    python train/sst2_mpnet.py teacher              # with an accelerator: --rows 67349 --dtype bfloat16
    python train/sst2_mpnet.py 2quad-freediv

Method: as in glue_minilm.py, from a start near the teacher (stage 0). On one core 8,000 rows take half an hour, and the
whole student six hours; a killed run goes on from its last checkpoint when it is started again. With all rows there are
no texts without labels left, and stage 1 wants more epochs. Expected, from a prototype on one H200 with all rows:
93.5 % for the teacher after one epoch, 93.0 % for the student after five of stage 1 alone.
"""

import csv
import dataclasses
import io
import os
from pathlib import Path
from typing import Annotated

import tyro
from entries import RUNS, make_entry, run_of

from flaxmpc import files
from flaxmpc.convert.configs import Conversion, FineTuning
from flaxmpc.training.fit import Schedule

TEACHER = "sst2-mpnet-base"
ENCODER = RUNS / "mpnet-base"
SST2 = RUNS / "glue" / "SST-2"

UNLABELLED = 20_000
"""The texts that a student's first stage learns from beside the rows, without labels: on 8,000 rows alone the last
layers came near the teacher on these and on no others."""


def some_rows(count: int) -> tuple[str, Path | None]:
    """Writes SST-2 with its first `count` rows of train, and the texts of the next 20,000 rows, in runs/.

    GLUE ships its rows shuffled, so the first ones are like any others.

    Returns:
        The data as `flaxmpc convert` takes it, and the file of the texts; None: no rows are left for them.
    """
    with (SST2 / "train.tsv").open(encoding="utf-8", newline="") as file:
        head, *rows = file
    if not 1 <= count <= len(rows):
        raise SystemExit(f"--rows {count}: {SST2 / 'train.tsv'} has {len(rows)}; some of them, or all")
    folder = RUNS / f"sst2-{count}"
    folder.mkdir(exist_ok=True)
    files.write(folder / "train.tsv", "".join([head, *rows[:count]]))
    files.write(folder / "dev.tsv", (SST2 / "dev.tsv").read_text("utf-8"))
    data = f"sst2={os.path.relpath(folder)}"
    texts = [row.partition("\t")[0].strip() for row in rows[count : count + UNLABELLED]]
    if not texts:
        return data, None
    out = io.StringIO()
    csv.writer(out).writerows([["sentence"], *([text] for text in texts)])
    beside = RUNS / f"sst2-after-{count}.csv"
    files.write(beside, out.getvalue())
    return data, beside


def config_of(name: str, data: str, unlabelled: Path | None, dtype: str) -> FineTuning | Conversion:
    """What an entry is made by. Few padded lengths, as at this size a compiled program costs an epoch's tenth."""
    few = {"padded_lengths": (16, 32, 64), "dtype": dtype}
    if name == "teacher":
        schedule = Schedule(epochs=2, learning_rate=3e-5, **few)
        return FineTuning(ENCODER, data, run_of(TEACHER, name), schedule)
    return Conversion(
        run_of(TEACHER, "teacher"),
        data,
        run_of(TEACHER, name),
        unlabelled=unlabelled,
        least_squares_rows=8192,
        stage0=dataclasses.replace(Conversion.stage0, epochs=2, **few),
        stage1=dataclasses.replace(
            Conversion.stage1, epochs=1, learning_rate=1e-4, batch_size=16, logit_weight=0.1, range_weight=0.1, **few
        ),
        stage2=dataclasses.replace(Conversion.stage2, epochs=1, **few),
        notes=f"Learned from `{data}`, the first of SST-2's rows of train, and in stage 1 from the texts of the next "
        "20,000, without labels. All rows are for an accelerator: `--rows 67349`.",
    )


def main(
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")],
    rows: int = 8000,
    dtype: str = "float32",
    epochs: Annotated[int | None, tyro.conf.arg(help_behavior_hint="")] = None,
) -> None:
    """Makes one model in runs/, evaluates it, and writes what the zoo keeps of it to models/.

    Args:
        name: teacher or 2quad-freediv.
        rows: the number of rows of train that are learned from: 67349 are all.
        dtype: what is computed in: float32, or bfloat16 on an accelerator.
        epochs: of every stage, in place of the recipe's: to see that it runs; the zoo is left as it is.
    """
    if name not in ("teacher", "2quad-freediv"):
        raise SystemExit(f"unknown {name!r}: teacher, 2quad-freediv")
    for folder, made_by in ((SST2, f"ln -s FOLDER {SST2.parent}"), (ENCODER, f"python train/mpnet_base.py {ENCODER}")):
        if not folder.is_dir():
            raise SystemExit(f"{folder} does not exist: {made_by}")
    config = config_of(name, *some_rows(rows), dtype)
    make_entry(config, TEACHER, name, epochs=epochs, made_by=f"train/sst2_mpnet.py {name}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
