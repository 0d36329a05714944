"""Makes a teacher of a pre-trained encoder, and a student of a teacher, each in a folder of its own."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from flaxmpc import files
from flaxmpc.convert import calibrate, contents
from flaxmpc.convert.budget import Budget
from flaxmpc.convert.configs import Conversion, FineTuning
from flaxmpc.convert.distill import Stage, Teacher, distillation_loss, start_student
from flaxmpc.convert.finetune import (
    Evaluate,
    classification_loss,
    computing,
    in_order,
    learn,
    looking_up,
    predict,
    training_lengths,
)
from flaxmpc.convert.head import linear_head
from flaxmpc.convert.runs import alone, done, recipe, run_folder, unfinished
from flaxmpc.convert.search import STEPS, PartNames, near_teacher, search
from flaxmpc.convert.smaller import layers_kept, sizes, smaller_params
from flaxmpc.convert.stage0 import layer_by_layer
from flaxmpc.data import tasks
from flaxmpc.data.batches import SPLITS, Batch, Split, batches
from flaxmpc.data.matching import matched, named, refuse_other_order
from flaxmpc.data.pieces import pieces
from flaxmpc.models import folder as folders
from flaxmpc.models import zoo
from flaxmpc.models.base import TEXTS, TOKENS, WithHead
from flaxmpc.models.config import EncoderConfig
from flaxmpc.models.public import with_public_layers
from flaxmpc.nn.normalization import NORMALIZATIONS, Ranged
from flaxmpc.training import hosts
from flaxmpc.training.metrics import agreement, correct, evaluate, paired_difference

_Config = TypeVar("_Config", bound=FineTuning | Conversion)


def _figures(task: tasks.Task, logits: np.ndarray, prefix: str = "") -> dict[str, float]:
    figures = evaluate(task.metrics, logits, task.test, task.id2label)
    return {prefix + name: value for name, value in figures.items()}


def _bits(hits: np.ndarray) -> str:
    """Writes for results.json which rows are right: "1" for each that is, "0" for every other."""
    return "".join("01"[int(hit)] for hit in hits)


def located(config: _Config) -> _Config:
    """The config with the folder of the model that it starts from, which may be named otherwise, see `zoo.find`."""
    start = "encoder" if isinstance(config, FineTuning) else "teacher"
    return dataclasses.replace(config, **{start: zoo.with_weights(getattr(config, start))})


@alone
def finetune_encoder(config: FineTuning) -> dict[str, Any]:
    """Fine-tunes an encoder, writes the teacher's folder with results.json and recipe.json, and returns the results.

    A run that was killed goes on from its last checkpoint.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: bad data, see `tasks.load`; a run of another config; layers
            that can't be public, see `with_public_layers`.
        FloatingPointError: see `fit`.
    """
    config = located(config)
    encoder = folders.read_config(config.encoder)
    if config.public_layers and not encoder.embedding.client_embeds:
        raise ValueError(f"{config.encoder} has a secret embedding: what follows it can't be public either")
    task = _load_task(config, folders.load_tokenizer(config.encoder), encoder)
    base = folders.load_pretrained(
        config.encoder,
        _head(task),
        seed=config.seed,
        id2label=task.id2label,
        problem_type="regression" if task.regression else "single_label_classification",
        model_max_length=config.max_length,
        num_texts=len(task.text_columns),
        embedding="public",  # which looks ids up
    )
    inputs = {"data": contents.of_task(task), "encoder": contents.of_encoder(base, encoder)}
    if config.public_layers:
        model, params = with_public_layers(base.model, base.params, config.public_layers)
        base = base._replace(model=model, params=params)
    run = run_folder(config, hosts.agreed(inputs))
    params = learn(
        base.model,
        base.params,
        task.train,
        Evaluate(base.model, task.validation, task.metrics),
        config.schedule,
        run / "fine-tuning",
        classification_loss(computing(base.model, config.schedule)),
        train_embeddings=config.train_embeddings,
        seed=config.seed,
    )
    kept = dataclasses.replace(base.model.config, embedding=_embedding(config.train_embeddings, encoder))
    unfinished(config)
    folders.save(config.out, base.model.clone(config=kept), params, config.encoder)
    logits = predict(base.model, params, task.test)
    results: dict[str, Any] = {"test_sentences": len(task.test), **_figures(task, logits)}
    if not task.regression:
        results["correct"] = _bits(correct(logits, task.test.answers))
    _record(config, results, inputs)
    return results


def _head(task: tasks.Task) -> str:
    """The task of the head that is trained, see `WithHead.task`."""
    return TOKENS if task.train.by_token else TEXTS


def _record(config: FineTuning | Conversion, results: dict[str, Any], inputs: contents.Digests) -> None:
    """Writes results.json, and last recipe.json, see `unfinished`."""
    files.write_json(config.out / "results.json", results)
    files.write_json(config.out / "recipe.json", recipe(config, inputs))


def _embedding(trained: bool, start: EncoderConfig) -> str:
    """The mode of an embedding after training: a table that is no published one is secret, as is one made of it."""
    return "secret" if trained or not start.embedding.client_embeds else "public"


def _load_task(config: FineTuning | Conversion, tokenizer: Any, model: EncoderConfig) -> tasks.Task:
    """Reads the data for a model of this config, and prints what is odd about it.

    Raises:
        ValueError: see `tasks.load`; more tokens than the model has positions, or other tokens than it has.
    """
    if config.max_length > model.num_positions:
        raise ValueError(f"max_length is {config.max_length}, but the model has {model.num_positions} positions")
    task = tasks.load(
        config.data, tokenizer, config.max_length, text_columns=config.text_columns, label_column=config.label_column
    )
    for warning in task.warnings:
        print(f"{config.data}: {warning}")
    for split in (getattr(task, name) for name in SPLITS):
        if model.counts_from_padding and any(model.pad_token_id in row for row in split.input_ids):
            raise ValueError(f"{config.data}: a text holds {tokenizer.pad_token}, the padding token")
        for what, rows, known in (
            ("token", split.input_ids, model.vocab_size),
            ("token type", split.token_type_ids or (), model.type_vocab_size),
        ):
            largest = max((int(np.max(row)) for row in rows), default=0)
            if largest >= known > 0:  # a model without token types looks at none
                raise ValueError(f"the tokenizer gives {what} {largest}, but the model has {known}: they do not fit")
    return task


def _beside_teacher(
    student: WithHead,
    params: Any,
    teacher: folders.LoadedModel,
    teacher_logits: np.ndarray,
    task: tasks.Task,
) -> dict[str, Any]:
    """Measures the student on the test set, and how far its figures and labels differ from the teacher's."""
    logits = predict(student, params, task.test)
    if task.regression:
        return _figures(task, logits)
    short = pieces(task.test, 1.0, seed=0)
    theirs = predict(teacher.model, teacher.params, short)
    hits, teacher_hits = (correct(each, task.test.answers) for each in (logits, teacher_logits))
    return {
        **_figures(task, logits),
        "pieces": len(short.answers),
        "pieces_agreement": agreement(predict(student, params, short), theirs),
        **paired_difference(hits, teacher_hits, seed=0)._asdict(),
        "correct": _bits(hits),
        "teacher_correct": _bits(teacher_hits),
    }


def _teacher(config: Conversion) -> folders.LoadedModel:
    """Loads the teacher. ValueError: it gives no single label, of a text or of each token, nor a number."""
    teacher = folders.load(config.teacher)
    if teacher.model.task not in (TEXTS, TOKENS):
        kind = type(teacher.model).__name__
        raise ValueError(f"{config.teacher} holds a {kind}; a student is made of what gives texts, or tokens, labels")
    if teacher.model.config.problem_type == "multi_label_classification":
        raise ValueError(
            f"{config.teacher} gives a text several labels; a student of one label, or of a number, is made"
        )
    return teacher._replace(model=looking_up(teacher.model))


def _encoder(teacher: Path) -> dict[str, str]:
    """For results.json: the encoder that a teacher was made of, as its folder says it. Empty: it does not."""
    for file in ("recipe.json", "results.json"):
        path = teacher / file
        found = files.read_object(path).get("encoder") if path.is_file() else None
        if isinstance(found, str):
            return {"encoder": found}
    return {}


class _Material(NamedTuple):
    """What a conversion learns from.

    Attributes:
        task: the data, with the teacher's ids of the labels.
        by_name: whether these ids were matched by the names of the labels, or are those of a regression.
        train, validation: the rows of these splits, and pieces of them.
        everything: the rows of `train`, and the texts without labels.
        inputs: the digests of the data and of the teacher.
    """

    task: tasks.Task
    by_name: bool
    train: Split
    validation: Split
    everything: Split
    inputs: contents.Digests


def _material(config: Conversion, teacher: folders.LoadedModel) -> _Material:
    """The data of a conversion.

    Raises:
        ValueError: see `_load_task` and `matched`; or rows of another number of texts than the teacher answers.
    """
    own = teacher.model.config
    loaded = _load_task(config, teacher.tokenizer, own)
    if loaded.train.by_token != (teacher.model.task == TOKENS):
        has = "tags of words" if loaded.train.by_token else "labels of texts"
        raise ValueError(f"{config.data} has {has}, but {config.teacher} is for {teacher.model.task}")
    task = matched(loaded, own.id2label, str(config.teacher))
    num_texts = len(task.text_columns)
    if own.num_texts not in (None, num_texts):
        raise ValueError(f"{config.teacher} answers {own.num_texts} text(s) at a time, {config.data} has {num_texts}")
    train, validation = (
        split + pieces(split, config.pieces, seed=config.seed) for split in (task.train, task.validation)
    )
    everything = train
    inputs = {"data": contents.of_task(task), "teacher": contents.of_model(teacher)}
    if config.unlabelled is not None:
        more = tasks.unlabelled(config.unlabelled, task, teacher.tokenizer, config.max_length)
        everything += more
        inputs["unlabelled texts"] = contents.of_split(more)
    by_name = task.regression or (named(own.id2label) and named(loaded.id2label))
    return _Material(task, by_name, train, validation, everything, inputs)


def _replaced(config: Conversion, own: EncoderConfig, layers: Sequence[int]) -> EncoderConfig:
    """The config of a teacher of which `layers` are kept, with the student's sizes, attention and activation.

    Raises:
        ValueError: see `sizes`; an unknown part; embeddings to train that public layers read; scores to match, with
            others than the teacher's; a teacher whose layers share scores; or a budget where all layers are public.
    """
    if own.layers_sharing_scores > 1:
        raise ValueError(f"{config.teacher} has layers that share scores: convert the model that it was made of")
    if config.budget is not None and not own.num_hidden_layers:
        raise ValueError(f"{config.teacher} has no layer whose parts a budget could choose: all of them are public")
    if config.train_embeddings and own.public_layers is not None:
        raise ValueError(f"{config.teacher} has public layers, which read its embeddings: these can't be trained")
    fields = sizes(own, layers, config.num_attention_heads, config.intermediate_size)
    fields["layers_sharing_scores"] = 1 if config.layers_sharing_scores is None else config.layers_sharing_scores
    for name, stage in (("stage1", config.stage1), ("stage2", config.stage2)):
        for field in ("num_attention_heads", "layers_sharing_scores"):
            if stage.score_weight and fields[field] != getattr(own, field):
                raise ValueError(
                    f"{name} has score_weight {stage.score_weight:g}, and scores are matched head by head in every "
                    f"layer: {field} can only be {getattr(own, field)} then, the teacher's"
                )
    return dataclasses.replace(own, **fields, attention=config.attention, hidden_act=config.activation)


def _norms(names: str | Sequence[str], num_layers: int) -> calibrate.Norms:
    """The normalisations of a student, from a name for all, two, or two for every layer.

    Raises:
        ValueError: another number of names, or an unknown one.
    """
    listed = (names, names) if isinstance(names, str) else tuple(names)
    if len(listed) == 2:
        listed *= num_layers
    if len(listed) != 2 * num_layers:
        raise ValueError(
            f"layer_norm names {len(listed)} parts: one, two (after attention, after the feed-forward), or two for "
            f"each of the {num_layers} layers"
        )
    return {divmod(i, 2): NORMALIZATIONS.resolve(name) for i, name in enumerate(listed)}


def _calibrated(student: WithHead, params: Any, material: _Material, norms: calibrate.Norms) -> WithHead:
    """The student with LayerNorms for the variances of what is trained on, see `calibrate.with_calibrated`."""
    finite = student.clone(config=calibrate.for_training(student.config))
    most = student.config.num_positions
    splits = (material.train, material.validation)
    seen, held_out = (calibrate.variances(finite, params, in_order(split, most=most)) for split in splits)
    return student.clone(config=calibrate.with_calibrated(student.config, seen, held_out, norms))


def _refuse_other_order(config: Conversion, teacher: folders.LoadedModel, train: Split) -> None:
    """ValueError: on some rows of `train` the teacher's labels stand in another order, see `refuse_other_order`."""
    some = train[np.linspace(0, len(train) - 1, min(len(train), 256)).astype(int)]
    logits = predict(teacher.model, teacher.params, some)
    refuse_other_order(logits, some.answers, f"{config.teacher} on {config.data}")


def _searched(
    config: Conversion,
    teacher: folders.LoadedModel,
    replaced: EncoderConfig,
    material: _Material,
    layers: Sequence[int],
    seen: Mapping[calibrate.Place, np.ndarray],
    run: Path,
) -> PartNames:
    """The parts that a search chose within the budget, once for a run: search.json in its folder keeps what it found.

    Raises:
        ValueError: see `search`; search.json is damaged; or there are several hosts, which could choose differently.
    """
    if jax.process_count() > 1:
        raise ValueError("a budget is for one host: convert there for a budget, or name the parts for several hosts")
    path = run / "search.json"
    budget = Budget.parse(config.budget or "")
    if not path.is_file():
        student = teacher.model.clone(config=replaced)
        found = search(teacher, student, layers, seen, material.train, material.validation, budget, seed=config.seed)
        files.write_json(path, found.as_dict(budget))
    mend = "remove it, and the parts are searched again"
    return PartNames.read(files.read_object(path, mend=mend), len(layers), f"{path} is damaged: {mend}")


def _storage(config: Conversion) -> dict[str, int]:
    """How many bits the weights are stored with, for `folders.save`."""
    return {"word_embedding_bits": config.word_embedding_bits, "matrix_bits": config.matrix_bits}


def _start(
    config: Conversion,
    student: WithHead,
    teacher: folders.LoadedModel,
    layers: Sequence[int],
    run: Path,
    some: Sequence[Batch],
    material: _Material,
    ranges: calibrate.Ranges | None,
) -> dict[str, Any]:
    """The parameters that a student starts from: the teacher's in its size, its own attention calibrated on a batch,
    brought near the teacher on some of the rows, if the config says so.

    They go through a folder and back: the student starts with, and keeps, the embeddings as they will be stored.
    """
    given = smaller_params(teacher.model, teacher.params, student.config, layers, some)
    folders.save(run / "start", student, start_student(student, given), config.teacher, **_storage(config))
    params = calibrate.calibrate_attention(student, folders.load(run / "start").params, some[0])
    if not (count := config.least_squares_rows):
        return params
    rows = _drawn(material, count, config.seed)
    return layer_by_layer(
        student, params, teacher, layers, rows, ranges, config.stage0, run / "stage0", seed=config.seed
    )


def _drawn(material: _Material, count: int, seed: int) -> Split:
    """So many rows, of the task's own where there are as many; or all there are."""
    rows = material.train if count <= len(material.train) else material.everything
    return rows[np.sort(np.random.default_rng(seed).choice(len(rows), min(count, len(rows)), replace=False))]


_Stages = Callable[[str, WithHead, Any, Split], tuple[dict[str, Any], dict[str, float]]]


def _stages(
    config: Conversion,
    teacher: folders.LoadedModel,
    material: _Material,
    layers: Sequence[int],
    ranges: calibrate.Ranges | None,
    run: Path,
) -> _Stages:
    """Makes what distils: (the stage's name, student, its parameters, rows) -> parameters, and figures on the test set.

    The name is "stage1" or "stage2". A stage that looks at labels is trained on the task's rows alone: pieces and
    unlabelled texts have no labels.

    Args:
        config: says how long each stage is, and what its losses weigh.
        teacher: the model whose outputs are matched.
        material: what is learned from.
        layers: the teacher's layers that the student's are matched with, in their order.
        ranges: the ranges that the LayerNorms' variances are to stay in; None: any.
        run: the folder of the checkpoints, of each stage in a folder of its own.
    """
    wanted = [stage for stage in (config.stage1, config.stage2) if stage.epochs]
    answers = Teacher(
        teacher.model,
        teacher.params,
        material.everything,
        with_states=any(stage.hidden_weight for stage in wanted),
        with_scores=any(stage.score_weight for stage in wanted),
        layers=layers,
        memory=config.teacher_memory * 1e9,
    )
    task = material.task

    def distilled(name: str, student: WithHead, params: Any, train: Split) -> tuple[dict[str, Any], dict[str, float]]:
        stage: Stage = getattr(config, name)
        trained = student.clone(config=calibrate.for_training(student.config))
        params = learn(
            trained,
            params,
            task.train if stage.label_weight else train,
            Evaluate(trained, task.validation, task.metrics),
            stage,
            run / name,
            distillation_loss(computing(trained, stage), stage, ranges, name=name),
            prepare=answers,
            train_embeddings=config.train_embeddings,
            seed=config.seed,
        )
        return params, _figures(task, predict(trained, params, task.test), f"{name}_")

    return distilled


@alone
def convert(config: Conversion) -> dict[str, Any]:
    """Makes a student: replaces, calibrates, distils, evaluates in the clear, and writes the folder and its results.

    A run that was killed goes on from its last checkpoint; what is done already is returned. `flaxmpc.convert.evaluate`
    then adds what the student does with longer texts and under MPC, and the card.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: an unknown part, or bad data, see `tasks.load`; a teacher with
            other labels than the data; a run of another config, or from other data or weights.
        FloatingPointError: see `fit`.
    """
    config = located(config)
    teacher = _teacher(config)
    own = teacher.model.config
    layers = layers_kept(own.num_hidden_layers, config.num_hidden_layers, config.kept_layers)
    replaced = _replaced(config, own, layers)
    norms = _norms(config.layer_norm, len(layers))
    material = _material(config, teacher)
    task = material.task
    if hosts.from_first(np.bool_(done(config, hosts.agreed(material.inputs)))):
        again = "remove it, and the model is finished again from its checkpoints"
        return files.read_object(config.out / "results.json", mend=again) if hosts.first() else {}
    run = run_folder(config, material.inputs)
    teacher_logits = predict(teacher.model, teacher.params, task.test)
    if not material.by_name:
        _refuse_other_order(config, teacher, task.train)
    results: dict[str, Any] = {**_encoder(teacher.folder), "test_sentences": len(task.test)}
    results |= _figures(task, teacher_logits, "teacher_")

    answers = {"id2label": task.id2label, "model_max_length": config.max_length, "num_texts": len(task.text_columns)}
    padded = training_lengths(config.stage1, own.num_positions)
    some = list(itertools.islice(batches(task.train, batch_size=64, lengths=padded, seed=config.seed), 8))
    met = calibrate.variances(teacher.model, teacher.params, some)
    seen = {(i, place): met[layer, place] for i, layer in enumerate(layers) for place in (0, 1)}
    replaced = dataclasses.replace(replaced, **answers)
    if config.budget is not None:
        found = _searched(config, teacher, replaced, material, layers, seen, run)
        replaced = dataclasses.replace(replaced, attention=found.attention, hidden_act=found.activation)
        norms = _norms(found.layer_norm, len(layers))
    replaced = calibrate.with_norms(replaced, seen, norms)
    student = teacher.model.clone(config=replaced)
    ranged = any(isinstance(norm, Ranged) for norm in norms.values())
    ranges = calibrate.ranges(seen) if ranged else None
    params = _start(config, student, teacher, layers, run, some, material, ranges)
    if config.budget is not None and not config.least_squares_rows:
        params = near_teacher(student, params, teacher, layers, material.train, seed=config.seed, steps=STEPS)
    results |= _figures(task, predict(student, params, task.test), "untrained_")

    distilled = _stages(config, teacher, material, layers, ranges, run)
    params, figures = distilled("stage1", student, params, material.everything)
    results |= figures
    if ranged:  # the last stage trains the very function that will run
        student = _calibrated(student, params, material, norms)
    params, figures = distilled("stage2", student, params, material.train)
    results |= figures
    if ranged:  # it may have moved some variances out of their ranges
        student = _calibrated(student, params, material, norms)
    student, params, results["linear_head_error"] = linear_head(
        student, params, material.everything, material.validation
    )

    mode = _embedding(config.train_embeddings, folders.read_config(config.teacher))
    kept = student.clone(config=dataclasses.replace(student.config, embedding=mode))
    unfinished(config)
    folders.save(config.out, kept, params, config.teacher, **_storage(config))
    stored = folders.load(config.out).params
    results |= _beside_teacher(student, stored, teacher, teacher_logits, task)
    _record(config, results, material.inputs)
    return results
