"""Students beside their teachers, each with its own weights: one text on shares, in pairs.

    python benchmarks/paired.py runs/sst2-minilm-l6-2quad-freediv ... [--json] [--show] [--quick]

A teacher is the folder that its student's recipe names, as `flaxmpc infer` runs it: softmax and GeLU as exact, folded
where that is possible. A student follows its plan of bits where its folder has one. The two take turns, compiled and
warm, three times; seconds are medians.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import harness
import tyro
from harness import Benchmark, Record, held, medians, ratios, record

from flaxmpc import files
from flaxmpc.models.folder import read_config
from flaxmpc.serve import plans
from flaxmpc.serve.private import SecureClassifier

TEXT = "An hour too long, but I laughed all the way, and I would see it again tomorrow."
TEACHER, STUDENT = "teacher", "student"


@dataclasses.dataclass(frozen=True)
class Options(harness.Options):
    """What is measured.

    Attributes:
        students: folders of converted models; those of their teachers are where their recipes say.
        text: what is asked, of any length that the models take.
        pairs: how often each is asked.
    """

    students: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    text: str = TEXT
    pairs: int = 3


@functools.cache
def warm(folder: Path, text: str) -> SecureClassifier:
    """A model whose weights are on shares, and that was asked once."""
    made = SecureClassifier.from_folder(folder, plans.parties(folder, "ABY3"))
    made.classify([text])
    return made


def measure(folder: Path, text: str, **names: str) -> Record:
    classifier = warm(folder, text)
    asked = classifier.classify([text])
    (answer,) = asked.predictions
    if answer.error is not None:
        raise SystemExit(f"{folder} has no answer: {answer.error}")
    config = read_config(folder)
    (row,) = classifier.encode([text]).input_ids
    return record(
        asked.cost,
        **names,
        attention=config.attention_of(0).name,
        activation=config.hidden_act_of(0).name,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_tokens=classifier.bucket(len(row)),
        error=answer.difference,
    )


def teacher_of(student: Path) -> Path:
    """The folder of the teacher that a student's recipe names."""
    recipe = student / "recipe.json"
    if not recipe.is_file():
        raise SystemExit(f"{student} is no student: there is no {recipe}")
    try:
        named = files.read_object(recipe).get("teacher")
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if not isinstance(named, str):
        raise SystemExit(f"{recipe} names no teacher")
    if not (Path(named) / "model.safetensors").is_file():
        raise SystemExit(f"the teacher of {student} is not at {named}: make it again, see {student}/README.md")
    return Path(named)


def jobs(chosen: Options) -> Iterator[tuple[str, Callable[[], Record]]]:
    if not chosen.students:
        raise SystemExit("name the folders of students, such as runs/sst2-minilm-l6-2quad-freediv")
    if chosen.pairs < 1:
        raise SystemExit(f"--pairs is 1 or more, not {chosen.pairs}")
    for student in chosen.students:
        teacher = teacher_of(student)
        for number in range(1 if chosen.quick else chosen.pairs):
            for role, folder in ((TEACHER, teacher), (STUDENT, student)):
                names = {"model": folder.name, "role": role, "pair": str(student)}
                # With the text: what an interrupted run measured of another one is none of this run's.
                description = f"{student}, {role}, {number + 1}: {chosen.text}"
                yield description, partial(measure, folder, chosen.text, **names)


def finish(records: list[Record]) -> list[Record]:
    """The medians of each model, and how many times less than its teacher it takes."""
    found = []
    for pair in dict.fromkeys(each["pair"] for each in records):
        of_pair = [
            [each for each in records if (each["pair"], each["role"]) == (pair, role)] for role in (TEACHER, STUDENT)
        ]
        teacher, student = (medians(runs, ("seconds", "lan_seconds", "wan_seconds")) for runs in of_pair)
        found += [own | ratios(teacher, own) for own in (teacher, student)]
    return found


def notes(records: list[Record]) -> list[str]:
    return [
        held(f"{own['model']} beside its teacher, at least 5x less time", own["time_ratio"], least=5)
        for own in records
        if own["role"] == STUDENT and own["hidden_size"] >= 768
    ]


def benchmark(chosen: Options) -> Benchmark:
    columns = (
        ("model", "attention", "num_tokens", "bytes_sent_total", "rounds", "seconds", "lan_seconds", "wan_seconds"),
        ("model", "time_ratio", "bytes_ratio", "rounds_ratio", "lan_ratio", "wan_ratio", "error"),
    )
    return Benchmark("paired", partial(jobs, chosen), columns, finish, notes)


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    benchmark(chosen).run(chosen)
