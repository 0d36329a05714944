"""Texts unlike those of a model's data, on shares: who gets a right answer, none, or a wrong one that nobody notices.

    python benchmarks/outliers.py [--json] [--show] [--quick]

The zoo's default model with 18 fraction bits everywhere, and by its plan of bits, in REF2K, whose arithmetic is the
protocols'. As on a cluster, a client has nothing but what is opened: an answer is none where the strain says that
the model diverged. `diverged`: of so many texts a logit in the clear is not finite. `unnoticed`: so many answers have a
logit that is off by 0.3 or more. About 10 minutes on 2 cores.
"""

import functools
import operator
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from harness import Benchmark, Options, Record, model_parties, record

from flaxmpc import secure
from flaxmpc.data.batches import movie_sentences
from flaxmpc.models import folder as folders
from flaxmpc.models import zoo
from flaxmpc.serve.private import answered, private_classifier

_WRONG = 0.3
_TIMES = (2, 5, 10, 20, 40, 60)
_TOGETHER = 8  # texts of one run


class Source:
    """Words and sentences to make texts of, by chance."""

    def __init__(self, words: Sequence[str], sentences: Sequence[str], seed: int):
        self._random, self._words, self._sentences = random.Random(seed), words, sentences

    def words(self, count: int) -> list[str]:
        return self._random.choices(self._words, k=count)

    def sentences(self, count: int) -> list[str]:
        return self._random.choices(self._sentences, k=count)

    @property
    def times(self) -> int:
        return self._random.choice(_TIMES)


KINDS: Mapping[str, Callable[[Source], list[str]]] = {
    "one word, up to 60 times": lambda source: source.words(1) * source.times,
    "two words in turn": lambda source: source.words(2) * (source.times // 2),
    "up to 60 words by chance": lambda source: source.words(source.times),
    "a review's sentence, then one word many times": lambda source: (
        source.sentences(1) + source.words(1) * source.times
    ),
    "three reviews' sentences": lambda source: source.sentences(3),
}


def measure(kind: str, count: int, fraction_bits: int) -> Record:
    loaded, parties = folders.load(zoo.find(zoo.DEFAULT)), model_parties("REF2K", fraction_bits=fraction_bits)
    vocabulary = sorted(word for word in loaded.tokenizer.get_vocab() if word.isalpha())
    source = Source(vocabulary, list(movie_sentences()["test"]["sentence"]), seed=0)
    texts = [" ".join(KINDS[kind](source)) for _ in range(count)]

    found = private_classifier(loaded, parties.config, checked=True)
    client, weights = found.client(loaded.tokenizer), parties.put(found.weights)
    on_shares, plain = secure.jit(found.function, parties=parties), jax.jit(found.model.apply)
    encoded, costs = client.encode(texts), []
    ours, theirs = [], []
    for run in client.runs(encoded, range(count), lambda _: [_TOGETHER]):
        outputs, cost = on_shares.run(weights, *client.share(run.ids, run.mask, run.types))
        logits = answered(*client.opened(jax.tree.leaves(outputs)))
        ours.append(logits[: len(run.places)])
        theirs.append(plain({"params": loaded.params}, jnp.asarray(run.ids), jnp.asarray(run.mask))[: len(run.places)])
        costs.append(cost)
    secret, clear = np.concatenate(ours), np.concatenate(theirs)
    given, diverged = np.isfinite(secret).all(-1), ~np.isfinite(clear).all(-1)
    off = np.where(diverged, np.inf, np.abs(secret - np.where(np.isfinite(clear), clear, 0.0)).max(-1))
    return record(
        functools.reduce(operator.add, costs),
        texts=kind,
        count=count,
        diverged=int(diverged.sum()),
        right=int((given & (off < _WRONG)).sum()),
        none=int((~given).sum()),
        unnoticed=int((given & (off >= _WRONG)).sum()),
    )


def jobs(quick: bool) -> Iterator[tuple[str, Callable[[], Record]]]:
    for fraction_bits in (18,) if quick else (18, secure.FRACTION_BITS):
        for kind in list(KINDS)[:1] if quick else KINDS:
            yield f"{fraction_bits} bits, {kind}", partial(measure, kind, 2 if quick else 160, fraction_bits)


def benchmark(quick: bool) -> Benchmark:
    columns = ("fraction_bits", "texts", "count", "diverged", "right", "none", "unnoticed")
    return Benchmark("outliers", partial(jobs, quick), (columns,))


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    benchmark(chosen.quick).run(chosen)
