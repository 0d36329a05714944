"""What the recipes of the zoo's entries share: where their runs are, how one is made, and what the zoo keeps of it."""

import shutil
from pathlib import Path

from flaxmpc import files
from flaxmpc.convert import card
from flaxmpc.convert.configs import Conversion, FineTuning
from flaxmpc.convert.recipe import make, with_epochs
from flaxmpc.models import zoo
from flaxmpc.models.tokenizer import FILES as TOKENIZER_FILES
from flaxmpc.serve import plans

ROOT = Path(__file__).parent.parent
RUNS, ZOO = ROOT / "runs", ROOT / "models"


def run_of(teacher: str, name: str) -> Path:
    """Where a run of a teacher's entries is made: "teacher/public-1" in TEACHER-public-1, "2quad/seed-1" in
    TEACHER-2quad-seed-1.
    """
    parts = name.split("/")
    return RUNS / "-".join([teacher, *(part for part in parts if part != "teacher")])


def make_entry(config: FineTuning | Conversion, teacher: str, name: str, *, epochs: int | None, made_by: str) -> None:
    """Makes one model in runs/, evaluates it, and copies what the zoo keeps of it, without weights: see `publish`.

    Args:
        config: what it is made by.
        epochs: of every stage, in place of the config's: to see that it runs; the zoo is left as it is.

    Raises:
        SystemExit: it can't be made, for the reason that it names.
    """
    try:
        make(config if epochs is None else with_epochs(config, epochs))
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(str(error)) from error
    if epochs is None:
        publish(teacher, name, shipped=False, made_by=made_by)


def publish(teacher: str, name: str, *, shipped: bool, made_by: str) -> None:
    """Copies what the zoo keeps of a run: the entry, or the figures of another run of it.

    Args:
        teacher: the teacher's name in the zoo.
        name: "teacher", or the student's name; after a slash, another run of it.
        shipped: whether the weights are kept in the repository.
        made_by: the command that makes the entry.
    """
    out = run_of(teacher, name)
    entry, _, variant = name.partition("/")
    folder = ZOO / (teacher if entry == "teacher" else f"{teacher}-{entry}")
    if variant:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        record = {part: files.read_object(out / f"{part}.json") for part in ("recipe", "results")}
        if (search := out.with_name(f"{out.name}.run") / "search.json").is_file():
            record["search"] = files.read_object(search)
        files.write_json(folder / "runs" / f"{variant}.json", record)
        return
    folder.mkdir(parents=True, exist_ok=True)
    weights = ("model.safetensors", plans.FILE, *TOKENIZER_FILES) if shipped else ()
    for file in ("config.json", "recipe.json", "results.json", "notes.md", *weights):
        if (out / file).is_file():
            shutil.copy(out / file, folder / file)
    files.write_json(folder / "results.json", zoo.results(folder) | {"made_by": made_by})
    card.write(folder)
