"""Measures a trained model on a whole test set: at every length in the clear, and under MPC."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from flaxmpc import files, secure
from flaxmpc.convert import card
from flaxmpc.convert.finetune import predict
from flaxmpc.data import tasks
from flaxmpc.data.batches import Split
from flaxmpc.data.lengths import bucketed, repeated
from flaxmpc.data.matching import matched
from flaxmpc.errors import brief
from flaxmpc.files import claimed
from flaxmpc.models import folder as folders
from flaxmpc.models import zoo
from flaxmpc.models.config import MOST_POSITIONS
from flaxmpc.serve import plans
from flaxmpc.serve.answers import wrong
from flaxmpc.serve.classify import Client, buckets
from flaxmpc.serve.private import SecureClassifier, check_encoded
from flaxmpc.training import metrics


def secure_logits(
    classifier: SecureClassifier, split: Split, batch_size: int, description: str = ""
) -> tuple[np.ndarray, np.ndarray, secure.Cost]:
    """Computes the logits (answer, label) of a split on shares and in the clear. Returns both, and a run's cost.

    Those on shares are NaN where `infer` would give no answer, see `flaxmpc.serve.answers.wrong`.
    """
    secret, plain, cost = {}, {}, None
    runs = list(classifier.runs(split, range(len(split)), lambda _: [batch_size]))
    for run in track(runs, description):
        found = classifier.answer(run)
        cost = found.cost
        for row, place in enumerate(run.places):
            ours, theirs = (split.logits_of(place, each[row]) for each in (found.secret, found.plain))
            secret[place], plain[place] = np.where(wrong(ours, theirs) is None, ours, np.nan), theirs
    assert cost is not None, "a split is never empty"
    rows = range(len(split))
    return np.concatenate([secret[row] for row in rows]), np.concatenate([plain[row] for row in rows]), cost


def evaluate(
    folder: Path,
    *,
    teacher: Path | None = None,
    ref2k_sentences: int | None = None,
    aby3_sentences: int = 100,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Measures a converted model on the test set of its recipe.json, and writes results.json and the card.

    First in the clear, at every length: a bucket in which a logit is not finite, and those above it, are not for this
    model. Its config.json gets the longest below as `model_max_length`, at which texts are cut from there on. Then in
    REF2K, the fixed-point arithmetic that the secure protocols compute in, fast enough for a whole test set, and in
    ABY3, three parties; both by the plan of bits, if the folder has one.

    Args:
        folder: the folder that `convert` wrote.
        teacher: the folder of the model whose labels it is compared with at every length; None: with nobody's.
        ref2k_sentences, aby3_sentences: how many rows of the test set, evenly spread; None: all; 0: none.
        batch_size: how many sentences are in one secure run.

    Raises:
        FileNotFoundError: the folder has no recipe.json.
        ValueError: another run writes to the folder, a file in it is damaged, or a recipe that does not say which
            data; see `flaxmpc.models.folder.load`, `tasks.load`.
        FloatingPointError: a logit is not finite for texts of the shortest bucket already.
        secure.OverflowRisk: fewer than 2 bits are left between the model's numbers and the fixed point's largest.
    """
    recipe = _recipe(folder / "recipe.json")
    with claimed(folder):
        loaded = folders.load(folder)
        results = zoo.results(folder)
        measured, results["lengths"] = _at_every_length(
            loaded, _task(loaded, recipe, recipe["max_length"]).test, recipe["max_length"], teacher
        )
        loaded = _answering(loaded, _longest(folder, results["lengths"]))
        task = _task(loaded, recipe, loaded.model.config.longest)
        results |= _margin(loaded, task.validation)
        for protocol, count in (("REF2K", ref2k_sentences), ("ABY3", aby3_sentences)):
            rows = spread(len(task.test), count)
            if not len(rows):
                continue
            split = task.test[rows]
            parties = plans.parties(folder, protocol)
            classifier = SecureClassifier(loaded, parties)
            secret, plain, cost = secure_logits(classifier, split, batch_size, protocol)
            figures = {"sentences": len(rows), **metrics.evaluate(task.metrics, secret, split, task.id2label)}
            figures["agreement"] = metrics.agreement(secret, plain)
            figures["max_logit_difference"] = _largest_difference(secret, plain)
            results |= {f"{protocol.lower()}_{name}": value for name, value in figures.items()}
            results["planned"] = plans.follows(folder, parties.config)
            results |= {"versions": cost.versions, "machine": cost.machine, "date": cost.date}
            if protocol == "REF2K":
                for record in results["lengths"]:
                    if record["length"] <= loaded.model.config.longest:
                        rows = measured[record["length"]]
                        rows = rows[spread(len(rows), 2 * batch_size)]
                        secret, plain, _ = secure_logits(classifier, rows, batch_size, f"{record['length']} tokens")
                        record |= {"ref2k_rows": len(rows), "ref2k_agreement": metrics.agreement(secret, plain)}
        files.write_json(folder / "results.json", results)
        card.write(folder)
        return results


# The fields of a recipe that say which texts a model is measured on, and whether a value may be theirs.
_OF_DATA: Mapping[str, Callable[[Any], bool]] = {
    "data": lambda value: isinstance(value, str),
    "label_column": lambda value: isinstance(value, str),
    "text_columns": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "max_length": lambda value: isinstance(value, int) and 0 < value <= MOST_POSITIONS,
}


def _recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: it says which data the model is measured on")
    recipe = files.read_object(path)
    for field, right in _OF_DATA.items():
        if not right(recipe.get(field)):
            raise ValueError(f"{path} has {field} {brief(recipe.get(field))}, as no recipe of `flaxmpc convert` has")
    return recipe


def _task(loaded: folders.LoadedModel, recipe: dict[str, Any], max_length: int) -> tasks.Task:
    """Reads the data of a recipe, with the model's own ids of the labels, cut at `max_length` tokens."""
    columns = {name: recipe[name] for name in ("text_columns", "label_column")}
    task = tasks.load(recipe["data"], loaded.tokenizer, max_length, **columns)
    return matched(task, loaded.model.config.id2label, str(loaded.folder))


def _at_every_length(
    loaded: folders.LoadedModel, test: Split, max_length: int, teacher: Path | None
) -> tuple[dict[int, Split], list[dict[str, Any]]]:
    """Measures a model in the clear in each length bucket. Returns the rows, and the record, of each that has rows."""
    exact = None if teacher is None else folders.load(teacher)
    rows, records = {}, []
    for length, (split, joined) in bucketed(test, loaded.tokenizer, buckets(max_length)).items():
        if not len(split):
            continue
        rows[length] = split
        logits = predict(loaded.model, loaded.params, split)
        words = repeated(test, loaded.tokenizer, length)
        probes = predict(loaded.model, loaded.params, words)
        record: dict[str, Any] = {
            "length": length,
            "rows": len(split),
            "joined": joined,
            "finite": _finite(split, logits),
        }
        record |= {"repeated": len(words), "repeated_finite": _finite(words, probes)}
        if exact is not None and logits.shape[-1] > 1:
            record["teacher_agreement"] = metrics.agreement(logits, predict(exact.model, exact.params, split))
        records.append(record)
    return rows, records


def _finite(split: Split, logits: np.ndarray) -> int:
    """How many rows have finite logits alone."""
    rows = np.split(np.isfinite(logits).all(-1), np.cumsum(split.sizes)[:-1])
    return sum(bool(row.all()) for row in rows)


def _longest(folder: Path, records: Sequence[dict[str, Any]]) -> int:
    """The longest bucket up to which every row is finite. FloatingPointError: not even the first is."""
    finite = list(itertools.takewhile(lambda record: record["finite"] == record["rows"], records))
    if not finite:
        first = records[0]
        raise FloatingPointError(
            f"{folder} has logits that are not finite for {first['rows'] - first['finite']} of {first['rows']} texts "
            f"of up to {first['length']} tokens: with --layer-norm layer_norm, or more epochs, it may do"
        )
    return finite[-1]["length"]


def _answering(loaded: folders.LoadedModel, longest: int) -> folders.LoadedModel:
    """Gives the model another `model_max_length`, in its folder too."""
    config = dataclasses.replace(loaded.model.config, model_max_length=longest)
    path = loaded.folder / "config.json"
    stored = files.read_object(path)
    if stored.get("model_max_length") != longest:
        files.write_json(path, {**stored, "model_max_length": longest})
    return loaded._replace(model=type(loaded.model)(config))


def _largest_difference(secret: np.ndarray, plain: np.ndarray) -> float:
    """The largest difference of logits (row, label), over the rows that are finite in both."""
    finite = np.isfinite(secret).all(-1) & np.isfinite(plain).all(-1)
    return float(np.abs(secret[finite] - plain[finite]).max(initial=0.0))


# How many sentences are looked at for large numbers before a model runs in fixed point; the bits that must be left.
_CHECKED, _MARGIN = 200, 2.0


def _margin(loaded: folders.LoadedModel, split: Split) -> dict[str, Any]:
    rows = split[spread(len(split), _CHECKED)]
    runs = Client(loaded.model, loaded.tokenizer, {}).runs(rows, range(len(rows)), lambda _: [1])
    margins = check_encoded(loaded, ((run.ids, run.mask, run.types) for run in runs))
    margins.require(_MARGIN)
    return {"margin_bits": margins.margin_bits, "margin_sentences": len(rows), "margin_worst": str(margins.worst)}


def spread(total: int, count: int | None) -> np.ndarray:
    """Places of `count` rows of `total`, evenly spread; all for None."""
    if count is None or count >= total:
        return np.arange(total)
    return np.linspace(0, total - 1, count).astype(int)
