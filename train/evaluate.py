"""Measures a zoo model three times: in the clear, under REF2K on the whole test set, under ABY3 on a sample.

    python train/evaluate.py movie-minilm-l6-2quad-freediv

Adds to models/NAME/results.json: accuracy, ref2k_accuracy, the shares of labels that are as in the clear
(ref2k_agreement, aby3_agreement), the largest differences of a logit, and what made the figures. Shares and
accuracies are fractions. On 2 cores about ten minutes.
"""

import json
from typing import Annotated

import numpy as np
import tyro
from rich.progress import track

from flaxmpc import secure
from flaxmpc.convert.data import movie_sentences
from flaxmpc.convert.metrics import accuracy
from flaxmpc.inference import Prediction, SecureClassifier
from flaxmpc.models import folder as folders
from flaxmpc.models import zoo


def predictions(
    loaded: folders.LoadedModel, protocol: str, sentences: list[str], batch_size: int
) -> tuple[list[Prediction], secure.Cost]:
    """All sentences, in batches of about one length; in their order, and the cost of the last batch."""
    classifier = SecureClassifier(loaded, secure.InProcess(protocol))
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i].split()))
    found: dict[int, Prediction] = {}
    costs = []
    for start in track(range(0, len(order), batch_size), description=protocol):
        members = order[start : start + batch_size]
        batch, cost = classifier.classify([sentences[i] for i in members])
        found |= dict(zip(members, batch, strict=True))
        costs.append(cost)
    return [found[i] for i in range(len(sentences))], costs[-1]


def main(
    name: Annotated[str, tyro.conf.Positional] = zoo.DEFAULT, aby3_sentences: int = 100, batch_size: int = 16
) -> None:
    """Measures, prints and saves.

    Args:
        name: the zoo model.
        aby3_sentences: how many of the test set, evenly spread, are run under ABY3.
        batch_size: sentences in one secure run.
    """
    folder = zoo.find(name)
    loaded = folders.load(folder)
    test = movie_sentences()["test"]
    sentences, labels = list(test["sentence"]), np.asarray(test["label"])
    sample = np.linspace(0, len(sentences) - 1, aby3_sentences).astype(int)
    results = zoo.results(folder)
    for protocol, chosen in (("REF2K", np.arange(len(sentences))), ("ABY3", sample)):
        found, cost = predictions(loaded, protocol, [sentences[i] for i in chosen], batch_size)
        logits = np.array([prediction.logits for prediction in found])
        plain = np.array([prediction.logits_plaintext for prediction in found])
        key = protocol.lower()
        results[f"{key}_sentences"] = len(chosen)
        results[f"{key}_accuracy"] = accuracy(logits, labels[chosen])
        results[f"{key}_agreement"] = float((logits.argmax(-1) == plain.argmax(-1)).mean())
        results[f"{key}_max_logit_difference"] = float(np.abs(logits - plain).max())
        if protocol == "REF2K":
            results["test_sentences"] = len(sentences)
            results["accuracy"] = accuracy(plain, labels)
        results |= {"versions": cost.versions, "machine": cost.machine, "date": cost.date}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
