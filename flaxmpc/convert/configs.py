"""What the commands `finetune` and `convert` are told: which data, which parts, how long, and where to write."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from flaxmpc.convert.budget import Budget
from flaxmpc.convert.distill import Stage
from flaxmpc.nn.activation import ACTIVATIONS
from flaxmpc.nn.attention import ATTENTION
from flaxmpc.nn.normalization import NORMALIZATIONS
from flaxmpc.nn.parts import Registry
from flaxmpc.training.fit import Schedule


def _of(registry: Registry[Any], metavar: str) -> Any:
    """The help of an option that names parts: those that are registered when the help is asked for."""
    return tyro.conf.arg(
        metavar=metavar, help_behavior_hint=lambda default: f"(of {', '.join(registry)}; default: {default})"
    )


_MODEL = tyro.conf.arg(metavar="NAME|FOLDER")


def _require_length(max_length: int) -> None:
    if max_length < 3:
        raise ValueError(f"max_length must be at least 3, [CLS], a token and [SEP], not {max_length}")


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """Says how a teacher is made: a pre-trained encoder, fine-tuned on labelled sentences.

    Attributes:
        encoder: a folder with a pre-trained BERT, HF's or ours, or its name on the hub, OWNER/NAME or
            OWNER/NAME@REVISION: the hub learns which one it is, and no text.
        data: `movie` (the shipped sentences), a GLUE task (cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli; from
            the hub, or TASK=FOLDER), or a file or folder of CSV, JSONL, CoNLL, Parquet or Arrow.
        out: the folder to write.
        schedule: how long and how fast it is trained.
        max_length: the number of tokens that a text is cut at.
        train_embeddings: also train the embeddings; then they are secret under MPC, and cost more.
        public_layers: so many of the first layers stay the published encoder's, as the embeddings do. They are then
            public: under MPC the client computes them in the clear, and the rest costs less. A student keeps them.
        text_columns: the data's columns of text, one, or two for pairs; by default the usual names.
        label_column: the data's column of labels.
        seed: the seed of the head, the order of the sentences, and dropout.
        runs: the folder of checkpoints and metrics; by default OUT.run, beside OUT.
    """

    encoder: Annotated[str | Path, _MODEL]
    data: str
    out: Path
    schedule: Schedule = Schedule(epochs=3, learning_rate=5e-5)
    max_length: int = 64
    train_embeddings: bool = False
    public_layers: int | None = None
    text_columns: tuple[str, ...] = ()
    label_column: str = "label"
    seed: int = 0
    runs: Path | None = None

    def __post_init__(self):
        _require_length(self.max_length)
        if self.train_embeddings and self.public_layers:
            raise ValueError("train_embeddings makes them secret, and public_layers read them: give one of the two")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Says how a student is made: a fine-tuned teacher, with parts replaced, distilled in two stages.

    Attributes:
        teacher: the folder of a fine-tuned classifier, HF's or ours, or its name on the hub, OWNER/NAME or
            OWNER/NAME@REVISION: the hub learns which one it is, and no text.
        data: the data that the teacher was fine-tuned on: `movie`, a GLUE task (cola, sst2, mrpc, qqp, stsb, mnli,
            qnli, rte, wnli; from the hub, or TASK=FOLDER), or a file or folder of CSV, JSONL, CoNLL, Parquet or Arrow.
        out: the folder to write: config.json, weights, tokenizer, results.json, recipe.json and a card.
        attention: the student's attention: a name for all layers, or one for each.
        activation: the student's activation: a name for all layers, or one for each.
        layer_norm: the student's LayerNorm: a name for all, or one for those after attention and one for those after
            the feed-forward, or such two for every layer. `layer_norm_constant` is calibrated on the teacher.
            `layer_norm_chebyshev` is calibrated when stage 2 begins, and trained to stay in its range. So the student
            must be near its teacher by then: without a stage 1 `layer_norm` does better.
        num_hidden_layers: the student's layers; by default as many as the teacher's. They start as layers of the
            teacher's, spread evenly, and match the hidden states of these.
        kept_layers: these layers of the teacher's, from 0, in place of a number that is spread.
        num_attention_heads: the student's heads, a divisor of the teacher's, which are merged; by default all.
        intermediate_size: the features of the student's feed-forward; by default all. Those of the teacher's stay that
            move its output most.
        layers_sharing_scores: so many neighbouring layers have the attention scores of the first of them; by default
            every layer has its own.
        budget: what a request of the longest text may take on ABY3, without a plan of bits: lan=2s or wan=20s
            (modelled), bytes=300MB (of all parties), or rounds=200. Attention, activation and LayerNorms are then
            chosen for every layer, from what each part loses in a short training, and what it costs. Of two layers
            in a row one keeps a root after the feed-forward: without, a student diverges.
        least_squares_rows: the number of training texts, of the task's own where it has as many, on which the student
            starts layer after layer, so that each gives what the teacher's gives: its matrices are solved for, then it
            is trained alone (stage 0). 0: it starts from the teacher's matrices. Some 25 bytes are held for every token
            and feature: of base size, for 8,192 short texts, 3 GB.
        stage0: how long and how fast each layer is trained alone; by default its matrices are solved for, no more.
        stage1: the first stage; by default it matches hidden states alone.
        stage2: the last stage; by default it matches hidden states still, and a tenth of the logits, at a tenth of the
            rate: mostly on logits a student comes nearer to its teacher on the rows it learns from, and on no others.
        pieces: the number of pieces of 1 to 6 tokens that are distilled beside each sentence, see
            `flaxmpc.data.pieces`. A stage that looks at labels has none.
        unlabelled: a file or folder of texts in the data's text columns, that stage 1 learns from too: of any text
            the teacher has hidden states, and a student that has seen few is near it only on those.
        max_length: the number of tokens that a text is cut at.
        train_embeddings: also train the embeddings; then they are secret under MPC, and cost more.
        word_embedding_bits: how the table of words is stored: 32, 8 or 4. The student is trained on what is stored.
        matrix_bits: how every other matrix is stored.
        ref2k_sentences: how many test sentences are measured under the secure protocols' arithmetic; None: all.
        aby3_sentences: how many test sentences are measured on three parties' shares; 0 leaves it out.
        teacher_memory: gigabytes for the teacher's outputs; if they need more, they are computed in every epoch.
        text_columns: the data's columns of text, one, or two for pairs; by default the usual names.
        label_column: the data's column of labels.
        seed: the seed of the order of the sentences.
        runs: the folder of checkpoints and metrics; by default OUT.run, beside OUT.
        notes: Markdown for the card: what was tried.
    """

    teacher: Annotated[str | Path, _MODEL]
    data: str
    out: Path
    attention: Annotated[str | tuple[str, ...], _of(ATTENTION, "NAME [NAME ...]")] = "2quad_freediv"
    activation: Annotated[str | tuple[str, ...], _of(ACTIVATIONS, "NAME [NAME ...]")] = "quad"
    layer_norm: Annotated[str | tuple[str, ...], _of(NORMALIZATIONS, "NAME [NAME ...]")] = "layer_norm_chebyshev"
    num_hidden_layers: int | None = None
    kept_layers: tuple[int, ...] = ()
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    layers_sharing_scores: int | None = None
    budget: str | None = None
    least_squares_rows: int = 0
    stage0: Schedule = Schedule(epochs=0, learning_rate=7e-4, batch_size=16)
    stage1: Stage = Stage(epochs=8, learning_rate=3e-4, hidden_weight=1.0, range_weight=0.3)
    stage2: Stage = Stage(epochs=1, learning_rate=3e-5, hidden_weight=1.0, logit_weight=0.1, range_weight=0.1)
    pieces: float = 0.25
    unlabelled: Path | None = None
    max_length: int = 64
    train_embeddings: bool = False
    word_embedding_bits: int = 4
    matrix_bits: int = 8
    ref2k_sentences: int | None = None
    aby3_sentences: int = 100
    teacher_memory: float = 6.0
    text_columns: tuple[str, ...] = ()
    label_column: str = "label"
    seed: int = 0
    runs: Path | None = None
    notes: str = ""

    def __post_init__(self):
        _require_length(self.max_length)
        if self.kept_layers and self.num_hidden_layers is not None:
            raise ValueError("kept_layers says how many layers a student has: leave num_hidden_layers out")
        if self.least_squares_rows < 0:
            raise ValueError(f"least_squares_rows is {self.least_squares_rows}: a number of texts, or 0 for none")
        if self.least_squares_rows and (self.layers_sharing_scores or 1) > 1:
            raise ValueError("least_squares_rows is for layers that share no scores: leave layers_sharing_scores out")
        if self.stage0.epochs and not self.least_squares_rows:
            raise ValueError("stage0 trains layers that were solved for: say on how many texts, by least_squares_rows")
        if self.budget is None:
            return
        Budget.parse(self.budget)
        for field in ("attention", "activation", "layer_norm", "layers_sharing_scores"):
            if getattr(self, field) != getattr(type(self), field):
                raise ValueError(f"a budget chooses the parts of every layer: leave {field} out, or the budget")
