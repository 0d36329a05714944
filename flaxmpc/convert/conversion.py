"""A whole conversion: from a pre-trained encoder to a teacher, and from a teacher to a zoo folder."""

import dataclasses
from typing import Any

import numpy as np

from flaxmpc import files
from flaxmpc.convert import calibrate, contents
from flaxmpc.convert.configs import Conversion, FineTuning
from flaxmpc.convert.distill import Teacher, distill, start_student
from flaxmpc.convert.finetune import Evaluate, finetune, in_order, lengths, looking_up, predict
from flaxmpc.convert.runs import alone, done, recipe, run_folder, unfinished
from flaxmpc.data import tasks
from flaxmpc.data.batches import SPLITS, Split, batches
from flaxmpc.data.matching import matched, named, refuse_other_order
from flaxmpc.data.pieces import pieces
from flaxmpc.models import folder as folders
from flaxmpc.models.bert import BertForSequenceClassification
from flaxmpc.models.config import BertConfig
from flaxmpc.nn.normalization import NORMALIZATIONS, Ranged
from flaxmpc.training import hosts
from flaxmpc.training.metrics import agreement, correct, evaluate, paired_difference

# What fine-tuning and distillation leave as it is, so that the client may know the table: see `flaxmpc.nn.embedding`.
_EMBEDDINGS = "bert/embeddings/"


def _figures(task: tasks.Task, logits: np.ndarray, prefix: str = "") -> dict[str, float]:
    figures = evaluate(task.metrics, logits, task.test.labels)
    return {prefix + name: value for name, value in figures.items()}


def _bits(hits: np.ndarray) -> str:
    return "".join("01"[int(hit)] for hit in hits)


@alone
def finetune_encoder(config: FineTuning) -> dict[str, Any]:
    """Makes the teacher, writes its folder with results.json and recipe.json, and returns the results.

    A run that was killed goes on from its last checkpoint.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: bad data, see `tasks.load`; a run of another config.
        FloatingPointError: see `fit`.
    """
    encoder = BertConfig.from_folder(config.encoder)
    task = _load_task(config, folders.load_tokenizer(config.encoder), encoder)
    base = folders.load_pretrained(
        config.encoder,
        seed=config.seed,
        id2label=task.id2label,
        problem_type="regression" if task.regression else "single_label_classification",
        model_max_length=config.max_length,
        num_texts=len(task.text_columns),
        embedding="public",  # which looks ids up
    )
    inputs = {"data": contents.of_task(task), "encoder": contents.of_encoder(base, encoder)}
    run = run_folder(config, hosts.agreed(inputs))
    params = finetune(
        base.model,
        base.params,
        task.train,
        Evaluate(base.model, task.validation, task.metrics),
        config.schedule,
        run / "fine-tuning",
        frozen="" if config.train_embeddings else _EMBEDDINGS,
        seed=config.seed,
    )
    kept = dataclasses.replace(base.model.config, embedding=_embedding(config.train_embeddings, encoder))
    unfinished(config)
    folders.save(config.out, BertForSequenceClassification(kept), params, config.encoder)
    logits = predict(base.model, params, task.test)
    results: dict[str, Any] = {"test_sentences": len(task.test), **_figures(task, logits)}
    if not task.regression:
        results["correct"] = _bits(correct(logits, task.test.labels))
    files.write_json(config.out / "results.json", results)
    files.write_json(config.out / "recipe.json", recipe(config, inputs))
    return results


def _embedding(trained: bool, start: BertConfig) -> str:
    """The mode of a trained embedding: a table that is no published one is secret, and so is what starts from it."""
    return "secret" if trained or not start.embedding.client_embeds else "public"


def _load_task(config: FineTuning | Conversion, tokenizer: Any, model: BertConfig) -> tasks.Task:
    """The data, for a model of this config.

    Raises:
        ValueError: see `tasks.load`; more tokens than the model has positions, or other tokens than it has.
    """
    if config.max_length > model.max_position_embeddings:
        raise ValueError(
            f"max_length is {config.max_length}, but the model has {model.max_position_embeddings} positions"
        )
    task = tasks.load(
        config.data, tokenizer, config.max_length, text_columns=config.text_columns, label_column=config.label_column
    )
    for warning in task.warnings:
        print(f"{config.data}: {warning}")
    for split in (getattr(task, name) for name in SPLITS):
        for what, rows, known in (
            ("token", split.input_ids, model.vocab_size),
            ("token type", split.token_type_ids or (), model.type_vocab_size),
        ):
            largest = max((int(np.max(row)) for row in rows), default=0)
            if largest >= known:
                raise ValueError(f"the tokenizer gives {what} {largest}, but the model has {known}: they do not fit")
    return task


def _calibrated(
    student: BertForSequenceClassification, params: Any, train: Split, validation: Split, part: Ranged
) -> BertForSequenceClassification:
    """With LayerNorms for the variances of what is trained on, see `calibrate.with_newton`."""
    finite = BertForSequenceClassification(calibrate.for_training(student.config))
    most = student.config.max_position_embeddings
    seen, held_out = (calibrate.variances(finite, params, in_order(split, most=most)) for split in (train, validation))
    return BertForSequenceClassification(calibrate.with_newton(student.config, seen, held_out, part))


def _beside_teacher(
    student: BertForSequenceClassification,
    params: Any,
    teacher: folders.LoadedModel,
    teacher_logits: np.ndarray,
    task: tasks.Task,
) -> dict[str, Any]:
    """The student's figures on the test set, and how they and its labels differ from the teacher's."""
    logits = predict(student, params, task.test)
    if task.regression:
        return _figures(task, logits)
    short = pieces(task.test, 1.0, seed=0)
    theirs = predict(teacher.model, teacher.params, short)
    hits, teacher_hits = correct(logits, task.test.labels), correct(teacher_logits, task.test.labels)
    return {
        **_figures(task, logits),
        "pieces": len(short),
        "pieces_agreement": agreement(predict(student, params, short), theirs),
        **paired_difference(hits, teacher_hits, seed=0)._asdict(),
        "correct": _bits(hits),
        "teacher_correct": _bits(teacher_hits),
    }


def _teacher(config: Conversion) -> folders.LoadedModel:
    teacher = folders.load(config.teacher)
    if not isinstance(teacher.model, BertForSequenceClassification):
        raise ValueError(f"{config.teacher} holds a {type(teacher.model).__name__}, not a sequence classifier")
    if teacher.model.config.problem_type == "multi_label_classification":
        raise ValueError(
            f"{config.teacher} gives a text several labels; a student of one label, or of a number, is made"
        )
    return teacher._replace(model=looking_up(teacher.model))


@alone
def convert(config: Conversion) -> dict[str, Any]:
    """Replaces, calibrates, distils, evaluates in the clear, and writes the folder. Returns the results.

    A run that was killed goes on from its last checkpoint; what is done already is returned. `flaxmpc.convert.evaluate`
    then adds what the student does with longer texts and under MPC, and the card.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: an unknown part, or bad data, see `tasks.load`; a teacher with
            other labels than the data; a run of another config, or from other data or weights.
        FloatingPointError: see `fit`.
    """
    teacher = _teacher(config)
    newton = NORMALIZATIONS.resolve(config.layer_norm)
    own = teacher.model.config
    exact = dataclasses.replace(own, attention=config.attention, hidden_act=config.activation)
    loaded = _load_task(config, teacher.tokenizer, own)
    task = matched(loaded, own.id2label, str(config.teacher))
    num_texts = len(task.text_columns)
    if own.num_texts not in (None, num_texts):
        raise ValueError(f"{config.teacher} answers {own.num_texts} text(s) at a time, {config.data} has {num_texts}")
    exact = dataclasses.replace(exact, id2label=task.id2label, model_max_length=config.max_length, num_texts=num_texts)
    student = BertForSequenceClassification(exact)
    train, validation = (
        split + pieces(split, config.pieces, seed=config.seed) for split in (task.train, task.validation)
    )
    everything = train
    inputs = {"data": contents.of_task(task), "teacher": contents.of_model(teacher)}
    if config.unlabelled is not None:
        more = tasks.unlabelled(config.unlabelled, task, teacher.tokenizer, config.max_length)
        everything += more
        inputs["unlabelled texts"] = contents.of_split(more)
    if hosts.from_first(np.bool_(done(config, hosts.agreed(inputs)))):
        again = "remove it, and the model is finished again from its checkpoints"
        return files.read_object(config.out / "results.json", mend=again) if hosts.first() else {}
    run = run_folder(config, inputs)
    teacher_logits = predict(teacher.model, teacher.params, task.test)
    if not (task.regression or (named(own.id2label) and named(loaded.id2label))):
        some = task.train[np.linspace(0, len(task.train) - 1, min(len(task.train), 256)).astype(int)]
        logits = predict(teacher.model, teacher.params, some)
        refuse_other_order(logits, some.labels, f"{config.teacher} on {config.data}")
    results: dict[str, Any] = {"test_sentences": len(task.test), **_figures(task, teacher_logits, "teacher_")}

    bits = {"word_embedding_bits": config.word_embedding_bits, "matrix_bits": config.matrix_bits}
    # Through a folder and back: the student starts, and keeps, the embeddings as they will be stored.
    folders.save(run / "start", student, start_student(student, teacher.params), config.teacher, **bits)
    params = folders.load(run / "start").params
    padded = lengths(own.max_position_embeddings)
    calibration = list(batches(task.train, batch_size=64, lengths=padded, seed=config.seed))[:8]
    params = calibrate.calibrate_attention(student, params, calibration[0])
    results |= _figures(task, predict(student, params, task.test), "untrained_")

    ranged = isinstance(newton, Ranged)
    ranges = calibrate.ranges(calibrate.variances(teacher.model, teacher.params, calibration)) if ranged else None
    stages = {"stage1": config.stage1, "stage2": config.stage2}
    learnt = {"stage1": everything, "stage2": train}
    outputs = Teacher(
        teacher.model,
        teacher.params,
        everything,
        with_states=any(stage.epochs and stage.hidden_weight for stage in stages.values()),
        with_scores=any(stage.epochs and stage.score_weight for stage in stages.values()),
        memory=config.teacher_memory * 1e9,
    )
    for name, stage in stages.items():
        if name == "stage2" and ranged:  # the last stage trains the very function that will run
            student = _calibrated(student, params, train, validation, newton)
        trained = BertForSequenceClassification(calibrate.for_training(student.config))
        params = distill(
            trained,
            params,
            outputs,
            task.train if stage.label_weight else learnt[name],
            Evaluate(trained, task.validation, task.metrics),
            stage,
            run / name,
            ranges=ranges,
            frozen="" if config.train_embeddings else _EMBEDDINGS,
            seed=config.seed,
        )
        results |= _figures(task, predict(trained, params, task.test), f"{name}_")
    if ranged:  # it may have moved some variances out of their ranges
        student = _calibrated(student, params, train, validation, newton)

    mode = _embedding(config.train_embeddings, BertConfig.from_folder(config.teacher))
    kept = BertForSequenceClassification(dataclasses.replace(student.config, embedding=mode))
    unfinished(config)
    folders.save(config.out, kept, params, config.teacher, **bits)
    stored = folders.load(config.out).params
    results |= _beside_teacher(student, stored, teacher, teacher_logits, task)
    files.write_json(config.out / "results.json", results)
    files.write_json(config.out / "recipe.json", recipe(config, inputs))
    return results
