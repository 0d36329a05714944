"""What a trained model does under MPC, on a whole test set: beside what it does in the clear."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from flaxmpc import secure
from flaxmpc.client import buckets
from flaxmpc.convert import card, metrics, tasks
from flaxmpc.convert.data import Split, collate, plan
from flaxmpc.inference import SecureClassifier, check_encoded
from flaxmpc.models import folder as folders
from flaxmpc.models import zoo


def secure_logits(
    classifier: SecureClassifier, split: Split, batch_size: int, description: str = ""
) -> tuple[np.ndarray, np.ndarray, secure.Cost]:
    """The logits (row, label) of a split on shares and in the clear, and the cost of the last run."""
    shape = (len(split), classifier.config.num_labels)
    secret, plain, cost = np.zeros(shape, np.float32), np.zeros(shape, np.float32), None
    for members in track(plan(split, batch_size=batch_size, lengths=classifier.lengths), description):
        batch = collate(split, members, batch_size=batch_size, pad_token_id=classifier.config.pad_token_id)
        types = None if split.token_type_ids is None else batch.token_type_ids
        found = classifier.logits(batch.input_ids, batch.attention_mask, types)
        rows, cost = members.rows, found.cost
        secret[rows], plain[rows] = found.secret[: len(rows)], found.plain[: len(rows)]
    assert cost is not None, "a split is never empty"
    return secret, plain, cost


def _agreement(secret: np.ndarray, plain: np.ndarray) -> float:
    """The share of equal labels; of a regression, of scores within 0.05. A row that diverged in the clear has none."""
    if plain.shape[-1] == 1:
        return float((np.abs(secret - plain)[:, 0] < 0.05).mean())
    return metrics.accuracy(plain, secret.argmax(-1))


def evaluate(
    folder: Path, *, ref2k_sentences: int | None = None, aby3_sentences: int = 100, batch_size: int = 16
) -> dict[str, Any]:
    """Measures a converted model on the test set of its recipe.json, and writes results.json and the card.

    REF2K is the fixed-point arithmetic that the secure protocols compute in, fast enough for a whole test set; ABY3
    is three parties.

    Args:
        folder: that `convert` wrote.
        ref2k_sentences, aby3_sentences: how many of the test set, evenly spread; None: all; 0: none.
        batch_size: sentences in one secure run.

    Raises:
        FileNotFoundError: the folder has no recipe.json.
        secure.OverflowRisk: fewer than 2 bits are left between the model's numbers and the fixed point's largest.
    """
    path = folder / "recipe.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: it says which data the model is measured on")
    recipe = json.loads(path.read_text("utf-8"))
    loaded = folders.load(folder)
    task = tasks.load(
        recipe["data"],
        loaded.tokenizer,
        recipe["max_length"],
        text_columns=recipe["text_columns"],
        label_column=recipe["label_column"],
    )
    results = zoo.results(folder)
    results |= _margin(loaded, task.validation)
    for protocol, count in (("REF2K", ref2k_sentences), ("ABY3", aby3_sentences)):
        rows = spread(len(task.test), count)
        if not len(rows):
            continue
        split = task.test[rows]
        classifier = SecureClassifier(loaded, secure.InProcess(protocol))
        secret, plain, cost = secure_logits(classifier, split, batch_size, protocol)
        key = protocol.lower()
        results[f"{key}_sentences"] = len(rows)
        results |= {f"{key}_{name}": value for name, value in _figures(task.metrics, secret, split).items()}
        results[f"{key}_agreement"] = _agreement(secret, plain)
        results[f"{key}_max_logit_difference"] = float(np.abs(secret - plain).max())
        results |= {"versions": cost.versions, "machine": cost.machine, "date": cost.date}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    card.write(folder)
    return results


# Sentences whose largest numbers are looked at before a model runs in fixed point, and the bits that must be left.
_CHECKED, _MARGIN = 200, 2.0


def _margin(loaded: folders.LoadedModel, split: Split) -> dict[str, Any]:
    """The margin to overflow on validation rows, each a run of its own, so that padding is as it will be."""
    rows = split[spread(len(split), _CHECKED)]
    lengths = buckets(loaded.model.config.max_position_embeddings)
    found = (collate(rows, members, batch_size=1) for members in plan(rows, batch_size=1, lengths=lengths))
    types = (lambda batch: None) if split.token_type_ids is None else (lambda batch: batch.token_type_ids)
    margins = check_encoded(loaded, ((batch.input_ids, batch.attention_mask, types(batch)) for batch in found))
    margins.require(_MARGIN)
    return {"margin_bits": margins.margin_bits, "margin_sentences": len(rows), "margin_worst": str(margins.worst)}


def spread(total: int, count: int | None) -> np.ndarray:
    """Places of `count` rows of `total`, evenly spread; all for None."""
    if count is None or count >= total:
        return np.arange(total)
    return np.linspace(0, total - 1, count).astype(int)


def _figures(names: Sequence[str], logits: np.ndarray, split: Split) -> dict[str, float]:
    return metrics.evaluate(names, logits, split.labels)
